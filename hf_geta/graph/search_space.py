"""From axes to the search space: which leaves are prunable, their members, names and kinds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_geta.checkpoint.models import classes_by_config
from hf_geta.checkpoint.prune import stated_sizes
from hf_geta.config_checks import OPTIONAL_AXES
from hf_geta.graph.axes import AxisNode, Reason, find, freeze, is_frozen, leaves, positions, tag, tags, unify
from hf_geta.graph.capture import transient_buffers
from hf_geta.graph.folding import common_path
from hf_geta.graph.integers import Attribute, Equation
from hf_geta.graph.realizable import freeze_alone_unrealizable, freeze_unrealizable
from hf_geta.graph.rules.context import BATCHED, CONSUMED, CONVOLVED, LOOKED_UP, STACKED
from hf_geta.graph.solving import names_in
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
    "query_head": "query_heads",
    "head_dim": "head_dim",
}
HEAD_SIZE = "the size of a head"  # a tag


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

    def __init__(self, walk: Walk, model: nn.Module, optional: Collection[str] = ()) -> None:
        if unknown := set(optional) - set(OPTIONAL_AXES):
            raise ValueError(f"optional={sorted(unknown)}: optional axes are {', '.join(OPTIONAL_AXES)}.")
        self._walk = walk
        self._optional = optional
        ignored = set(quantizer_tensors(model))
        self.dims = {
            (name, dim): axis
            for name, axes in walk.tensors.items()
            if name not in ignored
            for dim, axis in enumerate(axes)
        }
        walk.axes.equations += _equations_of_layers(walk, model)
        self._freeze_by_policy(model)
        self.equations = freeze_unrealizable(walk.axes.equations, walk.captured.attributes)
        self.slots: dict[AxisNode, list[Slot]] = {}
        for (name, dim), axis in self.dims.items():
            for leaf, indices in positions(axis).items():
                self.slots.setdefault(leaf, []).append(Slot(name, dim, indices))
        kinds = {leaf: self._kind(leaf) for leaf in self.slots if not is_frozen(leaf)}
        self.free = {leaf: (name, kinds[leaf]) for leaf, name in self._names(kinds).items()}

    def _freeze_by_policy(self, model: nn.Module) -> None:
        """Freeze what no operator forbids, but no pruned model could do, or nobody asked for."""
        self._settle_head_sizes()
        transient = set(transient_buffers(model))
        replaced = tuple(f"{path}." for path in _replaced_modules(self._walk.captured.classes, model))
        owners = Counter(leaf for axis in self.dims.values() for leaf in set(leaves(axis)))
        for (name, _), axis in self.dims.items():
            for leaf in leaves(axis):
                if name in transient:
                    freeze(leaf, Reason(f"{name} is rebuilt by the model's code, not loaded"))
                if not tags(leaf) & {CONSUMED, HEAD_SIZE}:
                    freeze(leaf, Reason("nothing sums over it with a weight"))
                if name.startswith(replaced):
                    freeze(leaf, Reason("the forward puts another module in place, at the size that the config says"))
                if leaf.size == 1:
                    freeze(leaf, Reason("it has one entry"))
        for equation in self._walk.axes.equations:
            for part in names_in(equation):
                for leaf in leaves(part) if isinstance(part, AxisNode) else ():
                    if leaf not in owners:
                        freeze(leaf, Reason("no parameter has it"))
        self._freeze_rivals(owners)

    def _settle_head_sizes(self) -> None:
        """Freeze sizes of heads, if not asked for: what products of activations sum over, or have beside their heads.

        An outer dimension of such a product is one where a parameter has it beside the batched one.
        """
        beside: dict[AxisNode, set[AxisNode]] = {}
        for one in {one for axis in self.dims.values() for one in _products(axis)}:
            factors = [set(leaves(part)) for part in one.parts]
            for number, factor in enumerate(factors):
                for leaf in factor:
                    beside.setdefault(leaf, set()).update(*factors[:number], *factors[number + 1 :])
        sizes = [(leaf, reason) for axis, reason in self._walk.axes.summed for leaf in leaves(axis)]
        for batch, outer, reason in self._walk.axes.outer:
            heads = set(leaves(batch))
            sizes += [(leaf, reason) for leaf in leaves(outer) if heads & beside.get(leaf, set())]
        for leaf, reason in sizes:
            if "head_dim" in self._optional:
                tag(leaf, HEAD_SIZE)
            else:
                freeze(leaf, reason)
        self._tie_head_sizes()

    def _tie_head_sizes(self) -> None:
        """Queries and values of a head are different axes; where one attribute states both sizes, they go together."""
        stated: dict[Attribute, AxisNode] = {}
        for attribute, axis, *_ in self._walk.axes.equations:
            if not isinstance(attribute, Attribute) or not isinstance(axis, AxisNode):
                continue
            if HEAD_SIZE in tags(axis) and not find(axis).parts:
                unify(stated.setdefault(attribute, axis), axis)

    def _freeze_rivals(self, owners: Counter[AxisNode]) -> None:
        """In a product only one factor is pruned, or groups would overlap: by `_preference`, else the outermost.

        What the integers of the forward cannot follow, such as a literal number of shards, is no rival.
        """
        products = list(dict.fromkeys(one for axis in self.dims.values() for one in _products(axis)))
        contested = dict.fromkeys(leaf for one in products for factor in _rivals(one) for leaf in factor)
        freeze_alone_unrealizable(contested, self._walk.axes.equations, self._walk.captured.attributes)
        for one in products:
            rivals = _rivals(one)
            best = max(rivals, key=lambda factor: max(self._preference(leaf, owners) for leaf in factor), default=[])
            for factor in rivals:
                for leaf in factor:
                    if factor is not best or any(leaf in other for other in rivals if other is not factor):
                        freeze(leaf, Reason("it shares its entries with an axis of more tensors"))

    def _preference(self, leaf: AxisNode, owners: Counter[AxisNode]) -> tuple[bool, int]:
        """Of rivals the one that was asked for goes first, then the one in most tensors."""
        is_query_head = "query_head" in self._optional and BATCHED in tags(leaf)
        return HEAD_SIZE in tags(leaf), -owners[leaf] if is_query_head else owners[leaf]

    def _kind(self, leaf: AxisNode) -> str:
        noted = tags(leaf)
        if HEAD_SIZE in noted:
            return "head_dim"
        if BATCHED in noted:
            for axis in self._walk.axes.heads:
                parts = [find(part) for part in find(axis).parts if find(axis).is_product]
                queries = [other for part in parts if part is not leaf for other in leaves(part)]
                if leaf in parts and any(0 < self._entries(one) < self._entries(leaf) for one in queries):
                    return "kv_group"
                if leaf in parts and any(self._entries(one) > self._entries(leaf) for one in queries):
                    return "query_head"
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
        near = {leaf: _join(common_path(paths), kinds[leaf]) for leaf, paths in modules.items()}
        shared = Counter(near.values())
        names: dict[AxisNode, str] = {}
        taken: set[str] = set()
        for leaf, paths in modules.items():
            distance = max(map(len, paths)) - len(common_path(paths))
            is_own = distance <= MAX_DISTANCE and shared[near[leaf]] == 1
            name = near[leaf] if is_own else _join(paths[0], kinds[leaf])
            numbered = (f"{name}.{number}" for number in itertools.count(1))
            names[leaf] = next(one for one in itertools.chain([name], numbered) if one not in taken)
            taken.add(names[leaf])
        return names


def _equations_of_layers(walk: Walk, model: nn.Module) -> list[Equation]:
    """The sizes that layers state about their weights, as far as the forward reads them: pruning changes them."""
    read = {name for equation in walk.axes.equations for name in names_in(equation)}
    names = {id(tensor): name for name, tensor in walk.captured.tensors.items()}
    return [
        Equation(attribute, walk.tensors[name][dim], "the size of a layer", module=path)
        for path, module in model.named_modules()
        for stated, weight, dim in stated_sizes(module)
        if (attribute := Attribute(f"{path}.{stated}".removeprefix("."))) in read
        and (name := names.get(id(weight))) in walk.tensors
    ]


def quantizer_tensors(model: nn.Module) -> Iterator[str]:
    """Tensors that are about rounding, not about the function: they follow their layer and are in no group."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            yield from (
                f"{path}.{name}" for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())
            )


def _replaced_modules(classes: Mapping[str, type[nn.Module]], model: nn.Module) -> Iterator[str]:
    """Modules of a family's own that are of another class after the forward than as its config builds them.

    BigBird's attention is, for short inputs: what a checkpoint says about the one is lost with it.
    """
    for name, built in classes_by_config(model).items():
        ran = classes.get(name, built)
        if ran is not built and all(each.__module__.startswith("transformers.models.") for each in (ran, built)):
            yield name


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
