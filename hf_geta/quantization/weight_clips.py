"""Where a weight is clipped at a given width: where the layer's output errs least.

For a layer y = W x the expected squared error of an output i is about sum_j E[x_j^2] (W_ij - Q(W_ij))^2, because the
rounding errors of different entries are hardly correlated. So an entry counts by how large its input is. In language
models a few inputs are a hundred times larger than the rest: the weights that meet them must not be clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS_PER_OCTAVE, OCTAVES = 8, 4  # clips from max|w| down to a sixteenth of it, each 8 % below the last
COARSE_STEPS = 4  # from clip to clip in the first round; the second one looks at all between


@torch.no_grad()
def least_squares_clip(
    weight: Tensor, bits: float, channel_shape: tuple[int, ...] | None = None, importance: Tensor | None = None
) -> Tensor:
    """The q_m with about the least sum of importance * (w - Q(w))^2 at `bits`, t = 1, down to a sixteenth of max|w|.

    Of max|w| 2^(-k/8), first every fourth, then, channel by channel, those around the best: the error may rise before
    it falls, where one weight is far larger than all others.

    Args:
        weight: any shape.
        channel_shape: (out, 1, ...) or (1, out) for one clip per channel; None for one in all.
        importance: not negative, broadcastable to `weight`: E[x_j^2] of what the entries meet. None: all alike.

    Returns:
        float32, of `channel_shape`, or (); 1 where all entries are zero.
    """
    weight = weight.detach().float()
    dims = [dim for dim, size in enumerate(channel_shape or (1,) * weight.ndim) if size == 1]
    top = weight.abs().amax(dims, keepdim=True)

    def error_of(clip: Tensor) -> Tensor:
        return rounding_error(weight, clip, bits, importance).sum(dims, keepdim=True)

    steps = range(0, STEPS_PER_OCTAVE * OCTAVES + 1, COARSE_STEPS)
    coarse, _ = best_of([top * 2 ** (-step / STEPS_PER_OCTAVE) for step in steps], error_of)
    steps = range(1 - COARSE_STEPS, COARSE_STEPS)
    clip, _ = best_of([(coarse * 2 ** (-step / STEPS_PER_OCTAVE)).minimum(top) for step in steps], error_of)
    clip = torch.where(top > 0, clip, 1.0)
    return clip if channel_shape is not None else clip.reshape(())


def rounding_error(weight: Tensor, clip: Tensor, bits: float, importance: Tensor | None = None) -> Tensor:
    """importance * (w - Q(w))^2 at `bits` and t = 1, in the shape of `weight`, float32; arguments are not changed.

    Args:
        clip: q_m, broadcastable to `weight`.
    """
    levels = 2 ** (bits - 1) - 1
    step_size = (clip / levels).clamp(min=torch.finfo(torch.float32).tiny)
    error = (weight / step_size).round_().clamp_(-levels, levels).mul_(step_size).sub_(weight).square_()
    return error if importance is None else error.mul_(importance)


def best_of(candidates: Sequence[Tensor], error_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of the candidates, entry by entry, the first with the least error, and that error."""
    first, *others = candidates
    best, least = first, error_of(first)
    for candidate in others:
        error = error_of(candidate)
        best, least = candidate.where(error < least, best), error.minimum(least)
    return best, least
