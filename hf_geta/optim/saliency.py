"""Which groups matter least? Scores per group and the choice among them. Pure."""

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


def choose_least_salient(
    scores: Tensor, removed: Tensor, count: int, sizes: Sequence[int], min_groups: int = 1, divisible: int = 1
) -> Tensor:
    """Flags of the groups to remove next: the least salient, until `count` are gone in all.

    Args:
        scores: (num_groups,) saliency.
        removed: (num_groups,) bool, the groups that are gone already.
        count: groups gone afterwards, those in `removed` included. With `divisible` > 1 whole blocks go, so the
            result may stay up to one block short of it.
        sizes: groups per axis.

    Returns:
        (num_groups,) bool on the CPU, disjoint from `removed`. Ties go to the lower group number.
    """
    scores, removed = scores.detach().double().cpu(), removed.cpu()
    blocks: list[tuple[float, int, list[int]]] = []  # (mean score, first group, groups)
    offset = 0
    for size in sizes:
        gone = removed[offset : offset + size]
        alive = (~gone).nonzero().squeeze(1) + offset
        order = alive[torch.argsort(scores[alive], stable=True)]
        shrinks = removable_groups(size, min_groups, divisible)
        start, skip = 0, int(gone.sum())
        for block in shrinks:
            if skip >= block:  # removed in an earlier period
                skip -= block
                continue
            groups = order[start : start + block].tolist()
            blocks.append((float(scores[groups].mean()), groups[0], groups))
            start += block
        offset += size
    chosen = torch.zeros_like(removed)
    left = count - int(removed.sum())
    for _, _, groups in sorted(blocks, key=lambda block: block[:2]):
        if len(groups) > left:
            if divisible == 1:
                break
            continue
        chosen[groups] = True
        left -= len(groups)
    return chosen
