"""Traced ints compute as ints do, and attributes can be solved for from what they computed."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_geta.graph.integers import (
    Arithmetic,
    Attribute,
    Equation,
    TracedInt,
    evaluate,
    expression_of,
)
from hf_geta.graph.solving import UnsolvableError, solve

ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)
HEADS, SIZE = Attribute("attention.num_heads"), Attribute("attention.head_size")


@given(st.lists(st.tuples(st.sampled_from(ARITHMETIC), st.integers(1, 20), st.booleans()), max_size=5))
def test_an_expression_has_the_value_of_the_int(steps):
    value: int = 7
    traced: int = TracedInt(7, HEADS)
    for apply, other, reflected in steps:
        if reflected and apply in (operator.floordiv, operator.mod) and value == 0:
            continue
        value = apply(other, value) if reflected else apply(value, other)
        traced = apply(other, traced) if reflected else apply(traced, other)
    assert int(traced) == value
    assert evaluate(expression_of(traced), {HEADS: 7}) == value
    assert evaluate(expression_of(-traced), {HEADS: 7}) == -value


def test_a_traced_int_is_an_int_to_everybody_else():
    four = TracedInt(4, HEADS)
    assert isinstance(four, int)
    assert {four: "x"}[4] == "x"
    assert torch.zeros(4, 2).view(2, four).shape == (2, 4)
    assert list(range(four)) == [0, 1, 2, 3]
    assert four / 8 == 0.5
    assert four**-0.5 == 0.5
    assert (four != 4, four != 5, four == 4.0, four != None) == (False, True, True, True)  # noqa: E711


def test_quotients_and_shifts_of_a_traced_int_are_arithmetic():
    def compute(n):
        return [*divmod(n, 3), *divmod(20, n), n << 2, n >> 1]

    values = compute(TracedInt(7, HEADS))
    assert values == compute(7)
    assert [evaluate(expression_of(value), {HEADS: 11}) for value in values] == compute(11)


@pytest.mark.parametrize(
    "compute",
    [
        *(float, abs, round, lambda n: +n, lambda n: n & 3, lambda n: 3 | n, lambda n: n**2, lambda n: 1 << n),
        *(lambda n: n / 2, lambda n: n * 0.5, lambda n: n - 1j, lambda n: divmod(n, 2.5)),
    ],
)
def test_what_is_computed_from_a_traced_int_without_a_trace_needs_it_as_it_is(compute):
    noted: list[Equation] = []
    assert compute(TracedInt(5, HEADS, noted)) == compute(5)
    assert set(noted) == {Equation(HEADS, 5, "a number of the forward")}


def test_comparisons_that_hold_are_noted():
    noted: list[Equation] = []
    four = TracedInt(4, HEADS, noted)
    assert four == 4
    assert four != 5
    assert (2, four) == (2, TracedInt(4, SIZE, noted))
    assert [(one.left, one.right) for one in noted] == [(HEADS, 4), (HEADS, SIZE)]


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 5))
def test_solve_inverts_arithmetic(value, factor, offset):
    for expression in (
        Arithmetic("+", Arithmetic("*", HEADS, factor), offset),
        Arithmetic("*", factor, Arithmetic("-", HEADS, offset)),
        Arithmetic("-", offset, Arithmetic("*", factor, HEADS)),
        Arithmetic("//", Arithmetic("*", HEADS, factor), factor),
    ):
        target = evaluate(expression, {HEADS: value})
        assert solve([Equation(expression, "hidden")], {"hidden": target}, {HEADS: 99}) == {HEADS: value}


def test_an_attribute_that_one_equation_decides_is_known_to_the_others():
    equations = [Equation(Arithmetic("*", HEADS, SIZE), "all"), Equation(SIZE, "size")]
    assert solve(equations, {"all": 24, "size": 8}, {HEADS: 4, SIZE: 8}) == {HEADS: 3, SIZE: 8}


def test_of_several_unknowns_the_one_that_can_alone_changes():
    equations = [Equation(Arithmetic("*", HEADS, SIZE), "all")]
    assert solve(equations, {"all": 20}, {HEADS: 4, SIZE: 8}) == {HEADS: 4, SIZE: 5}


@pytest.mark.parametrize(
    "equations",
    [
        [Equation(32, "hidden")],
        [Equation(HEADS, "hidden"), Equation(HEADS, 4)],
        [Equation(Arithmetic("*", HEADS, 8), "hidden")],
        [Equation(Arithmetic("%", HEADS, 8), "hidden")],
    ],
)
def test_what_has_no_solution_names_its_equation(equations):
    with pytest.raises(UnsolvableError) as caught:
        solve(equations, {"hidden": 20}, {HEADS: 4})
    assert caught.value.equation in equations


def test_traced_ints_in_a_module_do_not_change_what_it_computes():
    layer = nn.Conv2d(4, 8, 3, groups=2)
    x = torch.randn(1, 4, 5, 5)
    expected = layer(x)
    layer.groups = TracedInt(2, Attribute("groups"))
    assert torch.equal(layer(x), expected)
