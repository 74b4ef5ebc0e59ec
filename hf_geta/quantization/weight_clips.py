"""Where a weight is clipped at a given width: where the layer's output errs least.

For a layer y = W x the expected squared error of an output i is about sum_j E[x_j^2] (W_ij - Q(W_ij))^2, because the
rounding errors of different entries are hardly correlated. So an entry counts by how large its input is. In language
models a few inputs are a hundred times larger than the rest: the weights that meet them must not be clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATIO_STEPS_PER_OCTAVE, RATIO_STEPS = 8, 24  # clips from max|w| down to an eighth of it, each 8 % below the last
PATIENCE_STEPS = 4  # without a better clip for any channel, before the search ends


@torch.no_grad()
def least_squares_clip(
    weight: Tensor, bits: float, channel_shape: tuple[int, ...] | None = None, importance: Tensor | None = None
) -> Tensor:
    """The q_m with the least sum of importance * (w - Q(w))^2 at `bits`, t = 1, among max|w| 2^(-k/8), k = 0 ... 24.

    Args:
        weight: any shape.
        channel_shape: (out, 1, ...) or (1, out) for one clip per channel; None for one in all.
        importance: not negative, broadcastable to `weight`: E[x_j^2] of what the entries meet. None: all alike.

    Returns:
        float32, of `channel_shape`, or (); 1 where all entries are zero.
    """
    weight = weight.detach().float()
    dims = [dim for dim, size in enumerate(channel_shape or (1,) * weight.ndim) if size == 1]
    levels = 2 ** (bits - 1) - 1
    top = weight.abs().amax(dims, keepdim=True)
    best_error, clip = torch.full_like(top, torch.inf), top
    since_better = 0
    for k in range(RATIO_STEPS + 1):
        candidate = top * 2 ** (-k / RATIO_STEPS_PER_OCTAVE)
        step_size = (candidate / levels).clamp(min=torch.finfo(torch.float32).tiny)
        error = (weight / step_size).round_().clamp_(-levels, levels).mul_(step_size).sub_(weight).square_()
        error = (error if importance is None else error.mul_(importance)).sum(dims, keepdim=True)
        better = error < best_error
        clip, best_error = torch.where(better, candidate, clip), torch.minimum(error, best_error)
        since_better = 0 if better.any() else since_better + 1
        if since_better == PATIENCE_STEPS:
            break
    clip = torch.where(top > 0, clip, 1.0)
    return clip if channel_shape is not None else clip.reshape(())
