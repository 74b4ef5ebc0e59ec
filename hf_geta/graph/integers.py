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

import torch


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


MAX_OPERATIONS = 32  # in one expression; what a forward counts in longer loops is a constant to us


class TracedInt(int):
    """An int that knows the expression it is the value of; `equalities` collects the comparisons that held."""

    expression: Expression
    equalities: list[Equation]
    operations: int  # in the expression

    def __new__(
        cls,
        value: int,
        expression: Expression = None,
        equalities: list[Equation] | None = None,
        operations: int = 0,
    ) -> TracedInt:
        self = super().__new__(cls, value)
        self.expression = int(value) if expression is None or operations > MAX_OPERATIONS else expression
        self.equalities = [] if equalities is None else equalities
        self.operations = operations
        return self

    def __eq__(self, other: object) -> bool:
        if isinstance(other, torch.SymInt):
            return int(self) == other
        same = int.__eq__(self, other)
        if same is True:
            self.equalities.append(Equation(self.expression, expression_of(other), "compared in Python"))
        return same

    def __ne__(self, other: object) -> bool:
        return not same if (same := self.__eq__(other)) is not NotImplemented else same

    __hash__ = int.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def __neg__(self) -> int:
        return 0 - self

    def __float__(self) -> float:
        return float(self.as_number())

    def as_number(self) -> int:
        """The plain value, which has to stay as it is: what is computed from it is no size of anything."""
        self.equalities.append(Equation(self.expression, int(self), "a number of the forward"))
        return int(self)


def _traced(symbol: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    def compute(self: TracedInt, other: Any) -> Any:
        if isinstance(other, torch.SymInt):  # does not mix with kinds of int
            return ARITHMETIC[symbol](*((other, int(self)) if reflected else (int(self), other)))
        if not isinstance(other, int):
            return NotImplemented  # floats and tensors: int's own rules, no longer traced
        left, right = (other, self) if reflected else (self, other)
        value = ARITHMETIC[symbol](int(left), int(right))
        operations = 1 + sum(side.operations for side in (left, right) if isinstance(side, TracedInt))
        expression = Operation(symbol, expression_of(left), expression_of(right))
        return TracedInt(value, expression, self.equalities, operations)

    return compute


def _number(name: str) -> Callable[[TracedInt, Any], Any]:
    def compute(self: TracedInt, other: Any) -> Any:
        return getattr(self.as_number(), name)(other)

    return compute


def _comparison(name: str) -> Callable[[TracedInt, Any], Any]:
    def compare(self: TracedInt, other: Any) -> Any:
        return getattr(operator, name)(int(self), other)  # also with a SymInt, which does not mix with kinds of int

    return compare


for _name in ("lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _comparison(_name))
for _name in ("truediv", "rtruediv", "pow", "rpow"):  # scales, such as size**-0.5
    setattr(TracedInt, f"__{_name}__", _number(f"__{_name}__"))
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
    """The expression with every leaf replaced, and what has become constant computed."""
    if isinstance(expression, Operation):
        left, right = substitute(expression.left, replace), substitute(expression.right, replace)
        result = Operation(expression.symbol, left, right)
        is_constant = isinstance(left, int) and isinstance(right, int) and (right != 0 or expression.symbol in "+-*")
        return evaluate(result, {}) if is_constant else result
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
    for component in _components(equations):
        names = {name for equation in component for name in _names(equation)}
        values = {name: sizes[name] for name in names if not isinstance(name, Attribute)}
        solution.update(_search(component, values, attributes))
    return solution


def _names(equation: Equation) -> frozenset[Hashable]:
    return frozenset((*expression_leaves(equation.left), *expression_leaves(equation.right)))


def _components(equations: Iterable[Equation]) -> list[list[Equation]]:
    """The equations, those together that share attributes."""
    found: list[tuple[set[Hashable], list[Equation]]] = []
    for equation in equations:
        names: set[Hashable] = {name for name in _names(equation) if isinstance(name, Attribute)}
        joined = [component for component in found if component[0] & names]
        found = [component for component in found if not component[0] & names]
        members = [member for component in joined for member in component[1]]
        found.append((names.union(*(component[0] for component in joined)), [*members, equation]))
    return [members for _, members in found]


def _search(
    equations: Collection[Equation], values: Mapping[Hashable, int], attributes: Mapping[Attribute, int]
) -> dict[Attribute, int]:
    """A solution by trying, the equation with the fewest unknowns first."""
    waiting = []
    for equation in equations:
        unknowns = {name for name in _names(equation) if name not in values}
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
    unknowns = sorted(name for name in _names(equation) if isinstance(name, Attribute) and name not in values)
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
    if not isinstance(expression, Operation):
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
