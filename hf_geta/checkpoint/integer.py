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
PACKED_BITS = (2, 4)  # of which a byte holds whole codes
WORDS = {2: torch.int32, 4: torch.int16}  # width of a code -> type of as many bytes as one byte holds codes
BYTES_OF_1 = 0x0101010101010101  # a word of eight bytes, 1 in each
BYTES_OF_128 = -0x7F7F7F7F7F7F7F80  # 0x8080808080808080 as a signed number
CHUNK_NUMEL = 1 << 21  # weights that are int8 at a time
MIN_PACKED_NUMEL = 1 << 16  # smaller layers are faster as int8: what a call costs is its operations, not its bytes
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


def fits_packed_product(manifest: LayerManifest) -> bool:
    """Whether `packed_product` takes a layer that `fits_integers` and whose rows follow one another in its stream.

    - A byte holds whole codes: 2 or 4 bits.
    - A row is whole bytes, more than one (of sums of one term torch's kernel leaves the result unwritten).
    - Sums stay below 2^31, with each code in the upper bits of a byte.
    - With blocks instead: a row is whole blocks, and their codes at one position of the bytes fill whole words.
    """
    bits, terms = manifest.bits, math.prod(manifest.shape[1:])
    if bits not in PACKED_BITS:
        return False
    if manifest.granularity == "block":
        return terms % manifest.block_size == 0 and manifest.block_size * bits % 64 == 0
    largest = 1 << KERNEL_BITS - 1
    return terms * bits % 8 == 0 and terms * bits > 8 and terms * largest * _highest_input(manifest) <= MAX_SUM


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


def packed_product(
    rows: Tensor, packed: Tensor, bits: int, multipliers: Tensor | None, scale: Tensor | float, bias: Tensor | None
) -> Tensor:
    """`integer_product` of packed codes, without putting each where it belongs, which takes longer than the product.

    One pass over the bytes makes an int8 matrix of the codes at one position in all of them. It is multiplied with the
    columns of the input that these codes stand for, and the products of all positions are added.

    Args:
        rows: int8 or uint8, (rows, in).
        packed: uint8, (out, in * bits / 8), codes of 2 or 4 bits as `pack_codes` writes them.
        multipliers: int8, (out, blocks), what multiplies the codes of a block; or None.
        scale: d_x d_w, a number or float32 (out,).
        bias: (out,).

    Returns:
        float32, (rows, out): bit for bit `integer_product` of the codes times their multipliers.
    """
    per_byte = KERNEL_BITS // bits
    words = rows.flatten().view(WORDS[bits]).view(len(rows), rows.shape[1] // per_byte)
    columns = [(words >> KERNEL_BITS * position).to(rows.dtype) for position in range(per_byte)]
    y = rows.new_empty(len(rows), len(packed), dtype=torch.float32)
    for first in range(0, len(packed), step := max(CHUNK_NUMEL // rows.shape[1], 1)):
        chunk = slice(first, first + step)
        if multipliers is None:
            weights = _codes_in_high_bits(packed[chunk], bits)
        else:
            weights = _codes_times_multipliers(packed[chunk], multipliers[chunk], bits)
        products = (torch._int_mm(each, weight.t()) for each, weight in zip(columns, weights, strict=True))
        y[:, chunk] = functools.reduce(Tensor.add_, products)
    y.mul_(scale if multipliers is not None else scale * 2.0 ** (bits - KERNEL_BITS))
    return y if bias is None else y.add_(bias)


def _codes_in_high_bits(packed: Tensor, bits: int) -> Iterator[Tensor]:
    """2^(8 - bits) times the codes at each position in a byte, int8, (out, bytes).

    A code in the upper bits of a byte, above zeros, is that: of the byte 0x3F, with the codes -1 and 3, 0xF0 is -16 and
    0x30 is 48.
    """
    upper = 256 - (1 << KERNEL_BITS - bits)  # 0xC0, 0xF0
    last = KERNEL_BITS // bits - 1
    for position in range(last + 1):
        codes = packed if position == last else packed * (1 << bits * (last - position))  # what passes 8 bits is lost
        yield (codes & upper if position else codes).view(torch.int8)


def _codes_times_multipliers(packed: Tensor, multipliers: Tensor, bits: int) -> Iterator[Tensor]:
    """The codes at each position in a byte times the multipliers of their blocks, int8, (out, bytes): eight at a time.

    A word of eight bytes is a number with eight digits of base 256. With codes as its digits, some of them negative,
    its product with a multiplier has the products as digits; 128 more make bytes of them.
    """
    sign = 1 << bits - 1
    unsigned = packed ^ {2: 0xAA, 4: 0x88}[bits]  # each code + 2^(bits-1)
    factors = multipliers.to(torch.int64)[..., None]
    for position in range(KERNEL_BITS // bits):
        codes = (unsigned >> bits * position if position else unsigned) & (1 << bits) - 1
        words = codes.view(torch.int64).view(*multipliers.shape, -1)
        words.sub_(sign * BYTES_OF_1).mul_(factors).add_(BYTES_OF_128).bitwise_xor_(BYTES_OF_128)
        yield codes.view(torch.int8)


def _highest_input(manifest: LayerManifest) -> int:
    assert manifest.activation_bits is not None
    return highest_code(manifest.activation_bits, bool(manifest.activation_signed))
