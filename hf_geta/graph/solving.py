"""What must attributes be when axes shrink? Solving equations over integers by trying, a few unknowns at a time."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

from hf_geta.graph.integers import Arithmetic, Attribute, Equation, Expression, evaluate, expression_leaves


class UnsolvableError(ValueError):
    """No values of the attributes satisfy `equation`."""

    def __init__(self, equation: Equation) -> None:
        super().__init__(f"{equation.reason}: {equation.left} == {equation.right} has no solution")
        self.equation = equation


def solve(
    equations: Collection[Equation], sizes: Mapping[Any, int], attributes: Mapping[Attribute, int]
) -> dict[Attribute, int]:
    """The values that attributes must have when the leaves have the given sizes.

    Attributes stay as they are where they can.

    Args:
        equations: over the leaves of `sizes` and attributes.
        sizes: the value of every leaf that is no attribute.
        attributes: the attributes' values in the traced model.

    Returns:
        Every attribute that occurs in `equations` with its new value.

    Raises:
        UnsolvableError: naming an equation that no choice of attributes satisfies.
    """
    solution: dict[Attribute, int] = {}
    for component in components(equations, Attribute):
        names = {name for equation in component for name in names_in(equation)}
        values = {name: sizes[name] for name in names if not isinstance(name, Attribute)}
        solution.update(_search(component, values, attributes))
    return solution


def names_in(equation: Equation) -> dict[Hashable, None]:
    """The leaves of both sides, in order."""
    return dict.fromkeys((*expression_leaves(equation.left), *expression_leaves(equation.right)))


def components(equations: Iterable[Equation], kind: type = object) -> list[list[Equation]]:
    """The equations, those together that share names of this kind, in order; those without any stay alone."""
    parents: dict[Hashable, Hashable] = {}

    def root(name: Hashable) -> Hashable:
        while (parent := parents.setdefault(name, name)) != name:
            parents[name] = parents[parent]
            name = parent
        return name

    shared = {equation: [name for name in names_in(equation) if isinstance(name, kind)] for equation in equations}
    for first, *others in filter(None, shared.values()):
        for other in others:
            parents[root(other)] = root(first)
    found: dict[Hashable, list[Equation]] = {}
    for equation, names in shared.items():
        found.setdefault(root(names[0]) if names else equation, []).append(equation)
    return list(found.values())


def _search(
    equations: Collection[Equation], values: Mapping[Hashable, int], attributes: Mapping[Attribute, int]
) -> dict[Attribute, int]:
    """A solution by trying, the equation with the fewest unknowns first."""
    waiting = []
    for equation in equations:
        unknowns = {name for name in names_in(equation) if name not in values}
        if unknowns:
            waiting.append((len(unknowns), equation))
        elif not _holds(equation, values):
            raise UnsolvableError(equation)
    if not waiting:
        return {}
    _, chosen = min(waiting, key=lambda item: item[0])
    failure = UnsolvableError(chosen)
    for number, (name, value) in enumerate(_candidates(chosen, values, attributes)):
        try:
            rest = _search([equation for _, equation in waiting], {**values, name: value}, attributes)
            return {name: value, **rest}
        except UnsolvableError as error:
            failure = error if number == 0 else failure
    raise failure


def _holds(equation: Equation, values: Mapping[Hashable, int]) -> bool:
    try:
        return evaluate(equation.left, values) == evaluate(equation.right, values)
    except ZeroDivisionError:
        return False


def _candidates(
    equation: Equation, values: Mapping[Hashable, int], attributes: Mapping[Attribute, int]
) -> Iterator[tuple[Attribute, int]]:
    """Attributes of the equation with values that satisfy it, the other unknown ones as they were."""
    unknowns = sorted(name for name in names_in(equation) if isinstance(name, Attribute) and name not in values)
    before: dict[Hashable, int] = {name: attributes[name] for name in unknowns}
    for name in unknowns:
        known: dict[Hashable, int] = {**before, **values}
        if _holds(equation, known):
            yield name, known[name]
        del known[name]
        for here, there in ((equation.left, equation.right), (equation.right, equation.left)):
            if name in expression_leaves(here) and name not in expression_leaves(there):
                value = _invert(here, evaluate(there, known), name, known)
                if value is not None and value > 0 and _holds(equation, {**known, name: value}):
                    yield name, value


def _invert(expression: Expression, target: int | None, name: Attribute, values: Mapping[Hashable, int]) -> int | None:
    """The value of `name`, which occurs once, that gives the expression the value `target`; None if there is none."""
    if expression == name or target is None:
        return target
    if not isinstance(expression, Arithmetic):
        return None
    symbol, left, right = expression
    in_left, in_right = name in expression_leaves(left), name in expression_leaves(right)
    if in_left == in_right:
        return None
    known = evaluate(right if in_left else left, values)
    divides = known != 0 and target % known == 0
    if in_left:
        goals = {
            "+": target - known,
            "-": target + known,
            "*": target // known if divides else None,
            "//": target * known,
        }
        return _invert(left, goals.get(symbol), name, values)
    quotient = known // target if target and known % target == 0 else None
    goals = {"+": target - known, "-": known - target, "*": target // known if divides else None, "//": quotient}
    return _invert(right, goals.get(symbol), name, values)
