"""The joint stage's arithmetic: how fast redundant entries are forgotten, and at which step size. Pure.

Over the redundant entries of one tensor write Q(x) = c + d r, with c = sgn(x) min(|x|, q_m)^t and
r = sgn(x) (round(|c| / d) - |c| / d). With g the gradient and s the base optimizer's step, an update
s - gamma (c + d r) descends to first order when

    <g, s> - gamma <g, c> - gamma d <g, r> < 0.

The two functions choose gamma and then d so that it does wherever s alone descends, <g, s> < 0, tensor by tensor (GETA,
Sec. 5.3 and Prop. 5.1; the choice per tensor is ours). All arguments are vectors with one entry per tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ETA = 0.999  # share of |<g, s>| that the step size may spend
XI = 0.9  # distance kept from the bound
BETA = 0.8  # gamma's factor while the step size is below its range
NEGLIGIBLE = 1e-8  # norm of c, relative to the tensor's, under which it is taken as gone


def forget_rate(grad_step: Tensor, grad_clipped: Tensor, clipped_norm: Tensor, norm: Tensor, left_steps: int) -> Tensor:
    """gamma = 1 / (D - k), or less where forgetting would ascend: (1 - eta) |<g, s>| / |<g, c>| if <g, c> < 0.

    Args:
        grad_step: <g, s>.
        grad_clipped: <g, c>.
        clipped_norm: |c|; the sign of its mean, which the authors' code tests, is a coin flip.
        norm: |x| of the whole tensor.
        left_steps: D - k, steps left in the period, this one included.
    """
    uniform = 1.0 / left_steps
    careful = ((1 - ETA) * grad_step.abs() / grad_clipped.abs()).clamp(max=uniform)
    ascends = (grad_clipped < 0) & (clipped_norm > NEGLIGIBLE * norm)
    return torch.where(ascends, careful, uniform)


def joint_step_size(
    gamma: Tensor, step_size: Tensor, grad_step: Tensor, grad_residual: Tensor, finest: Tensor, coarsest: Tensor
) -> tuple[Tensor, Tensor]:
    """(gamma, d): the step size that keeps the update a descent, inside its range.

    Where <g, r> >= 0 or gamma = 0 the present d serves. Else d <= xi eta |<g, s>| / (gamma |<g, r>|); while that
    bound lies below the finest step size d(b_u), gamma shrinks by beta and the bound grows by 1 / beta. A present d
    under the bound stays: the inequality asks for no more, and coarsening it costs accuracy for nothing.

    Args:
        gamma: from `forget_rate`.
        step_size: the present d, inside [finest, coarsest].
        grad_step: <g, s>.
        grad_residual: <g, r>.
        finest: d(b_u).
        coarsest: d(b_l).
    """
    binding = (grad_residual < 0) & (gamma > 0)
    bound = XI * ETA * grad_step.abs() / (gamma * grad_residual.abs())
    bound = bound.where(binding, coarsest)
    shrinks = ((finest / bound).log() / -math.log(BETA)).ceil().clamp(min=0)
    factor = BETA**shrinks
    gamma = gamma * factor  # 0 where <g, s> = 0: no descent to share, nothing is forgotten in this step
    bound = (bound / factor).where(gamma > 0, coarsest)
    return gamma, step_size.minimum(bound).clamp(min=finest, max=coarsest)
