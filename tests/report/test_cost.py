"""Laws of the cost model."""

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.report import measure_cost


class Operation(NamedTuple):
    name: str
    weight: str | None
    macs: int
    axes: tuple[str, ...] = ()


# An attention block by hand: 10 tokens, width 8, 4 heads of 2, an MLP of 16 units.
OPERATIONS = [
    Operation("q", "q.weight", 10 * 8 * 8),
    Operation("scores", None, 10 * 10 * 8, ("heads",)),
    Operation("o", "o.weight", 10 * 8 * 8),
    Operation("fc1", "fc1.weight", 10 * 8 * 16),
]
DENSE = {"q.weight": 64, "o.weight": 64, "fc1.weight": 128, "norm.weight": 8}
AXES = {"heads": 4, "units": 16}


@st.composite
def compressions(draw):
    """(kept elements, weight widths, activation widths, kept axes) of the block above."""
    weights = [name for name in DENSE if name != "norm.weight"]
    kept = {name: draw(st.integers(1, size)) for name, size in DENSE.items()}
    widths = st.dictionaries(st.sampled_from(weights), st.integers(2, 16))
    return kept, draw(widths), draw(widths), {name: draw(st.integers(1, size)) for name, size in AXES.items()}


def test_an_uncompressed_model_costs_one():
    cost = measure_cost(OPERATIONS, DENSE, DENSE, axis_sizes=AXES)
    assert cost.relative_bops == cost.relative_attention_bops == 1
    assert cost.parameters == cost.dense_parameters == 264
    assert cost.tensor_bytes == 4 * 264
    assert (cost.mean_weight_bits, cost.mean_activation_bits, cost.group_sparsity) == (32, 32, 0)


def test_cost_equals_the_one_counted_by_hand():
    kept = {"q.weight": 32, "o.weight": 32, "fc1.weight": 128, "norm.weight": 8}
    cost = measure_cost(
        OPERATIONS,
        DENSE,
        kept,
        weight_bits={"q.weight": 4, "o.weight": 8},
        activation_bits={"q.weight": 8},
        axis_sizes=AXES,
        kept_axis_sizes={"heads": 2},
    )
    q, o, fc1, dense = 320 * 4 * 8, 320 * 8 * 32, 1280 * 32 * 32, (640 + 640 + 1280) * 32 * 32
    assert cost.relative_bops == pytest.approx((q + o + fc1) / dense)
    assert cost.relative_attention_bops == pytest.approx(2 / 4)
    assert cost.tensor_bytes == 32 * 4 / 8 + 32 * 8 / 8 + 4 * (128 + 8)
    assert cost.mean_weight_bits == 6
    assert cost.mean_activation_bits == 8
    assert cost.group_sparsity == pytest.approx(2 / 20)


def test_a_width_counts_once_for_a_weight_that_is_used_twice():
    operations = [Operation("first", "w", 100), Operation("second", "w", 100)]
    cost = measure_cost(operations, {"w": 10}, {"w": 10}, weight_bits={"w": 4})
    assert cost.tensor_bytes == 5
    assert cost.parameters == 10
    assert cost.relative_bops == 4 / 32


@given(compressions())
def test_relative_bops_lie_between_zero_and_one(compression):
    kept, weight_bits, activation_bits, kept_axes = compression
    cost = measure_cost(OPERATIONS, DENSE, kept, weight_bits, activation_bits, AXES, kept_axes)
    assert 0 < cost.relative_bops <= 1
    assert 0 < cost.relative_attention_bops <= 1
    assert 0 <= cost.group_sparsity < 1
    assert cost.tensor_bytes <= 4 * cost.dense_parameters


@given(compressions())
def test_the_whole_is_the_sum_of_its_operations(compression):
    kept, weight_bits, activation_bits, kept_axes = compression
    cost = measure_cost(OPERATIONS, DENSE, kept, weight_bits, activation_bits, AXES, kept_axes)
    weighted = [row for row in cost.rows() if row["weight"] is not None]
    assert [row["name"] for row in cost.rows()] == [op.name for op in OPERATIONS]
    mean = sum(row["relative_bops"] * row["dense_macs"] for row in weighted) / sum(r["dense_macs"] for r in weighted)
    assert cost.relative_bops == pytest.approx(mean)


@given(compressions(), st.sampled_from(["q.weight", "o.weight", "fc1.weight"]))
def test_one_bit_more_never_costs_less(compression, name):
    kept, weight_bits, activation_bits, kept_axes = compression
    weight_bits = {name: 4, **weight_bits}
    more = weight_bits | {name: weight_bits[name] + 1}
    before, after = (
        measure_cost(OPERATIONS, DENSE, kept, bits, activation_bits, AXES, kept_axes) for bits in (weight_bits, more)
    )
    assert after.relative_bops > before.relative_bops
    assert after.tensor_bytes >= before.tensor_bytes
    assert after.mean_weight_bits > before.mean_weight_bits


@given(st.integers(2, 16), st.integers(1, 10_000))
def test_bytes_of_a_quantized_weight_are_whole(bits, elements):
    cost = measure_cost([Operation("w", "w", elements)], {"w": elements}, {"w": elements}, weight_bits={"w": bits})
    assert cost.tensor_bytes == math.ceil(bits * elements / 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept_numel": DENSE | {"q.weight": 65}}, "q.weight: 65 kept of 64"),
        ({"kept_numel": {"q.weight": 64}}, "different parameters"),
        ({"weight_bits": {"typo.weight": 4}}, "typo.weight: a width is given"),
        ({"kept_axis_sizes": {"heads": 5}}, "heads: 5 kept of 4"),
        ({"dense_numel": {"q.weight": 64}, "kept_numel": {"q.weight": 64}}, "no size for it"),
    ],
)
def test_sizes_and_widths_that_do_not_fit_are_refused(arguments, message):
    arguments = {"dense_numel": DENSE, "kept_numel": DENSE, "axis_sizes": AXES} | arguments
    with pytest.raises(ValueError, match=message):
        measure_cost(OPERATIONS, **arguments)
