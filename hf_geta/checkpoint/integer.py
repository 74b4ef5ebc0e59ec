"""Layers as products of integers: the codes of the input times the codes of the weight, by torch's int8 kernel.

    y = (d_x d_w) * sum_k c_x[k] c_w[k] + bias

The sum is exact; what is left is one rounding of it, of the product with the scale, and of the sum with the bias. The
reference multiplies d_x c_x with d_w c_w in floating point and rounds every partial sum.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import highest_code

KERNEL_BITS = 8  # of either factor
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


def _highest_input(manifest: LayerManifest) -> int:
    assert manifest.activation_bits is not None
    return highest_code(manifest.activation_bits, bool(manifest.activation_signed))
