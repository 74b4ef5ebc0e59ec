"""Which groups matter least? Scores per group, and how they rank together. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_geta.optim.space import PruningSpace


def magnitude(space: PruningSpace) -> Tensor:
    """Root of the summed squares of a group's entries, (num_groups,)."""
    return space.sum_per_group(lambda p: p.detach().float().square()).sqrt()


def first_order(space: PruningSpace) -> Tensor:
    """<x, g> over a group's entries, (num_groups,): the loss that removing it takes away, to first order.

    "taylor" accumulates its absolute value over steps (Molchanov et al., CVPR 2019, eq. 8), "fisher" its square.
    """
    return space.sum_per_group(lambda p: None if p.grad is None else p.detach().float() * p.grad.float())


def normalize_by_kind(scores: Tensor, kinds: Sequence[str], sizes: Sequence[int]) -> Tensor:
    """Divide every score by the mean score of its kind, so that heads, hidden units and channels rank together."""
    kind_of_axis = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    owner = torch.tensor([kind_of_axis[kind] for kind in kinds], dtype=torch.int64, device=scores.device)
    owner = owner.repeat_interleave(torch.tensor(list(sizes), dtype=torch.int64, device=scores.device))
    total = scores.new_zeros(len(kind_of_axis)).index_add_(0, owner, scores)
    mean = total / torch.bincount(owner, minlength=len(kind_of_axis))
    return scores / mean.clamp_min(torch.finfo(scores.dtype).tiny)[owner]


def removable_groups(size: int, min_groups: int, divisible: int) -> list[int]:
    """Sizes of the blocks in which an axis of `size` groups may shrink, in order.

    With `divisible` m > 1 the first block takes `size` to a multiple of m and each later one takes m more; axes of
    at most m groups (heads, mostly) lose one at a time. `min_groups` always stay.
    """
    block = divisible if size > divisible else 1
    blocks: list[int] = []
    left = size
    while True:
        step = left % block or block
        if left - step < max(min_groups, 1):
            return blocks
        blocks.append(step)
        left -= step
