"""The search space as index tensors: which entries of which parameters every group owns.

The QADG says it per axis in words (tensor names); the optimizer wants it per parameter in numbers, so that a rule
is a few tensor expressions over all groups at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_geta.graph.qadg import Axis
from hf_geta.graph.uniform import Family
from hf_geta.optim.lockstep import Lockstep
from hf_geta.sharding import Shards, is_cut, local, local_range


@dataclasses.dataclass
class GroupedDim:
    """One dimension of one parameter and the group that owns each of its entries.

    Attributes:
        parameter: position in `PruningSpace.parameters`.
        dim: the dimension.
        group_ids: (shape[dim],) int64, -1 where no group owns the entry.
        here: the entries along `dim` that this process holds.
    """

    parameter: int
    dim: int
    group_ids: Tensor
    here: slice

    @property
    def local_ids(self) -> Tensor:
        """The owners of the entries that this process holds."""
        return self.group_ids[self.here]


@dataclasses.dataclass
class Entries:
    """Chosen entries of the parameters, gathered side by side.

    Attributes:
        parameters: positions in `PruningSpace.parameters`, one per segment: of all that have such entries somewhere.
        indices: flat indices into the part of each of those parameters that this process holds; int32 where they fit.
    """

    parameters: list[int]
    indices: list[Tensor]


class PruningSpace:
    """All pruning groups of a model, numbered 0 .. num_groups - 1, axis after axis.

    Args:
        axes: the prunable axes of a QADG.
        parameters: name -> parameter; members of other tensors (running statistics, quantizers) are left out, for
            they play no part in what a group computes once its weights are zero. Whole, or all of them in pieces.
        families: of the axes that shrink in lockstep; by default each axis shrinks by itself.

    Raises:
        ValueError: if some of the parameters lie in pieces and others do not.
    """

    def __init__(
        self, axes: Sequence[Axis], parameters: Mapping[str, nn.Parameter], families: Sequence[Family] | None = None
    ) -> None:
        self.families = families
        self.axis_names = [axis.name for axis in axes]
        self.axis_kinds = [axis.kind for axis in axes]
        self.axis_sizes = [axis.size for axis in axes]
        self.num_groups = sum(self.axis_sizes)
        self.parameters: list[nn.Parameter] = []
        self.parameter_names: list[str] = []
        known: dict[tuple[int, int], GroupedDim] = {}
        positions: dict[int, int] = {}  # id of a parameter -> where it is in `parameters`
        offset = 0
        for axis in axes:
            for member in axis.members:
                if member.tensor not in parameters:
                    continue
                parameter = parameters[member.tensor]
                position = positions.setdefault(id(parameter), len(self.parameters))
                if position == len(self.parameters):
                    self.parameters.append(parameter)
                    self.parameter_names.append(member.tensor)
                if (position, member.dim) not in known:
                    known[position, member.dim] = _no_owners(position, parameter, member.dim)
                groups = torch.arange(offset, offset + axis.size).repeat_interleave(member.indices.shape[1])
                known[position, member.dim].group_ids[member.indices.reshape(-1)] = groups
            offset += axis.size
        self.dims = sorted(known.values(), key=lambda grouped: grouped.parameter)
        self.shards = Shards(self.parameters)
        named = zip(self.parameter_names, self.parameters, strict=True)
        if self.shards.are_several and (left := [name for name, parameter in named if not is_cut(parameter)]):
            raise ValueError(
                f"{', '.join(left)} lie whole on every process, other parameters in pieces: cut all but "
                "quantizer_parameters(model), by fully_shard(model, ignored_params=quantizer_parameters(model))."
            )

    def lockstep(self, min_groups: int, divisible: int) -> list[Lockstep]:
        """The families in numbers of axes, with the blocks in which they may shrink."""
        if self.families is None:
            return [Lockstep.of([axis], size, min_groups, divisible) for axis, size in enumerate(self.axis_sizes)]
        numbers = {name: number for number, name in enumerate(self.axis_names)}
        return [
            Lockstep.of([numbers[name] for name in family.axes], family.sizes[-1], min_groups, divisible, family.sizes)
            for family in self.families
        ]

    def to(self, device: torch.device) -> None:
        """Move the index tensors to `device`."""
        for grouped in self.dims:
            grouped.group_ids = grouped.group_ids.to(device)

    def owned_positions(self, groups: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """(parameter, dim, positions) of everything that the groups flagged in `groups` (num_groups,) bool own here."""
        owned = []
        flags = torch.cat([groups, groups.new_zeros(1)])  # -1 reads the added False
        for grouped in self.dims:
            positions = flags[grouped.local_ids].nonzero().squeeze(1)
            if len(positions):
                owned.append((local(self.parameters[grouped.parameter]), grouped.dim, positions))
        return owned

    def entries_per_group(self) -> Tensor:
        """How many entries of parameters each group has, (num_groups,) float32; a shared one counts for both."""
        total = torch.zeros(self.num_groups + 1, device=self.dims[0].group_ids.device if self.dims else None)
        for grouped in self.dims:
            shape = self.parameters[grouped.parameter].shape
            size = math.prod(shape) / shape[grouped.dim]
            ids = grouped.group_ids % (self.num_groups + 1)
            total.index_add_(0, ids, torch.full(ids.shape, size, device=ids.device))
        return total[:-1]

    def flags_along_dims(self, groups: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(position in `parameters`, dim, (size,) bool): which entries of each dimension the flagged groups own."""
        flags = torch.cat([groups, groups.new_zeros(1)])  # -1 reads the added False
        for grouped in self.dims:
            yield grouped.parameter, grouped.dim, flags[grouped.group_ids]

    def entries(self, groups: Tensor) -> Entries:
        """Every entry of every parameter that belongs to a flagged group, each once."""
        masks: dict[int, Tensor] = {}
        kept: dict[int, bool] = {}
        flags = torch.cat([groups, groups.new_zeros(1)])
        for grouped in self.dims:
            position, tensor = grouped.parameter, local(self.parameters[grouped.parameter])
            shape = [1] * tensor.dim()
            shape[grouped.dim] = -1
            mask = flags[grouped.local_ids].view(shape).expand(tensor.shape)
            masks[position] = mask | masks[position] if position in masks else mask
            kept[position] = kept.get(position, False) or bool(flags[grouped.group_ids].any())
        indices = {i: _positions(mask) for i, mask in masks.items() if kept[i]}
        return Entries(list(indices), list(indices.values()))

    def sum_per_group(self, value_of: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
        """Sums over each group's entries of what `value_of` makes of every parameter, (num_groups,) float32.

        `value_of` returns a tensor shaped like the part of the parameter that is here, or None where it has none; one
        at a time is held. An entry that two groups share (a weight between two prunable axes) counts for both. Where
        parameters lie in pieces, the sums over the pieces are one message.
        """
        sums, ids = [], []
        for position, dims in itertools.groupby(self.dims, key=lambda grouped: grouped.parameter):
            value = value_of(self.parameters[position])
            if value is None:
                continue
            for grouped in dims:
                others = [d for d in range(value.dim()) if d != grouped.dim]
                sums.append(value.sum(dim=others).float() if others else value.float())
                ids.append(grouped.local_ids)
        device = self.dims[0].group_ids.device if self.dims else None
        total = torch.zeros(self.num_groups + 1, device=device)  # the last slot collects what no group owns
        if sums:
            total.index_add_(0, torch.cat(ids) % (self.num_groups + 1), torch.cat(sums))
        return self.shards.sum_(total)[:-1]


def _no_owners(position: int, parameter: nn.Parameter, dim: int) -> GroupedDim:
    ids = torch.full((parameter.shape[dim],), -1, dtype=torch.int64)
    return GroupedDim(position, dim, ids, local_range(parameter, dim))


def _positions(mask: Tensor) -> Tensor:
    """The flat indices of what is set, which are held for a whole period: int32 where they fit."""
    found = mask.reshape(-1).nonzero().squeeze(1)
    return found.int() if mask.numel() <= torch.iinfo(torch.int32).max else found
