"""From axes to the search space: which leaves are prunable, their members, names and kinds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from hf_geta.graph.axes import AxisNode, Reason, find, freeze, is_frozen, leaves, positions, tags
from hf_geta.graph.capture import transient_buffers
from hf_geta.graph.realizable import freeze_alone_unrealizable, freeze_unrealizable, names_in
from hf_geta.graph.rules.context import BATCHED, CONSUMED, CONVOLVED, LOOKED_UP, STACKED
from hf_geta.graph.walk import Walk
from hf_geta.quantization.quantizers import Quantizer

MAX_DISTANCE = 2  # of the modules of a leaf below the one that it is named after: attention -> self -> query
SUFFIXES = {
    "attention_head": "heads",
    "kv_group": "kv_groups",
    "mlp": "hidden",
    "channel": "channels",
    "expert_hidden": "expert_hidden",
    "embedding": "embedding",
}


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, and the entries that each entry of a leaf owns there."""

    tensor: str
    dim: int
    indices: Tensor  # int64 (leaf size, entries owned)


class SearchSpace:
    """The prunable leaves of a walked graph.

    Attributes:
        slots: leaf -> where it lies, for all leaves that touch parameters, frozen or not.
        free: the prunable leaves with name and kind, in the order of the model's parameters.
        equations: what int attributes must satisfy, over free leaves and attributes.
    """

    def __init__(self, walk: Walk, model: nn.Module) -> None:
        self._walk = walk
        ignored = set(quantizer_tensors(model))
        self.dims = {
            (name, dim): axis
            for name, axes in walk.tensors.items()
            if name not in ignored
            for dim, axis in enumerate(axes)
        }
        self._freeze_by_policy(set(transient_buffers(model)))
        self.equations = freeze_unrealizable(walk.axes.equations, walk.captured.attributes)
        self.slots: dict[AxisNode, list[Slot]] = {}
        for (name, dim), axis in self.dims.items():
            for leaf, indices in positions(axis).items():
                self.slots.setdefault(leaf, []).append(Slot(name, dim, indices))
        kinds = {leaf: self._kind(leaf) for leaf in self.slots if not is_frozen(leaf)}
        self.free = {leaf: (name, kinds[leaf]) for leaf, name in self._names(kinds).items()}

    def _freeze_by_policy(self, transient: Collection[str]) -> None:
        """Freeze what no operator forbids, but no pruned model could do."""
        owners = Counter(leaf for axis in self.dims.values() for leaf in set(leaves(axis)))
        for (name, _), axis in self.dims.items():
            for leaf in leaves(axis):
                if name in transient:
                    freeze(leaf, Reason(f"{name} is rebuilt by the model's code, not loaded"))
                if CONSUMED not in tags(leaf):
                    freeze(leaf, Reason("nothing sums over it with a weight"))
                if leaf.size == 1:
                    freeze(leaf, Reason("it has one entry"))
        for equation in self._walk.axes.equations:
            for part in names_in(equation):
                for leaf in leaves(part) if isinstance(part, AxisNode) else ():
                    if leaf not in owners:
                        freeze(leaf, Reason("no parameter has it"))
        self._freeze_head_sizes()
        self._freeze_rivals(owners)

    def _freeze_head_sizes(self) -> None:
        """Freeze an outer dimension of a product of two activations where a parameter has it beside the batched one."""
        beside: dict[AxisNode, set[AxisNode]] = {}
        for one in {one for axis in self.dims.values() for one in _products(axis)}:
            factors = [set(leaves(part)) for part in one.parts]
            for number, factor in enumerate(factors):
                for leaf in factor:
                    beside.setdefault(leaf, set()).update(*factors[:number], *factors[number + 1 :])
        for batch, outer in self._walk.axes.outer:
            heads = set(leaves(batch))
            for leaf in leaves(outer):
                if heads & beside.get(leaf, set()):
                    freeze(leaf, Reason("an outer dimension of a product over heads: the size of a head"))

    def _freeze_rivals(self, owners: Counter[AxisNode]) -> None:
        """In a product only one factor is pruned, or groups would overlap: the one in most tensors, else the outermost.

        What the integers of the forward cannot follow, such as a literal number of shards, is no rival.
        """
        products = list(dict.fromkeys(one for axis in self.dims.values() for one in _products(axis)))
        contested = dict.fromkeys(leaf for one in products for factor in _rivals(one) for leaf in factor)
        freeze_alone_unrealizable(contested, self._walk.axes.equations, self._walk.captured.attributes)
        for one in products:
            rivals = _rivals(one)
            best = max(rivals, key=lambda factor: max(owners[leaf] for leaf in factor), default=[])
            for factor in rivals:
                for leaf in factor:
                    if factor is not best or any(leaf in other for other in rivals if other is not factor):
                        freeze(leaf, Reason("it shares its entries with an axis of more tensors"))

    def _kind(self, leaf: AxisNode) -> str:
        noted = tags(leaf)
        if BATCHED in noted:
            for axis in self._walk.axes.heads:
                parts = [find(part) for part in find(axis).parts if find(axis).is_product]
                queries = [other for part in parts if part is not leaf for other in leaves(part)]
                if leaf in parts and any(0 < self._entries(one) < self._entries(leaf) for one in queries):
                    return "kv_group"
            return "attention_head"
        if CONVOLVED in noted:
            return "channel"
        if LOOKED_UP in noted:
            return "embedding"
        return "expert_hidden" if STACKED in noted else "mlp"

    def _entries(self, leaf: AxisNode) -> int:
        """How many entries of all dimensions belong to some entry of a leaf: keys have heads, but not their queries."""
        return sum(slot.indices.numel() for slot in self.slots.get(leaf, ()))

    def _names(self, kinds: dict[AxisNode, str]) -> dict[AxisNode, str]:
        """Unique names: the path that the modules of a leaf have in common if it is close, else the first module's."""
        modules = {leaf: [slot.tensor.split(".")[:-1] for slot in self.slots[leaf]] for leaf in kinds}
        near = {leaf: _join(_common_path(paths), kinds[leaf]) for leaf, paths in modules.items()}
        shared = Counter(near.values())
        names: dict[AxisNode, str] = {}
        for leaf, paths in modules.items():
            distance = max(map(len, paths)) - len(_common_path(paths))
            is_own = distance <= MAX_DISTANCE and shared[near[leaf]] == 1
            name = near[leaf] if is_own else _join(paths[0], kinds[leaf])
            taken = sum(other == name for other in names.values())
            names[leaf] = f"{name}.{taken}" if taken else name
        return names


def quantizer_tensors(model: nn.Module) -> Iterator[str]:
    """Tensors that are about rounding, not about the function: they follow their layer and are in no group."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            yield from (
                f"{path}.{name}" for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())
            )


def _products(axis: AxisNode) -> Iterator[AxisNode]:
    """The products that an axis is made of, inner ones first."""
    axis = find(axis)
    for part in axis.parts:
        yield from _products(part)
    if axis.parts and axis.is_product:
        yield axis


def _rivals(axis: AxisNode) -> list[list[AxisNode]]:
    """The free leaves of each factor of a product, where more than one has any."""
    free = [[leaf for leaf in leaves(part) if not is_frozen(leaf)] for part in axis.parts]
    rivals = [factor for factor in free if factor]
    return rivals if len(rivals) > 1 else []


def _join(path: list[str], kind: str) -> str:
    return ".".join((*path, SUFFIXES[kind]))


def _common_path(paths: list[list[str]]) -> list[str]:
    common = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return common
