"""Which Python integers must change with the shapes? Integers that remember where they come from.

A forward that says `x.view(batch, tokens, self.num_heads, 64)` or `x.split(self.split_size)` holds sizes in Python.
While the model is traced, such integers are `TracedInt`s: ints that carry an expression over attributes
(`Attribute("transformer.h.0.attn.split_size")`), sizes of tensors (`SizeOf`) and constants. What an operator asks of
them becomes an `Equation`; `solving.py` finds the attributes of a pruned model.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch


class Attribute(NamedTuple):
    """An int attribute of a module, or of the config a module holds, by its dotted path from the model."""

    path: str


class SizeOf(NamedTuple):
    """The size of dimension `dim` of the tensor that graph node `node` computes (a node, or later its name)."""

    node: Any
    dim: int


class Arithmetic(NamedTuple):
    """`left symbol right`, with Python's integer arithmetic."""

    symbol: str
    left: Any
    right: Any


# An expression is an int, an Arithmetic of expressions, or a leaf: any other hashable (Attribute, SizeOf, an axis).
Expression = int | Arithmetic | Hashable


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

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __lshift__(self, other: int) -> Any:
        return self * 2**other

    def __rshift__(self, other: int) -> Any:
        return self // 2**other

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
            if isinstance(other, numbers.Number):
                self.as_number()
            return NotImplemented  # floats and tensors: int's own rules, no longer traced
        left, right = (other, self) if reflected else (self, other)
        value = ARITHMETIC[symbol](int(left), int(right))
        operations = 1 + sum(side.operations for side in (left, right) if isinstance(side, TracedInt))
        expression = Arithmetic(symbol, expression_of(left), expression_of(right))
        return TracedInt(value, expression, self.equalities, operations)

    return compute


def _number(name: str) -> Callable[..., Any]:
    def compute(self: TracedInt, *others: Any) -> Any:
        return getattr(self.as_number(), name)(*others)

    return compute


def _comparison(name: str) -> Callable[[TracedInt, Any], Any]:
    def compare(self: TracedInt, other: Any) -> Any:
        return getattr(operator, name)(int(self), other)  # also with a SymInt, which does not mix with kinds of int

    return compare


for _name in ("lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _comparison(_name))
BITS = ("and", "rand", "or", "ror", "xor", "rxor", "invert", "rlshift", "rrshift")
ROUNDING = ("abs", "pos", "round", "trunc", "floor", "ceil")
for _name in ("truediv", "rtruediv", "pow", "rpow", *BITS, *ROUNDING):  # scales, such as size**-0.5, and rarities
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
    if isinstance(expression, Arithmetic):
        yield from expression_leaves(expression.left)
        yield from expression_leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def substitute(expression: Expression, replace: Callable[[Hashable], Expression]) -> Expression:
    """The expression with every leaf replaced, and what has become constant computed."""
    if isinstance(expression, Arithmetic):
        left, right = substitute(expression.left, replace), substitute(expression.right, replace)
        result = Arithmetic(expression.symbol, left, right)
        is_constant = isinstance(left, int) and isinstance(right, int) and (right != 0 or expression.symbol in "+-*")
        return evaluate(result, {}) if is_constant else result
    return expression if isinstance(expression, int) else replace(expression)


def evaluate(expression: Expression, values: Mapping[Hashable, int]) -> int:
    """The value of an expression.

    Raises:
        KeyError: for a leaf without a value.
        ZeroDivisionError: as Python would.
    """
    if isinstance(expression, Arithmetic):
        left, right = evaluate(expression.left, values), evaluate(expression.right, values)
        return ARITHMETIC[expression.symbol](left, right)
    return expression if isinstance(expression, int) else values[expression]
