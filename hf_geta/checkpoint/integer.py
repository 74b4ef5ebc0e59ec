"""Layers as products of integers: the codes of the input times the codes of the weight, by torch's int8 kernel.

    y = (d_x d_w) * sum_k c_x[k] c_w[k] + bias

The sum is exact; what is left is one rounding of it, of the product with the scale, and of the sum with the bias. The
reference multiplies d_x c_x with d_w c_w in floating point and rounds every partial sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import highest_code

KERNEL_BITS = 8  # of either factor
WORDS = {2: torch.int16, 4: torch.int32}  # of so many bytes
STREAM_BITS = tuple(KERNEL_BITS // codes for codes in WORDS)  # of which a byte holds whole codes
ONES = 0x0101010101010101  # 1 in each byte of a word
HIGH_BITS = -0x7F7F7F7F7F7F7F80  # 128 in each, as a number with a sign
STREAM_NUMEL = 1 << 21  # codes that are spread at a time: they stay in the cache until they are multiplied
MAX_SUM = 2**31 - 1
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits_integers(manifest: LayerManifest, channel_dim: int) -> bool:
    """Whether a layer's products are those of an int8 kernel: both widths at most 8 bits, every sum below 2^31.

    Sums of one term are not: torch 2.13's kernel leaves their result unwritten.
    """
    if manifest.activation_bits is None or max(manifest.bits, manifest.activation_bits) > KERNEL_BITS:
        return False
    terms = math.prod(manifest.shape) // manifest.shape[channel_dim]
    highest = highest_code(KERNEL_BITS if manifest.granularity == "block" else manifest.bits)
    return terms > 1 and terms * highest * _highest_input(manifest) <= MAX_SUM


def fits_stream(manifest: LayerManifest) -> bool:
    """Whether `stream_product` takes a layer that `fits_integers` and whose rows follow one another in its stream.

    Bytes hold whole codes and rows some whole bytes, with blocks whole blocks of whole words. Without blocks, sums of
    2^(8 - bits) times the codes have to stay below 2^31 as well.
    """
    bits, terms = manifest.bits, math.prod(manifest.shape[1:])
    if bits not in STREAM_BITS:
        return False
    if manifest.granularity == "block":
        return terms % manifest.block_size == 0 and manifest.block_size * bits % 64 == 0
    highest = highest_code(bits) << KERNEL_BITS - bits
    return terms * bits % 8 == 0 and terms * bits > 8 and terms * highest * _highest_input(manifest) <= MAX_SUM


@functools.cache
def has_integer_kernel(source: torch.dtype) -> bool:
    """Whether `torch._int_mm` on this CPU is fast (VNNI) and exact for a `source` of int8 or uint8.

    Asked of the kernel itself, with the largest sums of pairs, where instruction sets before VNNI saturate.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    x = torch.full((2, 64), torch.iinfo(source).max, dtype=source, device="cpu")
    weight = torch.tensor([127, -127], dtype=torch.int8, device="cpu").expand(64, 2)
    try:
        return torch.equal(torch._int_mm(x, weight.contiguous()), (x.int() @ weight.int()))
    except RuntimeError:  # a release whose kernel does not take this source
        return False


def input_dtype(manifest: LayerManifest) -> torch.dtype:
    """What holds the codes of the input: int8, or uint8 for unsigned codes of 8 bits."""
    return torch.int8 if _highest_input(manifest) <= 127 else torch.uint8


def input_codes(x: Tensor, manifest: LayerManifest) -> Tensor:
    """clamp(round(x / d_x), low, high) in float32, as int8 or uint8, in the shape of x."""
    return rounded_codes(x.float(), manifest).to(input_dtype(manifest))


def rounded_codes(x: Tensor, manifest: LayerManifest) -> Tensor:
    """clamp(round(x / d_x), low, high) in the shape and dtype of x, which is float32 or float64."""
    high = _highest_input(manifest)
    return torch.div(x, input_step_size(manifest)).round_().clamp_(-high if manifest.activation_signed else 0, high)


def input_step_size(manifest: LayerManifest) -> float:
    """d_x of a layer whose input is quantized."""
    assert manifest.activation_step_size is not None
    return manifest.activation_step_size


def integer_product(rows: Tensor, weight: Tensor, scale: Tensor | float, bias: Tensor | None) -> Tensor:
    """scale * (rows @ weight) + bias.

    Args:
        rows: int8 or uint8, (rows, in).
        weight: int8, (in, out).
        scale: d_x d_w, a number or float32 (out,).
        bias: (out,).

    Returns:
        float32, (rows, out).
    """
    y = torch._int_mm(rows, weight).to(torch.float32).mul_(scale)
    return y if bias is None else y.add_(bias)


def stream_product(
    rows: Tensor, stream: Tensor, bits: int, units: Tensor | None, scale: Tensor | float, bias: Tensor | None
) -> Tensor:
    """`integer_product` with a weight as it is packed, of which only a part is spread into bytes at a time.

    One pass over its bytes makes a matrix of all codes that lie first in their byte, another of all that lie second,
    and each is multiplied with its columns of the input. To put every code where it belongs costs several times more.

    Args:
        rows: int8 or uint8, (rows, in), contiguous.
        stream: uint8, (out, in * bits / 8), codes of 2 or 4 bits.
        units: int8, (out, blocks), what multiplies the codes of a block; or None.
        scale: d_x d_w, a number or float32 (out,).
        bias: (out,).

    Returns:
        float32, (rows, out), the same as `integer_product` of codes times units, bit for bit.
    """
    together = KERNEL_BITS // bits
    words = rows.view(WORDS[together])
    columns = [(words >> KERNEL_BITS * place).to(rows.dtype) for place in range(together)]
    sums = []
    for first in range(0, len(stream), step := max(STREAM_NUMEL // rows.shape[1], 1)):
        some = slice(first, first + step)
        weights = _shifted(stream[some], bits) if units is None else _multiples(stream[some], units[some], bits)
        products = [torch._int_mm(each, weight.t()) for each, weight in zip(columns, weights, strict=True)]
        sums.append(functools.reduce(Tensor.add_, products))
    y = (sums[0] if len(sums) == 1 else torch.cat(sums, 1)).to(torch.float32)
    y.mul_(scale if units is not None else scale * 2.0 ** (bits - KERNEL_BITS))
    return y if bias is None else y.add_(bias)


def _shifted(stream: Tensor, bits: int) -> Iterator[Tensor]:
    """2^(8 - bits) times the codes at each place of a byte, int8, (out, bytes): codes in upper bits, above zeros."""
    upper = 256 - (1 << KERNEL_BITS - bits)
    for place in range(together := KERNEL_BITS // bits):
        if place == together - 1:
            codes = stream & upper
        else:
            codes = stream * (1 << KERNEL_BITS - bits * (place + 1))  # what passes the byte's end is lost
            if place:
                codes &= upper
        yield codes.view(torch.int8)


def _multiples(stream: Tensor, units: Tensor, bits: int) -> Iterator[Tensor]:
    """The codes at each place of a byte times the units of their blocks, int8, (out, bytes): eight at a time.

    A word of eight bytes is a number with eight digits of base 256. With codes as its digits, some of them negative,
    its product with the unit has the multiples as digits; 128 more make bytes of them.
    """
    sign = 1 << bits - 1
    unsigned = stream ^ sign * (255 // ((1 << bits) - 1))  # code + 2^(bits-1)
    factors = units.to(torch.int64)[..., None]
    for place in range(KERNEL_BITS // bits):
        codes = (unsigned >> bits * place if place else unsigned) & (1 << bits) - 1
        words = codes.view(torch.int64).view(*units.shape, -1)
        words.sub_(sign * ONES).mul_(factors).add_(HIGH_BITS).bitwise_xor_(HIGH_BITS)
        yield codes.view(torch.int8)


def _highest_input(manifest: LayerManifest) -> int:
    assert manifest.activation_bits is not None
    return highest_code(manifest.activation_bits, bool(manifest.activation_signed))
