"""The passes of `fake_quantize`, fused: blocks that stay in cache, in-place operators, sums by dot products.

Nothing is kept between forward and backward but x: the backward pass rounds again, which costs less than the
memory. On the CPU a scalar is read as a Python number (it is there already, and ATen has vectorized kernels for
it); on a device everything stays a tensor, so that nothing waits for the device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MULTIPLIERS = 16  # what multipliers are fractions of
BLOCK_NUMEL = 1 << 18  # 1 MiB of float32; the fastest of 2^14 ... 2^22 on 2 cores
# Below it |x| counts as this much, whose powers are no denormal numbers: with those exp2 takes seven times as long, and
# weights have many zeros. sgn(0) = 0 makes them 0 again.
LEAST_MAGNITUDE = 2.0**-100


class Grid(NamedTuple):
    """The points that x is rounded to: the arguments of `fake_quantize` after x."""

    step_size: Any  # d, ()
    clip_max: Any  # q_m, ()
    exponent: Any = None  # t, (); None is 1
    channel_scale: Any = None  # s, (out, 1, ...) or (1, out); None is 1
    signed: bool = True
    multipliers: Any = None  # 16 m, (out, blocks) or (blocks, out), integers; None is m = 1
    block_of: Any = None  # (in,): the block of each input; None is `block_size` inputs each, as they lie
    block_size: int = 0  # inputs of a block; 0 without blocks


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(x: Tensor, grid: Grid) -> Tensor:
    """Q(x), in the shape, memory layout and dtype of x."""
    return _map(_dequantized, x, grid, x.dtype)


def codes(x: Tensor, grid: Grid) -> Tensor:
    """sgn(x) round(u / d) as int32, in the shape and memory layout of x."""
    return _map(_rounded, x, grid, torch.int32)


def backward(
    grad: Tensor, x: Tensor, grid: Grid, keep_value: bool = False, overwrite_grad: bool = False
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Q(x) if `keep_value` (else None), and the gradients of <grad, Q(x)> for x and the four tensors of the grid."""
    order = _memory_order(x, grid)
    local = _local(grid, x, order)
    source, upstream = _flatten(x, order, local), _flatten(grad, order, local)
    kept = torch.empty_like(source) if keep_value else None
    grad_x = upstream if overwrite_grad and upstream.dtype == x.dtype else torch.empty_like(source)
    sums = []
    for rows in _row_blocks(source):
        kept_rows = None if kept is None else kept[rows]
        at = _at(local, rows, source[rows])
        sums.append(_backward_block(source[rows], upstream[rows], at, grad_x[rows], kept_rows))
    value = None if kept is None else _unflatten(kept, x, order)
    return value, (_unflatten(grad_x, x, order), *_gather(sums, grid, local, source))


def _backward_block(x: Tensor, grad: Tensor, grid: Grid, grad_x: Tensor, kept: Tensor | None) -> list[Tensor | None]:
    """Writes the gradient of x, and Q(x) to `kept`; returns this block's share of four sums (the last per channel).

    With p = s m sgn(x) u and g_c what of g lies beyond the clip:

        d dd = <g, Q - p>    q_m dq_m / t = <g_c, p>    dt = ln 2 <g, p log2 a>    s ds = <g, Q - x> + <g_c, x>
    """
    x, g = x.to(compute_dtype(x)), grad.to(compute_dtype(x))
    scale = grid.channel_scale
    v = _scaled(x, grid, _scratch(0, x))
    log2 = _scratch(4, x)
    power = _signed_power(v, grid, _scratch(1, x), log2)
    quantized = kept if kept is not None and kept.dtype == x.dtype else _scratch(2, x)
    _times_multiplier_(torch.div(power, grid.step_size, out=quantized).round_(), grid).mul_(_step(grid))
    if kept is not None and kept is not quantized:
        kept.copy_(quantized)
    beyond = _beyond_clip(g, v, grid)
    exponent_sum = scale_sum = None
    if scale is not None:
        _times_multiplier_(power.mul_(scale), grid)
    if grid.exponent is not None:
        exponent_sum = _dot(log2.mul_(power), g) * math.log(2)
    if scale is not None:
        error = torch.sub(quantized, x, out=_scratch(4, x)).mul_(g).addcmul_(beyond, x)
        scale_sum = error.sum(other_dim(scale, x))
    clip_sum = _dot(beyond, power)
    step_sum = _dot(g, power.sub_(quantized)).neg_()
    if grad_x.dtype == g.dtype:
        torch.sub(g, beyond, out=grad_x)
    else:
        grad_x.copy_(beyond.neg_().add_(g))
    return [step_sum, clip_sum, exponent_sum, scale_sum]


def _gather(sums: list[list[Tensor | None]], grid: Grid, local: Grid, flat: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of d, q_m, t and s from the blocks' sums."""
    if not sums:  # an empty x
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in grid[:4])
    step, clip, exponent, scale = zip(*sums)
    grad_step, grad_clip, grad_exponent, grad_scale = sum(step) / grid.step_size, sum(clip) / grid.clip_max, None, None
    if grid.exponent is not None:
        grad_clip, grad_exponent = grad_clip * grid.exponent, sum(exponent)
    if grid.channel_scale is not None:
        total = torch.cat(scale) if other_dim(local.channel_scale, flat) == 1 else sum(scale)
        grad_scale = total.view_as(grid.channel_scale) / grid.channel_scale
    return grad_step, grad_clip, grad_exponent, grad_scale


# One block: x and out are contiguous, of compute dtype.


def _signed_power(v: Tensor, grid: Grid, out: Tensor | None = None, log2: Tensor | None = None) -> Tensor:
    """p = sgn(v) min(|v|, q_m)^t as 2^(t log2 a), half the time of a power; log2 a is written to `log2`."""
    power = torch.clamp(v, _low(grid), grid.clip_max, out=out)
    if grid.exponent is None:
        return power
    sign = torch.sign(power, out=_scratch(3, power))
    magnitude = power.abs_().clamp_(min=LEAST_MAGNITUDE)
    log2 = magnitude.log2_() if log2 is None else torch.log2(magnitude, out=log2)
    return torch.mul(log2, grid.exponent, out=power).exp2_().mul_(sign)


def _rounded(x: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """sgn(x) round(u / d), in floating point."""
    return _signed_power(_scaled(x, grid, out), grid, out).div_(grid.step_size).round_()


def _dequantized(x: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    return _times_multiplier_(_rounded(x, grid, out), grid).mul_(_step(grid))


def _scaled(x: Tensor, grid: Grid, out: Tensor | None) -> Tensor:
    """x / (s m)."""
    if grid.channel_scale is None:
        return x
    v = torch.div(x, grid.channel_scale, out=out)
    return v if grid.multipliers is None else v.div_(grid.multipliers)


def _times_multiplier_(values: Tensor, grid: Grid) -> Tensor:
    """Of codes an exact product, which is what a packed layer stores as one integer."""
    return values if grid.multipliers is None else values.mul_(grid.multipliers)


def _low(grid: Grid) -> Any:
    return -grid.clip_max if grid.signed else 0 * grid.clip_max


def _step(grid: Grid) -> Any:
    """d, or s * d per channel: the same single product that a packed layer stores."""
    return grid.step_size if grid.channel_scale is None else grid.channel_scale * grid.step_size


def _beyond_clip(g: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """g where v lies beyond the clip, 0 elsewhere."""
    if grid.signed and isinstance(grid.clip_max, float):  # one pass, but it takes a number
        return torch.ops.aten.hardshrink_backward.grad_input(g, v, grid.clip_max, grad_input=_scratch(3, v))
    low = _low(grid)
    return torch.where((v < low) | (v > grid.clip_max), g, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.view(-1), b.view(-1))


_buffers = threading.local()


def _scratch(index: int, like: Tensor) -> Tensor:
    """Memory in the shape of a block, the same for the same index: fresh pages would cost more than the arithmetic."""
    if like.device.type != "cpu" or type(like) is not Tensor or like.numel() > BLOCK_NUMEL:
        return torch.empty_like(like)
    key = f"{like.dtype}{index}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or buffer.numel() < like.numel():
        with torch.inference_mode(False):
            buffer = torch.empty(BLOCK_NUMEL, dtype=like.dtype, device="cpu")
        setattr(_buffers, key, buffer)
    return buffer[: like.numel()].view(like.shape)


# The tensor as rows of a contiguous matrix or, without channels, as one contiguous line.


def _map(function: Any, x: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    order = _memory_order(x, grid)
    local = _local(grid, x, order)
    source = _flatten(x, order, local)
    result = torch.empty_like(source, dtype=dtype)
    for rows in _row_blocks(source):
        block = source[rows].to(compute_dtype(x))
        at = _at(local, rows, block)
        if dtype == block.dtype:
            function(block, at, result[rows])
        else:
            result[rows] = function(block, at)
    return _unflatten(result, x, order)


def _local(grid: Grid, x: Tensor, order: list[int] | None) -> Grid:
    """The grid as blocks of the cache use it: numbers on the CPU, channel scales as a row or a column, m as floats."""
    scale, multipliers = grid.channel_scale, grid.multipliers
    if scale is not None:
        scale = (scale if order is None else scale.permute(order)).detach().flatten(1)
    if multipliers is not None:
        multipliers = (multipliers if order is None else multipliers.permute(order)).to(compute_dtype(x)) / MULTIPLIERS
    read = _number if _readable(grid.step_size) else Tensor.detach
    step_size, clip_max, exponent = (None if tensor is None else read(tensor) for tensor in grid[:3])
    return Grid(step_size, clip_max, exponent, scale, grid.signed, multipliers, grid.block_of, grid.block_size)


def _readable(scalar: Tensor) -> bool:
    """Whether reading the value waits for nothing: a real tensor on the CPU."""
    return scalar.device.type == "cpu" and type(scalar) in (Tensor, torch.nn.Parameter)


def _number(scalar: Tensor) -> float:
    return scalar.item()


def _at(grid: Grid, rows: slice, like: Tensor) -> Grid:
    """The grid of some rows of the matrix, with m for each of their entries."""
    scale, multipliers = grid.channel_scale, grid.multipliers
    if scale is None:
        return grid
    if multipliers is not None and other_dim(scale, like) == 1:
        multipliers = spread(multipliers[rows], 1, grid, 0, like.shape[1])
    elif multipliers is not None:
        multipliers = spread(multipliers, 0, grid, rows.start, len(like))
    return grid._replace(channel_scale=scale if scale.shape[0] == 1 else scale[rows], multipliers=multipliers)


def spread(numbers: Tensor, dim: int, grid: Grid, start: int, length: int) -> Tensor:
    """One number per block of `grid` -> one per input, along `dim`, for the inputs start ... start + length - 1."""
    if grid.block_of is not None:
        return numbers.index_select(dim, grid.block_of[start : start + length])
    size = grid.block_size
    first, last = start // size, (start + length - 1) // size
    numbers = numbers.narrow(dim, first, last - first + 1).repeat_interleave(size, dim)
    return numbers.narrow(dim, start - first * size, length)


def other_dim(scale: Tensor, x: Tensor) -> int:
    """The dimension of a matrix that its row or column of channel scales does not index, of a single channel too."""
    if scale.shape[0] == scale.shape[1]:  # 1
        return 1 if x.shape[1] > 1 else 0
    return 1 if scale.shape[1] == 1 else 0


def _memory_order(x: Tensor, grid: Grid) -> list[int] | None:
    """The dimensions from the slowest to the fastest in memory; None to take x in its logical order."""
    order = sorted(range(x.dim()), key=lambda dim: -x.stride()[dim])
    channels_inside = grid.channel_scale is not None and x.dim() > 2 and order[0] != 0
    return None if x.is_contiguous() or channels_inside else order


def _flatten(x: Tensor, order: list[int] | None, grid: Grid) -> Tensor:
    x = (x if order is None else x.permute(order)).contiguous()
    return x.view(-1) if grid.channel_scale is None else x.flatten(1)


def _unflatten(flat: Tensor, like: Tensor, order: list[int] | None) -> Tensor:
    if order is None:
        return flat.view(like.shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def _row_blocks(flat: Tensor) -> Iterator[slice]:
    length = flat.shape[0]
    if flat.numel() == 0:
        return
    is_cached = flat.device.type == "cpu" and type(flat) is Tensor  # a fake tensor has no numbers to keep in a cache
    step = max(1, BLOCK_NUMEL * length // flat.numel()) if is_cached else length
    for start in range(0, length, step):
        yield slice(start, start + step)
