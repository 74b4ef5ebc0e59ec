"""One optimizer step of the joint stage: the base step, then redundant entries are forgotten, x <- x - gamma Q(x).

gamma and d are chosen per tensor, by the rules of `joint`, from sums over its redundant entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_geta.optim.joint import forget_rate, joint_step_size
from hf_geta.optim.redundant import RedundantEntries
from hf_geta.sharding import Shards

FORGOTTEN_SUMS = 5  # of every tensor that forgets

Bounds = tuple[Tensor, Tensor]  # (lower, upper) of every width, in bits, (quantizers,) each


def step_and_forget_(
    base: torch.optim.Optimizer, entries: RedundantEntries, bounds: Bounds, left_steps: int, shards: Shards
) -> None:
    """The base step; then x <- x - gamma (c + d r) on the entries, which are zero when no steps are left.

    Args:
        base: steps on all parameters.
        entries: what the period forgets.
        bounds: of the widths after this step.
        left_steps: of the period, this one included.
        shards: adds up what lies in pieces.
    """
    before, grids = entries.gather(), entries.grids()
    base.step()
    entries.widths.project_(*bounds)
    square = entries.squared_norms()
    sums = torch.zeros(FORGOTTEN_SUMS, entries.num_segments, device=square.device)
    sums[4] = square
    for chunk, values in zip(entries.chunks, before, strict=True):
        clipped, residual = chunk.split_quantized(values, grids)
        gradient = chunk.gather_gradients()
        step = chunk.gather() - values
        chunk.add_sums_(sums, gradient * step, gradient * clipped, gradient * residual, clipped.square())
    grad_step, grad_clipped, grad_residual, clipped_square, square = shards.sum_(sums)
    gamma = forget_rate(grad_step, grad_clipped, clipped_square.sqrt(), square.sqrt(), left_steps)
    gamma, step_size = _set_step_sizes_(entries, gamma, grad_step, grad_residual, bounds)
    for chunk, values in zip(entries.chunks, before, strict=True):
        clipped, residual = chunk.split_quantized(values, grids)
        chunk.subtract_(chunk.spread(gamma) * (clipped + chunk.spread(step_size) * residual))


def step_and_forget_blindly_(
    base: torch.optim.Optimizer, entries: RedundantEntries, bounds: Bounds, left_steps: int
) -> None:
    """The same without the joint rule: at a constant rate, which knows nothing of rounding and of the gradient."""
    base.step()
    entries.widths.project_(*bounds)
    for chunk in entries.chunks:
        chunk.subtract_(chunk.gather() / left_steps)


def _set_step_sizes_(
    entries: RedundantEntries, gamma: Tensor, grad_step: Tensor, grad_residual: Tensor, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """Apply `joint_step_size` to the tensors that are quantized; (gamma, d) per segment, d = 0 for the others."""
    segments, rows, widths = entries.quantized_segments, entries.quantizer_rows, entries.widths
    finest, coarsest = (bound[rows].exp() for bound in widths.step_size_bounds(*bounds))
    log_step_size = widths.log_step_size()
    quantized_gamma, quantized_step_size = joint_step_size(
        gamma[segments], log_step_size[rows].exp(), grad_step[segments], grad_residual[segments], finest, coarsest
    )
    log_step_size[rows] = quantized_step_size.log()
    widths.write_log_step_size_(log_step_size)
    widths.project_(*bounds)  # exp and log may have moved a bound by one ulp
    step_size = torch.zeros_like(gamma)
    gamma[segments], step_size[segments] = quantized_gamma, quantized_step_size
    return gamma, step_size
