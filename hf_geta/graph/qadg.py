"""QADG: the quantization-aware dependency graph, reduced to what pruning needs to know of a model.

The search space G of GETA (Qu et al., CVPR 2025, arXiv 2502.16638, Sec. 4: QADG): prunable axes and, for every entry of
an axis, the slices of all parameters that go with it. Removing those slices, and zeroing them, give the same function.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.checkpoint.manifest import Manifest, read_manifest, write_manifest_
from hf_geta.checkpoint.names import save_as_they_are_
from hf_geta.checkpoint.prune import set_attributes_, slice_
from hf_geta.graph.capture import forget_wrappers_
from hf_geta.graph.integers import Attribute, Equation, substitute
from hf_geta.graph.search_space import quantizer_tensors
from hf_geta.graph.solving import solve
from hf_geta.graph.tracing import named_tensors
from hf_geta.sharding import Shards, local, local_range

logger = logging.getLogger(__name__)

Removed = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Member:
    """What an axis owns of one tensor: its entry i owns `indices[i]` along `dim`; indices are int64 (size, k)."""

    tensor: str
    dim: int
    indices: Tensor


@dataclass(frozen=True)
class Axis:
    """A prunable axis: `size` pruning groups, one per entry. `kind` says what an entry is, such as "attention_head"."""

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Operation:
    """Multiply-accumulates of one operator, of the whole model before pruning and for one forward of the inputs.

    `axes` names the prunable axes whose sizes multiply `macs`; `weight` is None for a product of two activations. A
    layer whose output concatenates different axes comes as several operations.
    """

    name: str
    weight: str | None
    macs: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Frozen:
    """Dimensions ("tensor[dim]") that cannot be pruned: why, and which operator in which module says so."""

    reason: str
    operator: str
    module: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class QADG:
    """The search space of a model, in names and index tensors only: it can be pickled and copied.

    Attributes:
        axes: the prunable axes, in the order of the model's parameters.
        frozen: what is not prunable, and why.
        operations: what the forward computes, for cost models.
        equations: what int attributes of modules must satisfy when axes shrink.
        attributes: the value of each of these attributes before pruning.
        can_be_cut: whether the model without a group is a smaller model; False for a space written by hand, whose
            groups can only be zeroed.
        bypassed: modules whose `weight` the forward reads without calling them: what they do to it does not happen.
    """

    axes: tuple[Axis, ...]
    frozen: tuple[Frozen, ...]
    operations: tuple[Operation, ...]
    equations: tuple[Equation, ...]
    attributes: dict[Attribute, int]
    can_be_cut: bool = True
    bypassed: tuple[str, ...] = ()

    @torch.no_grad()
    def zero_(self, model: nn.Module, removed: Removed) -> None:
        """Set all parameter entries that the removed groups own to zero, in place.

        Args:
            model: the model, or one with the same tensors (with quantizers swapped in).
            removed: axis name -> indices of the groups to remove.

        Raises:
            ValueError: for an unknown axis, an index out of range, or an axis of which nothing would be left.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, dims in self._owned(removed).items():
            for dim, indices in dims.items() if name in parameters else ():
                parameters[name].index_fill_(dim, indices.to(parameters[name].device), 0)
        _forget_caches_(model)

    @torch.no_grad()
    def zero_groups(self, model: nn.Module) -> dict[str, list[int]]:
        """The groups whose parameter entries are all exactly zero, as `zero_` and `prune` take them."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        counts = [torch.zeros(axis.size, dtype=torch.int64) for axis in self.axes]  # of lines that are not zero
        for axis, count in zip(self.axes, counts, strict=True):
            for member in axis.members:
                if (parameter := parameters.get(member.tensor)) is not None:
                    count += _lines_with_values(parameter, member.dim)[member.indices].sum(1)
        if not counts:
            return {}
        shards = Shards(parameters.values())
        total = shards.sum_(torch.cat(counts).to(shards.device)).cpu()
        parts = zip(self.axes, total.split([axis.size for axis in self.axes]), strict=True)
        return {axis.name: (part == 0).nonzero().flatten().tolist() for axis, part in parts if (part == 0).any()}

    def prune(self, model: nn.Module, removed: Removed) -> nn.Module:
        """A physically smaller copy of `model` without the removed groups; `model` is left alone.

        The copy computes what `model` computes after `zero_`. Int attributes that have to follow are set, and its
        config says what changed, so that `save_pretrained` and `from_pretrained` work (with hf_geta imported). Groups
        that cannot be cut are zero in it instead.

        Args:
            model: the model, or one with the same tensors (with quantizers swapped in).
            removed: axis name -> indices of the groups to remove.

        Raises:
            ValueError: for an unknown axis, an index out of range, or an axis of which nothing would be left.
        """
        small = copy.deepcopy(model)
        forget_wrappers_(small)
        if self.can_be_cut:
            self.prune_and_describe_(small, removed)
        else:
            self.zero_(small, removed)
        return small

    def prune_and_describe_(self, model: nn.Module, removed: Removed) -> None:
        """`prune_`, and say in the config of `model` how it differs from what the config builds."""
        before = {name: tensor.shape for name, tensor in named_tensors(model).items()}
        attributes = self.prune_(model, removed)
        if hasattr(model, "config"):
            _describe_(model, before, attributes)

    def prune_(self, model: nn.Module, removed: Removed) -> dict[str, int]:
        """Cut the removed groups out of `model` itself, whose config then no longer builds it.

        Args:
            model, removed: as for `prune`.

        Returns:
            The int attributes that had to follow, by path.

        Raises:
            ValueError: as for `prune`.
        """
        _forget_caches_(model)
        slice_(model, self.kept(model, removed))
        attributes = {
            path: value for path, value in self.attributes_after(removed).items() if _read(model, path) != value
        }
        set_attributes_(model, attributes)
        return attributes

    def kept(self, model: nn.Module, removed: Removed) -> dict[str, dict[int, Tensor]]:
        """What is left of the tensors that lose something: name -> dimension -> indices, int64."""
        tensors = named_tensors(model)
        keep: dict[str, dict[int, Tensor]] = {}
        for name, dims in self._owned(removed).items():
            for dim, indices in dims.items():
                kept = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                kept[indices] = False
                keep.setdefault(name, {})[dim] = kept.nonzero().flatten()
        return keep

    def attributes_after(self, removed: Removed) -> dict[str, int]:
        """The int attributes that depend on sizes, by path, once the groups in `removed` are gone."""
        sizes = {axis.name: axis.size - len(set(removed.get(axis.name, ()))) for axis in self.axes}
        return {attribute.path: value for attribute, value in solve(self.equations, sizes, self.attributes).items()}

    def without(self, reasons: Mapping[str, str]) -> QADG:
        """The search space with some of its axes frozen: axis name -> why."""
        sizes: dict[Any, int] = {axis.name: axis.size for axis in self.axes if axis.name in reasons}
        equations = (
            equation._replace(
                left=substitute(equation.left, lambda leaf: sizes.get(leaf, leaf)),
                right=substitute(equation.right, lambda leaf: sizes.get(leaf, leaf)),
            )
            for equation in self.equations
        )
        frozen = tuple(
            Frozen(reasons[axis.name], "", "", tuple(f"{member.tensor}[{member.dim}]" for member in axis.members))
            for axis in self.axes
            if axis.name in reasons
        )
        return replace(
            self,
            axes=tuple(axis for axis in self.axes if axis.name not in reasons),
            frozen=self.frozen + frozen,
            operations=tuple(
                replace(one, axes=tuple(name for name in one.axes if name not in reasons)) for one in self.operations
            ),
            equations=tuple(one for one in equations if one.left != one.right),
        )

    def explain(self, name: str) -> str:
        """What is known about an axis, or about each dimension of a parameter or buffer, in words.

        Raises:
            ValueError: for a name that is neither.
        """
        lines = []
        for axis in self.axes:
            for member in axis.members:
                owned = f"{member.indices.shape[1]} entries per group"
                if axis.name == name:
                    lines.append(f"  {member.tensor}[{member.dim}]: {owned}")
                elif member.tensor == name:
                    lines.append(f"  dimension {member.dim}: {axis.name}, {axis.kind}, {axis.size} groups, {owned}")
        for frozen in self.frozen:
            for dimension in frozen.dimensions:
                if dimension.rpartition("[")[0] == name:
                    where = " in ".join(filter(None, (frozen.operator, frozen.module)))
                    why = ": ".join(filter(None, (frozen.reason, where)))
                    lines.append(f"  dimension {dimension.rpartition('[')[2][:-1]}: frozen, {why}")
        if not lines:
            raise ValueError(f"{name!r} is no axis and no tensor of the forward; the axes are {self._names()}.")
        return "\n".join([name, *sorted(lines)])

    def explain_frozen(self) -> str:
        """Which operators froze how many dimensions, and why, in one paragraph."""
        counts: Counter[str] = Counter()
        for frozen in self.frozen:
            operator = f" by {frozen.operator}" if frozen.operator else ""
            counts[f"{frozen.reason}{operator}"] += len(frozen.dimensions)
        if not counts:
            return "Nothing is frozen."
        return "Frozen dimensions: " + "; ".join(f"{count} {why}" for why, count in counts.most_common()) + "."

    def __str__(self) -> str:
        rows = [("axis", "kind", "groups", "entries/group", "tensors")]
        for axis in self.axes:
            entries = sum(member.indices.shape[1] for member in axis.members)
            rows.append((axis.name, axis.kind, str(axis.size), str(entries), str(len(axis.members))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = sum(axis.size for axis in self.axes)
        return "\n".join([*lines, f"{total} groups on {len(self.axes)} axes. {self.explain_frozen()}"])

    def _names(self) -> str:
        return ", ".join(axis.name for axis in self.axes) or "none"

    def _owned(self, removed: Removed) -> dict[str, dict[int, Tensor]]:
        """Tensor name -> dimension -> the flat indices that the removed groups own."""
        axes = {axis.name: axis for axis in self.axes}
        owned: dict[str, dict[int, list[Tensor]]] = {}
        for name, groups in removed.items():
            if name not in axes:
                raise ValueError(f"{name!r} is no prunable axis; the axes are {self._names()}.")
            axis = axes[name]
            indices = sorted({operator.index(group) for group in groups})
            if indices and not 0 <= indices[0] <= indices[-1] < axis.size:
                raise ValueError(f"{name} has groups 0 to {axis.size - 1}, not {indices}.")
            if len(indices) == axis.size:
                raise ValueError(f"{name}: all {axis.size} groups would go; keep at least one.")
            for member in axis.members if indices else ():
                slices = owned.setdefault(member.tensor, {}).setdefault(member.dim, [])
                slices.append(member.indices[indices].flatten())
        return {name: {dim: torch.cat(parts) for dim, parts in dims.items()} for name, dims in owned.items()}


def _describe_(small: nn.Module, before: Mapping[str, Sequence[int]], attributes: dict[str, int]) -> None:
    """Say in the config of `small` how it differs from what the config builds."""
    manifest = read_manifest(small)
    ignored = set(quantizer_tensors(small))
    changed = {
        name: tuple(tensor.shape)
        for name, tensor in named_tensors(small).items()
        if name not in ignored and tensor.shape != before[name]
    }
    shapes, values = {**manifest.shapes, **changed}, {**manifest.attributes, **attributes}
    described = replace(manifest, shapes=shapes, attributes=values)
    if described != Manifest():  # else it is what its config builds
        write_manifest_(small, described)
    save_as_they_are_(small, shapes)


def _lines_with_values(parameter: Tensor, dim: int) -> Tensor:
    """Which entries along `dim` have a value other than zero here, (shape[dim],) bool on the CPU."""
    lines = local(parameter).transpose(0, dim).flatten(1) if parameter.dim() > 1 else local(parameter).unsqueeze(1)
    found = torch.zeros(parameter.shape[dim], dtype=torch.bool)
    found[local_range(parameter, dim)] = (lines != 0).any(1).cpu()
    return found


def _forget_caches_(model: nn.Module) -> None:
    """Drop what a model computed from its weights for evaluation: models do so themselves on entering train mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def _read(model: nn.Module, path: str) -> Any:
    owner: Any = model
    for step in path.split("."):
        owner = getattr(owner, step)
    return owner
