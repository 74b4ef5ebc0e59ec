"""The passes of `fake_quantize`, fused: blocks that stay in cache, in-place operators, sums by dot products.

Nothing is kept between forward and backward but x: the backward pass rounds again, which costs less than the
memory. On the CPU a scalar is read as a Python number (it is there already, and ATen has vectorized kernels for
it); on a device everything stays a tensor, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 18  # 1 MiB of float32; the fastest of 2^14 ... 2^22 on 2 cores


class Grid(NamedTuple):
    """The points that x is rounded to: the arguments of `fake_quantize` after x."""

    step_size: Any  # d, ()
    clip_max: Any  # q_m, ()
    exponent: Any = None  # t, (); None is 1
    channel_scale: Any = None  # s, (out, 1, ...) or (1, out); None is 1
    signed: bool = True


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
    order = _memory_order(x)
    local = _local(grid, x, order)
    source, upstream = _flatten(x, order, local), _flatten(grad, order, local)
    kept = torch.empty_like(source) if keep_value else None
    grad_x = upstream if overwrite_grad and upstream.dtype == x.dtype else torch.empty_like(source)
    sums = []
    for rows in _row_blocks(source):
        kept_rows = None if kept is None else kept[rows]
        sums.append(_backward_block(source[rows], upstream[rows], _at(local, rows), grad_x[rows], kept_rows))
    value = None if kept is None else _unflatten(kept, x, order)
    return value, (_unflatten(grad_x, x, order), *_gather(sums, grid, local))


def _backward_block(x: Tensor, grad: Tensor, grid: Grid, grad_x: Tensor, kept: Tensor | None) -> list[Tensor | None]:
    """Writes the gradient of x, and Q(x) to `kept`; returns this block's share of four sums (the last per channel).

    With p = s sgn(x) u and g_c what of g lies beyond the clip:

        d dd = <g, Q - p>     q_m dq_m / t = <g_c, p>     dt = <g, p ln a>     s ds = <g, Q - x> + <g_c, x>
    """
    x, g = x.to(compute_dtype(x)), grad.to(compute_dtype(x))
    scale = grid.channel_scale
    v = x if scale is None else x / scale
    power = _signed_power(v, grid)
    quantized = kept if kept is not None and kept.dtype == x.dtype else torch.empty_like(x)
    _rounded(power, grid, quantized, power).mul_(_step(grid))
    if kept is not None and kept is not quantized:
        kept.copy_(quantized)
    beyond = _beyond_clip(g, v, grid)
    exponent_sum = scale_sum = None
    if scale is not None:
        power.mul_(scale)
        scale_sum = torch.sub(quantized, x).mul_(g).addcmul_(beyond, x).sum(_other_dim(scale))
    clip_sum = _dot(beyond, power)
    if grid.exponent is not None:
        log = torch.clamp(v.abs(), max=grid.clip_max).clamp_(min=torch.finfo(v.dtype).tiny).log_()
        exponent_sum = _dot(log.mul_(power), g)
    step_sum = _dot(g, torch.sub(quantized, power, out=power))
    if grad_x.dtype == g.dtype:
        torch.sub(g, beyond, out=grad_x)
    else:
        grad_x.copy_(beyond.neg_().add_(g))
    return [step_sum, clip_sum, exponent_sum, scale_sum]


def _gather(sums: list[list[Tensor | None]], grid: Grid, local: Grid) -> tuple[Tensor | None, ...]:
    """The gradients of d, q_m, t and s from the blocks' sums."""
    if not sums:  # an empty x
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in grid[:4])
    step, clip, exponent, scale = ([part for part in parts if part is not None] for parts in zip(*sums))
    grad_clip = torch.stack(clip).sum() / grid.clip_max
    grad_exponent = grad_scale = None
    if grid.exponent is not None:
        grad_clip, grad_exponent = grad_clip * grid.exponent, torch.stack(exponent).sum()
    if grid.channel_scale is not None:
        total = torch.cat(scale) if _other_dim(local.channel_scale) == 1 else torch.stack(scale).sum(0)
        grad_scale = total.view_as(grid.channel_scale) / grid.channel_scale
    return torch.stack(step).sum() / grid.step_size, grad_clip, grad_exponent, grad_scale


# One block: x and out are contiguous, of compute dtype.


def _signed_power(v: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """sgn(v) min(|v|, q_m)^t."""
    low = -grid.clip_max if grid.signed else 0 * grid.clip_max
    power = torch.clamp(v, low, grid.clip_max, out=out)
    if grid.exponent is None:
        return power
    sign = torch.sign(power)
    return power.abs_().pow_(grid.exponent).mul_(sign)


def _rounded(x: Tensor, grid: Grid, out: Tensor | None = None, power: Tensor | None = None) -> Tensor:
    """sgn(x) round(u / d), in floating point."""
    if power is None:
        v = x if grid.channel_scale is None else torch.div(x, grid.channel_scale, out=out)
        power = out = _signed_power(v, grid, out)
    return torch.div(power, grid.step_size, out=out).round_()


def _dequantized(x: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    return _rounded(x, grid, out).mul_(_step(grid))


def _step(grid: Grid) -> Any:
    """d, or s * d per channel: the same single product that a packed layer stores."""
    return grid.step_size if grid.channel_scale is None else grid.channel_scale * grid.step_size


def _beyond_clip(g: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """g where v lies beyond the clip, 0 elsewhere."""
    if grid.signed and isinstance(grid.clip_max, float):
        return torch.ops.aten.hardshrink_backward(g, v, grid.clip_max)  # one pass; only the CPU has the number
    low = -grid.clip_max if grid.signed else 0 * grid.clip_max
    return torch.where((v < low) | (v > grid.clip_max), g, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.view(-1), b.view(-1))


# The tensor as rows of a contiguous matrix or, without channels, as one contiguous line.


def _map(function: Any, x: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    order = _memory_order(x)
    local = _local(grid, x, order)
    source = _flatten(x, order, local)
    result = torch.empty_like(source, dtype=dtype)
    for rows in _row_blocks(source):
        block = source[rows].to(compute_dtype(x))
        if dtype == block.dtype:
            function(block, _at(local, rows), result[rows])
        else:
            result[rows] = function(block, _at(local, rows))
    return _unflatten(result, x, order)


def _local(grid: Grid, x: Tensor, order: list[int] | None) -> Grid:
    """The grid as the blocks use it: numbers on the CPU, the channel scale as a row or a column."""
    scale = grid.channel_scale
    if scale is not None:
        scale = (scale if order is None else scale.permute(order)).detach().flatten(1)
    if x.device.type == "cpu" and type(grid.step_size) in (Tensor, torch.nn.Parameter):
        numbers = [None if tensor is None else tensor.item() for tensor in grid[:3]]
    else:
        numbers = [None if tensor is None else tensor.detach() for tensor in grid[:3]]
    return Grid(*numbers, scale, grid.signed)


def _at(grid: Grid, rows: slice) -> Grid:
    if grid.channel_scale is None or grid.channel_scale.shape[0] == 1:
        return grid
    return grid._replace(channel_scale=grid.channel_scale[rows])


def _other_dim(scale: Tensor) -> int:
    """The dimension that a row or column of channel scales does not index."""
    return 1 if scale.shape[1] == 1 else 0


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest in memory; None where they lie in order already."""
    return None if x.is_contiguous() else sorted(range(x.dim()), key=lambda dim: -x.stride(dim))


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
    step = max(1, BLOCK_NUMEL * length // flat.numel()) if flat.device.type == "cpu" else length
    for start in range(0, length, step):
        yield slice(start, start + step)
