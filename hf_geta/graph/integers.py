"""Which Python integers must change with the shapes? Integers that remember where they come from.

A forward that says `x.view(batch, tokens, self.num_heads, 64)` or `x.split(self.split_size)` holds sizes in Python.
While the model is traced, such integers are `TracedInt`s: ints that carry an expression over attributes
(`Attribute("transformer.h.0.attn.split_size")`), sizes of tensors (`SizeOf`) and constants. What an operator asks of
them becomes an `Equation`; `solve` finds the attributes of a pruned model, or says which equation has no solution.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple


class Attribute(NamedTuple):
    """An int attribute of a module, or of the config a module holds, by its dotted path from the model."""

    path: str


class SizeOf(NamedTuple):
    """The size of dimension `dim` of the tensor that graph node `node` computes (a node, or later its name)."""

    node: Any
    dim: int


class Operation(NamedTuple):
    """`left symbol right`, with Python's integer arithmetic."""

    symbol: str
    left: Any
    right: Any


# An expression is an int, an Operation of expressions, or a leaf: any other hashable (Attribute, SizeOf, an axis).
Expression = int | Operation | Hashable


class Equation(NamedTuple):
    """Two expressions that are equal in the traced model and must be equal in every pruned one."""

    left: Expression
    right: Expression
    reason: str = ""
    operator: str = ""
    module: str = ""


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


class TracedInt(int):
    """An int that knows the expression it is the value of; `equalities` collects the comparisons that held."""

    expression: Expression
    equalities: list[Equation]

    def __new__(cls, value: int, expression: Expression = None, equalities: list[Equation] | None = None) -> TracedInt:
        self = super().__new__(cls, value)
        self.expression = int(value) if expression is None else expression
        self.equalities = [] if equalities is None else equalities
        return self

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)
        if same is True:
            self.equalities.append(Equation(self.expression, expression_of(other), "compared in Python"))
        return same

    def __ne__(self, other: object) -> bool:
        return not same if (same := self.__eq__(other)) is not NotImplemented else same

    __hash__ = int.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def __neg__(self) -> TracedInt:
        return TracedInt(-int(self), Operation("-", 0, self.expression), self.equalities)


def _traced(symbol: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    def compute(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented  # floats and tensors: int's own rules, no longer traced
        left, right = (other, self) if reflected else (self, other)
        value = ARITHMETIC[symbol](int(left), int(right))
        return TracedInt(value, Operation(symbol, expression_of(left), expression_of(right)), self.equalities)

    return compute


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(TracedInt, f"__{_name}__", _traced(_symbol, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _traced(_symbol, reflected=True))


def expression_of(value: Any) -> Expression:
    """The expression that an int is the value of: its own, or itself as a constant."""
    return value.expression if isinstance(value, TracedInt) else int(value)


def flat_integers(value: Any) -> Iterator[int]:
    """All ints in nested tuples, lists, dicts and slices, in order; bools are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from flat_integers(part)
    elif isinstance(value, dict):
        yield from flat_integers(list(value.values()))


def expression_leaves(expression: Expression) -> Iterator[Hashable]:
    """The leaves of an expression, in order."""
    if isinstance(expression, Operation):
        yield from expression_leaves(expression.left)
        yield from expression_leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def substitute(expression: Expression, replace: Callable[[Hashable], Expression]) -> Expression:
    """The expression with every leaf replaced."""
    if isinstance(expression, Operation):
        left, right = substitute(expression.left, replace), substitute(expression.right, replace)
        return Operation(expression.symbol, left, right)
    return expression if isinstance(expression, int) else replace(expression)


def evaluate(expression: Expression, values: Mapping[Hashable, int]) -> int:
    """The value of an expression.

    Raises:
        KeyError: for a leaf without a value.
        ZeroDivisionError: as Python would.
    """
    if isinstance(expression, Operation):
        left, right = evaluate(expression.left, values), evaluate(expression.right, values)
        return ARITHMETIC[expression.symbol](left, right)
    return expression if isinstance(expression, int) else values[expression]


class UnsolvableError(ValueError):
    """No values of the attributes satisfy `equation`."""

    def __init__(self, equation: Equation) -> None:
        super().__init__(f"{equation.reason}: {equation.left} == {equation.right} has no solution")
        self.equation = equation


def solve(
    equations: Collection[Equation], sizes: Mapping[Any, int], attributes: Mapping[Attribute, int]
) -> dict[Attribute, int]:
    """The values that attributes must have when the leaves have the given sizes.

    Equations with one unknown attribute decide it; where several unknowns are left, the first changes that has a
    solution with the others as they are in `attributes`.

    Args:
        equations: over the leaves of `sizes` and attributes.
        sizes: the value of every leaf that is no attribute.
        attributes: the attributes' values in the traced model.

    Returns:
        Every attribute that occurs in `equations` with its new value.

    Raises:
        UnsolvableError: naming an equation that no choice of attributes satisfies.
    """
    values: dict[Hashable, int] = dict(sizes)
    waiting = list(equations)
    while waiting:
        left: list[Equation] = []
        for equation in waiting:
            unknowns = _unknowns(equation, values)
            if len(unknowns) > 1:
                left.append(equation)
            elif unknowns:
                values.update([_decide(equation, unknowns, values, attributes)])
            elif not _holds(equation, values):
                raise UnsolvableError(equation)
        if len(left) == len(waiting):
            values.update([_decide(left[0], _unknowns(left[0], values), values, attributes)])
        waiting = left
    return {name: value for name, value in values.items() if isinstance(name, Attribute)}


def _unknowns(equation: Equation, values: Mapping[Hashable, int]) -> frozenset[Attribute]:
    names = (*expression_leaves(equation.left), *expression_leaves(equation.right))
    return frozenset(name for name in names if isinstance(name, Attribute) and name not in values)


def _holds(equation: Equation, values: Mapping[Hashable, int]) -> bool:
    try:
        return evaluate(equation.left, values) == evaluate(equation.right, values)
    except ZeroDivisionError:
        return False


def _decide(
    equation: Equation,
    unknowns: Iterable[Attribute],
    values: Mapping[Hashable, int],
    attributes: Mapping[Attribute, int],
) -> tuple[Attribute, int]:
    """One attribute of the equation and its value, with the other unknown ones as they were."""
    for name in sorted(unknowns):
        known: dict[Hashable, int] = {**{other: attributes[other] for other in unknowns if other != name}, **values}
        for here, there in ((equation.left, equation.right), (equation.right, equation.left)):
            if name in expression_leaves(here) and name not in expression_leaves(there):
                value = _invert(here, evaluate(there, known), name, known)
                if value is not None and _holds(equation, {**known, name: value}):
                    return name, value
    raise UnsolvableError(equation)


def _invert(expression: Expression, target: int, name: Attribute, values: Mapping[Hashable, int]) -> int | None:
    """The value of `name` that gives the expression the value `target`; None where there is none."""
    if expression == name:
        return target
    if not isinstance(expression, Operation):
        return None
    symbol, left, right = expression
    if name in expression_leaves(left):
        if name in expression_leaves(right):
            return None
        known = evaluate(right, values)
        undo: dict[str, Callable[[], int | None]] = {
            "+": lambda: target - known,
            "-": lambda: target + known,
            "*": lambda: target // known if known and target % known == 0 else None,
            "//": lambda: target * known,
        }
        inner, goal = left, undo.get(symbol, lambda: None)()
    else:
        known = evaluate(left, values)
        undo = {
            "+": lambda: target - known,
            "-": lambda: known - target,
            "*": lambda: target // known if known and target % known == 0 else None,
            "//": lambda: known // target if target and known % target == 0 else None,
        }
        inner, goal = right, undo.get(symbol, lambda: None)()
    return None if goal is None else _invert(inner, goal, name, values)
