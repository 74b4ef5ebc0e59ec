"""From axes to the search space: which leaves are prunable, their members, names and kinds."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from hf_geta.graph.axes import AxisNode, Reason, find, freeze, is_frozen, leaves, positions, tags
from hf_geta.graph.capture import transient_buffers
from hf_geta.graph.integers import (
    Attribute,
    Equation,
    Expression,
    Operation,
    UnsolvableError,
    expression_leaves,
    solve,
    substitute,
)
from hf_geta.graph.rules.context import BATCHED, CONSUMED, CONVOLVED, LOOKED_UP, STACKED
from hf_geta.graph.walk import Walk
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)

SAMPLES = 6  # of sizes for all leaves together; a wrong guess that survives one is rare, six is none seen
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
        self.equations = self._freeze_unrealizable()
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
            for part in _equation_leaves(equation):
                for leaf in leaves(part) if isinstance(part, AxisNode) else ():
                    if leaf not in owners:
                        freeze(leaf, Reason("no parameter has it"))
        for axis in self.dims.values():
            _freeze_rival_factors(axis, owners)

    def _freeze_unrealizable(self) -> list[Equation]:
        """Try random sizes: where no ints of the forward could follow, freeze; returns the equations that remain."""
        generator = random.Random(0)
        samples = 0
        while True:
            equations = list(dict.fromkeys(filter(None, map(_over_free_leaves, self._walk.axes.equations))))
            names = dict.fromkeys(leaf for equation in equations for leaf in _equation_leaves(equation))
            if samples == SAMPLES:
                return _connected(equations)
            sizes = {leaf: generator.randint(1, leaf.size - 1) for leaf in names if isinstance(leaf, AxisNode)}
            try:
                solve(equations, sizes, self._walk.captured.attributes)
                samples += 1
            except UnsolvableError as error:
                _freeze_unsolvable(error.equation, equations)

    def _kind(self, leaf: AxisNode) -> str:
        noted = tags(leaf)
        if BATCHED in noted:
            for axis in self._walk.axes.heads:
                parts = [find(part) for part in find(axis).parts if find(axis).is_product]
                shared = [
                    part for part in parts if part is not leaf and any(found in self.slots for found in leaves(part))
                ]
                if leaf in parts and shared:
                    return "kv_group"
            return "attention_head"
        if CONVOLVED in noted:
            return "channel"
        if LOOKED_UP in noted:
            return "embedding"
        return "expert_hidden" if STACKED in noted else "mlp"

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


def _freeze_rival_factors(axis: AxisNode, owners: Counter[AxisNode]) -> None:
    """In a product only one factor is pruned, or groups would overlap: the one in most tensors, else the outermost."""
    axis = find(axis)
    for part in axis.parts:
        _freeze_rival_factors(part, owners)
    if not axis.parts or not axis.is_product:
        return
    free = [[leaf for leaf in leaves(part) if not is_frozen(leaf)] for part in axis.parts]
    rivals = [factor for factor in free if factor]
    if len(rivals) < 2:
        return
    best = max(rivals, key=lambda factor: max(owners[leaf] for leaf in factor))
    for factor in rivals:
        for leaf in factor:
            if factor is not best or any(leaf in other for other in rivals if other is not factor):
                freeze(leaf, Reason("it shares its entries with an axis of more tensors"))


def _over_free_leaves(equation: Equation) -> Equation | None:
    """The equation with frozen axes as numbers; None where it says nothing."""
    left, right = (substitute(side, _size_expression) for side in (equation.left, equation.right))
    constant = isinstance(left, int) and isinstance(right, int)
    return None if left == right or constant else equation._replace(left=left, right=right)


def _size_expression(leaf: object) -> Expression:
    """The size of an axis as an expression of its free leaves."""
    if not isinstance(leaf, AxisNode):
        return leaf
    axis = find(leaf)
    if is_frozen(axis):
        return axis.size
    if not axis.parts:
        return axis
    sizes = [_size_expression(part) for part in axis.parts]
    total = sizes[0]
    for size in sizes[1:]:
        total = Operation("*" if axis.is_product else "+", total, size)
    return total


def _equation_leaves(equation: Equation) -> dict[object, None]:
    return dict.fromkeys((*expression_leaves(equation.left), *expression_leaves(equation.right)))


def _freeze_unsolvable(equation: Equation, equations: Collection[Equation]) -> None:
    """Freeze the leaves of an equation or, where it has none, those that its attributes depend on."""
    why = Reason(f"{equation.reason} cannot follow", equation.operator, equation.module)
    names = _equation_leaves(equation)
    if not any(isinstance(name, AxisNode) for name in names):
        touching = [other for other in equations if _equation_leaves(other).keys() & names.keys()]
        names = dict.fromkeys(name for other in touching for name in _equation_leaves(other))
    for name in names:
        if isinstance(name, AxisNode):
            freeze(name, why)
    logger.debug("%s: %s == %s has no solution", why, equation.left, equation.right)


def _connected(equations: Collection[Equation]) -> list[Equation]:
    """The equations that decide attributes which depend on free leaves."""
    names: set[object] = {
        name for equation in equations for name in _equation_leaves(equation) if isinstance(name, AxisNode)
    }
    found: dict[Equation, None] = {}
    while more := [one for one in equations if one not in found and _equation_leaves(one).keys() & names]:
        found.update(dict.fromkeys(more))
        names |= {name for one in more for name in _equation_leaves(one) if isinstance(name, Attribute)}
    return [one for one in found if any(isinstance(name, Attribute) for name in _equation_leaves(one))]


def _join(path: list[str], kind: str) -> str:
    return ".".join((*path, SUFFIXES[kind]))


def _common_path(paths: list[list[str]]) -> list[str]:
    common = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return common
