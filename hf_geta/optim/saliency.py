"""Which groups matter least? Scores per group, and how they rank together. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_geta.optim.schedule import Schedule
from hf_geta.optim.space import PruningSpace
from hf_geta.sharding import local, local_gradient


def magnitude(space: PruningSpace) -> Tensor:
    """Root of the summed squares of a group's entries, (num_groups,)."""
    return space.sum_per_group(lambda p: local(p).float().square()).sqrt()


# What accumulates over steps, from a step's <x, g> per group; "magnitude" is taken at the decision instead.
OBSERVED: dict[str, Callable[[Tensor], Tensor]] = {"taylor": torch.abs, "fisher": torch.square}


# Steps whose scores a decision sees at least, if the run has had so many: a batch says little of a group.
REMEMBERED_STEPS = 64


def observed_kinds(kind: str) -> list[str]:
    """The kinds of scores that accumulate over steps for `saliency=kind`."""
    return [name for name in OBSERVED if kind in (name, "mix")]


def observe(first_order: Tensor, kinds: Sequence[str]) -> Tensor:
    """What one step adds to the scores of each kind, (kinds, num_groups)."""
    values = torch.stack([OBSERVED[kind](first_order) for kind in kinds])
    return values.nan_to_num(0.0, 0.0, 0.0)  # a batch that overflowed says nothing


def memory(schedule: Schedule) -> float:
    """What a decision leaves of the sums to the next one, in [0, 1): nothing where periods are long enough.

    Where decisions follow each other faster, sums that are multiplied by this number come to hold `REMEMBERED_STEPS`,
    weighted towards the present; what was seen before the first decision counts in full, and fades from then on.
    """
    return max(1 - schedule.joint_steps / schedule.pruning_periods / REMEMBERED_STEPS, 0.0)


def first_order(space: PruningSpace) -> Tensor:
    """<x, g> over a group's entries, (num_groups,): the loss that removing it takes away, to first order.

    "taylor" accumulates its absolute value over steps (Molchanov et al., CVPR 2019, eq. 8), "fisher" its square.
    """
    return space.sum_per_group(_value_times_gradient)


def _value_times_gradient(parameter: nn.Parameter) -> Tensor | None:
    gradient = local_gradient(parameter)
    return None if gradient is None else local(parameter).float() * gradient.float()


# How a score grows with the number of a group's entries where they are alike: a norm with its root.
GROWTH = {"magnitude": 0.5, "taylor": 1.0, "fisher": 1.0}


def mean_size_by_kind(entries: Tensor, kinds: Sequence[str], sizes: Sequence[int]) -> Tensor:
    """How many entries the groups of each group's kind have in the mean, (num_groups,).

    Args:
        entries: (num_groups,) how many each has.
        kinds, sizes: of the axes, in order.
    """
    kind_of_axis = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    owner = torch.tensor([kind_of_axis[kind] for kind in kinds], dtype=torch.int64, device=entries.device)
    owner = owner.repeat_interleave(torch.tensor(list(sizes), dtype=torch.int64, device=entries.device))
    total = entries.new_zeros(len(kind_of_axis)).index_add_(0, owner, entries)
    return (total / torch.bincount(owner, minlength=len(kind_of_axis)))[owner]


def mix(scores: Mapping[str, Tensor], weights: Mapping[str, float], kind_sizes: Tensor) -> Tensor:
    """The mean of several scores per entry, each divided by its mean, so that none counts more for its unit.

    Within a kind of axis groups rank by what they cost; across kinds by what an entry costs, since a head is as large
    as hundreds of hidden units.

    Args:
        scores: name -> (num_groups,).
        weights: name -> part of the mean, 0 or more; they need not add up to 1.
        kind_sizes: `mean_size_by_kind`.
    """
    total = sum(weights.values())
    parts = []
    for name, weight in weights.items():
        if weight > 0:
            part = scores[name] / kind_sizes ** GROWTH[name]
            parts.append(weight / total * part / part.mean().clamp_min(torch.finfo(part.dtype).tiny))
    return torch.stack(parts).sum(0)
