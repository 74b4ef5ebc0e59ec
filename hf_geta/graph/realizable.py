"""Which axes can the integers of the forward follow? Sizes are tried; what has no solution is frozen.

Equations over attributes and axes fall apart into components that share none of either: layers, mostly. Each is tried
by itself, so that a deep model costs no more than its layers.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterable, Mapping

from hf_geta.graph.axes import AxisNode, Reason, find, freeze, is_frozen
from hf_geta.graph.integers import Arithmetic, Attribute, Equation, Expression, substitute
from hf_geta.graph.solving import UnsolvableError, components, names_in, solve

logger = logging.getLogger(__name__)

SAMPLES = 6  # of sizes for all leaves together; a wrong guess that survives one is rare, six is none seen

Values = Mapping[Attribute, int]


def freeze_unrealizable(equations: Iterable[Equation], attributes: Values) -> list[Equation]:
    """Freeze the leaves that nothing could follow; returns, over free leaves, the equations that decide attributes."""
    generator = random.Random(0)
    remaining: list[Equation] = []
    for component in components(_over_free_leaves(equations)):
        waiting = _samples(component, generator)
        while waiting:
            try:
                solve(component, waiting[-1], attributes)
                waiting.pop()
            except UnsolvableError as error:
                _freeze_unsolvable(error.equation, component)
                component = _over_free_leaves(component)
                waiting = _samples(component, generator)
        remaining += component
    return _deciding(remaining)


def _samples(component: Collection[Equation], generator: random.Random) -> list[dict[AxisNode, int]]:
    """Sizes to try: random ones of all axes; and each axis smaller alone, which finds those that must be equal."""
    concerned = _axes_in(component)
    full = {leaf: leaf.size for leaf in concerned}
    together = [{leaf: generator.randint(1, leaf.size - 1) for leaf in concerned} for _ in range(SAMPLES)]
    return [*({**full, leaf: leaf.size - 1} for leaf in concerned), *together] if concerned else []


def freeze_alone_unrealizable(rivals: Iterable[AxisNode], equations: Iterable[Equation], attributes: Values) -> None:
    """Freeze those leaves of `rivals` that cannot even shrink while all others stay."""
    of_leaf: dict[AxisNode, list[Equation]] = {}
    for component in components(_over_free_leaves(equations)):
        of_leaf.update(dict.fromkeys(_axes_in(component), component))
    for leaf in rivals:
        sizes = {other: other.size for other in _axes_in(of_leaf.get(leaf, ()))}
        try:
            solve(of_leaf.get(leaf, ()), {**sizes, leaf: leaf.size - 1}, attributes)
        except UnsolvableError as error:
            freeze(leaf, _reason(error.equation))


def _axes_in(equations: Iterable[Equation]) -> dict[AxisNode, None]:
    names = (name for equation in equations for name in names_in(equation))
    return dict.fromkeys(name for name in names if isinstance(name, AxisNode))


def _over_free_leaves(equations: Iterable[Equation]) -> list[Equation]:
    """The equations with frozen axes as numbers, without those that say nothing."""
    found: dict[Equation, None] = {}
    for equation in equations:
        left, right = (substitute(side, _size_expression) for side in (equation.left, equation.right))
        constant = isinstance(left, int) and isinstance(right, int)
        if left != right and not constant:
            found[equation._replace(left=left, right=right)] = None
    return list(found)


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
        total = Arithmetic("*" if axis.is_product else "+", total, size)
    return total


def _freeze_unsolvable(equation: Equation, component: Collection[Equation]) -> None:
    """Freeze the leaves of an equation or, where it has none, those that its attributes depend on."""
    names = names_in(equation)
    touching = [other for other in component if names_in(other).keys() & names.keys()]
    for leaf in _axes_in([equation]) or _axes_in(touching) or _axes_in(component):
        freeze(leaf, _reason(equation))
    logger.debug("%s: %s == %s has no solution", _reason(equation), equation.left, equation.right)


def _reason(equation: Equation) -> Reason:
    return Reason(f"{equation.reason} cannot follow", equation.operator, equation.module)


def _deciding(equations: Iterable[Equation]) -> list[Equation]:
    """The equations that decide attributes which depend on axes."""
    return [
        equation
        for component in components(equations)
        if _axes_in(component)
        for equation in component
        if any(isinstance(name, Attribute) for name in names_in(equation))
    ]
