"""The math of the quantizer, written once: step size d, clip q_m, exponent t, width b (GETA, Sec. 3).

    u    = min(|x|, q_m)^t
    Q(x) = sgn(x) * d * round(u / d)
    b    = log2(q_m^t / d + 1) + 1            the sign included; without the + 1 on an unsigned grid

`exponent=None` is t = 1 without the cost of a power. A `channel_scale` s makes it s * Q(x / s): every channel has
a step size s * d and a clip s * q_m of its own, and the width stays one per tensor. Q(0) = 0 always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_geta.quantization import kernels
from hf_geta.quantization.kernels import Grid


def step_size_to_bits(
    step_size: Tensor | float, clip_max: Tensor | float, exponent: Tensor | float | None = None, signed: bool = True
) -> Tensor:
    """b = log2(q_m^t / d + 1) + 1, a real number of bits; one bit less on an unsigned grid (GETA, Sec. 3).

    Arguments are positive and broadcast against each other; the result has their common shape.
    """
    top = torch.as_tensor(clip_max if exponent is None else clip_max**exponent)
    return torch.log2(top / step_size + 1) + signed


def bits_to_step_size(
    bits: Tensor | float, clip_max: Tensor | float, exponent: Tensor | float | None = None, signed: bool = True
) -> Any:
    """d = q_m^t / (2^(b-1) - 1), or q_m^t / (2^b - 1) on an unsigned grid: the inverse of `step_size_to_bits`."""
    return (clip_max if exponent is None else clip_max**exponent) / (2 ** (bits - signed) - 1)


def fake_quantize(
    x: Tensor,
    step_size: Tensor,
    clip_max: Tensor,
    exponent: Tensor | None = None,
    channel_scale: Tensor | None = None,
    signed: bool = True,
    multipliers: Tensor | None = None,
    block_of: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """Q(x), in the shape and dtype of x, with gradients for x and for what the quantizer learns (GETA, Sec. 3).

    With r = sgn(x) * (round(u / d) - u / d) and a = min(|x|, q_m):

        dQ/dd   = r                           dQ/dx   = 1 where |x| <= q_m, else 0  (straight-through)
        dQ/dt   = sgn(x) * u * ln(a)          dQ/dq_m = sgn(x) * t * q_m^(t-1) where |x| > q_m, else 0
        dQ/ds   = Q(v) - v * dQ/dx            at v = x / s, per channel

    Args:
        x: any floating dtype; the math is in float32 (float64 for float64).
        step_size, clip_max, exponent: positive 0-dim tensors; `exponent=None` means t = 1.
        channel_scale: positive, of shape (out, 1, ...) or (1, out): s above.
        signed: False clips x to [0, q_m] instead of [-q_m, q_m].
        multipliers: uint8, 1 ... 16, of shape (out, blocks) or (blocks, out): a block's scale is s multipliers / 16.
        block_of: int32 (in,), the block of each input; None with `multipliers` means blocks of inputs as they lie.
        block_size: inputs of a block that is as they lie; needed with `multipliers` and without `block_of`.

    Only x is kept for the backward pass. While `torch.compile` or `torch.export` traces, the same function is spelled
    in elementwise operators.
    """
    grid = Grid(step_size, clip_max, exponent, channel_scale, signed, multipliers, block_of, block_size)
    return trace_fake_quantize(x, grid) if torch.compiler.is_compiling() else _FakeQuantize.apply(x, *grid)


def quantize_codes(
    x: Tensor,
    step_size: Tensor,
    clip_max: Tensor,
    exponent: Tensor | None = None,
    channel_scale: Tensor | None = None,
    signed: bool = True,
    multipliers: Tensor | None = None,
    block_of: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """The integers k of `fake_quantize`: int32, the shape of x, |k| <= 2^(b-1) - 1 at a whole width b.

    `(step_size * channel_scale) * k`, in float32, is `fake_quantize(x)` bit for bit; with blocks, k times the exact
    multipliers / 16 in the place of k.
    """
    grid = Grid(step_size, clip_max, exponent, channel_scale, signed, multipliers, block_of, block_size)
    return kernels.codes(x.detach(), grid)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *grid: Any) -> Tensor:
        *scalars, ctx.signed, multipliers, block_of, ctx.block_size = grid
        ctx.save_for_backward(x, *scalars, multipliers, block_of)
        return kernels.forward(x, Grid(*grid))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *scalars, multipliers, block_of = ctx.saved_tensors
        grid = Grid._make([*scalars, ctx.signed, multipliers, block_of, ctx.block_size])
        return *kernels.backward(grad, x, grid)[1], None, None, None, None


def trace_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """`fake_quantize` in differentiable elementwise operators, for tracing compilers and as the tests' reference.

    The straight-through surrogate is literal: autograd of this expression gives the gradients documented there.
    """
    step_size, clip_max, exponent, scale, signed, multipliers, *_ = grid
    learning = torch.is_grad_enabled()
    dtype = kernels.compute_dtype(x)
    value = x if x.dtype == dtype else x.to(dtype)
    value = value if scale is None else value / scale
    if multipliers is not None:
        dim = kernels.other_dim(scale, x)
        multipliers = kernels.spread(multipliers.to(dtype) / kernels.MULTIPLIERS, dim, grid, 0, x.shape[dim])
        value = value / multipliers
    low = -clip_max if signed else torch.zeros_like(clip_max)
    if exponent is None:
        power = torch.clamp(value, low, clip_max)
    else:
        # What follows t and q_m, with x a constant; then x itself, with t and q_m constants.
        clipped = torch.clamp(value.detach() if learning else value, low, clip_max)
        magnitude = clipped.abs().clamp(min=kernels.LEAST_MAGNITUDE)
        power = torch.sign(clipped) * torch.exp2(exponent * torch.log2(magnitude))
        if learning:
            passed = torch.clamp(value, low.detach(), clip_max.detach())
            power = power + (passed - passed.detach())
    codes = power / step_size
    codes = codes + (torch.round(codes) - codes).detach() if learning else torch.round(codes)
    codes = codes if multipliers is None else codes * multipliers
    result = codes * (step_size if scale is None else step_size * scale)
    return result if x.dtype == dtype else result.to(x.dtype)
