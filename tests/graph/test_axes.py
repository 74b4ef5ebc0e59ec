"""The axis algebra keeps every entry at its place, whatever is unified, aligned or cut."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.graph.axes import (
    AxisNode,
    Reason,
    align,
    concatenation,
    cut,
    find,
    freeze,
    is_frozen,
    leaves,
    positions,
    product,
    reasons,
    size_after,
    tag,
    tags,
    unify,
)

WHY = Reason("because", "aten.op", "module")


def leaf(size: int) -> AxisNode:
    return AxisNode(size)


@st.composite
def trees(draw, depth: int = 2) -> AxisNode:
    """Nested products and concatenations of leaves of sizes 1 to 4."""
    if depth == 0 or draw(st.booleans()):
        return leaf(draw(st.integers(1, 4)))
    parts = [draw(trees(depth - 1)) for _ in range(draw(st.integers(2, 3)))]
    return draw(st.sampled_from([product, concatenation]))(parts)


@st.composite
def factorizations(draw, size: int) -> list[int]:
    """Sizes whose product is `size`, in any order, ones among them."""
    factors = []
    while size > 1:
        factor = draw(st.sampled_from([n for n in range(2, size + 1) if size % n == 0]))
        factors.append(factor)
        size //= factor
    return draw(st.permutations(factors + [1] * draw(st.integers(0, 1))))


def owned(axis: AxisNode) -> dict[AxisNode, list[list[int]]]:
    """leaf -> entries of each of its indices, sorted; leaves that cannot be pruned are left out."""
    found = {find(node): indices.sort(1).values.tolist() for node, indices in positions(axis).items()}
    return {node: indices for node, indices in found.items() if not is_frozen(node) and node.size > 1}


@given(trees())
def test_every_entry_of_an_axis_is_owned_once_by_every_path_to_a_leaf(axis):
    counts = torch.zeros(axis.size, dtype=torch.long)
    for node, indices in positions(axis).items():
        assert indices.shape[0] == node.size
        counts += torch.bincount(indices.flatten(), minlength=axis.size)
    assert (counts >= 1).all()  # in a product an entry belongs to one index of each factor
    assert sum(node.size > 0 for node in leaves(axis)) >= 1


@given(trees(), st.randoms(use_true_random=False))
def test_sizes_follow_the_leaves(axis, draw):
    sizes = {node: draw.randint(1, node.size) for node in leaves(axis)}
    kept = torch.ones(axis.size, dtype=torch.bool)
    for node, indices in positions(axis).items():
        kept[indices[sizes[node] :].flatten()] = False
    assert size_after(axis, sizes) == int(kept.sum())
    assert size_after(axis, {}) == axis.size


@given(st.lists(trees(1), min_size=1, max_size=3), st.data())
def test_aligned_axes_have_their_entries_where_the_factors_had_them(factors, data):
    size = math.prod(factor.size for factor in factors)
    sizes = data.draw(factorizations(size))
    result = align(factors, sizes)
    assert [axis.size for axis in result] == sizes
    before, after = owned(product(factors)), owned(product(result))
    assert all(before[node] == indices for node, indices in after.items() if node in before)
    assert set(after) == set(before)


@given(trees(), st.data())
def test_pieces_of_a_cut_axis_have_their_entries_where_the_axis_had_them(axis, data):
    bounds = sorted(data.draw(st.lists(st.integers(0, axis.size), max_size=3)))
    sizes = [end - start for start, end in itertools.pairwise([0, *bounds, axis.size])]
    pieces = cut(axis, sizes)
    assert [piece.size for piece in pieces] == sizes
    before, after = owned(axis), owned(concatenation(pieces))
    assert all(before[node] == indices for node, indices in after.items() if node in before)
    assert set(after) == set(before)


@given(trees(), trees())
def test_unified_axes_have_the_same_entries(first, second):
    size = math.lcm(first.size, second.size)
    first, second = (product((axis, leaf(size // axis.size))) for axis in (first, second))
    unify(first, second)
    assert owned(first) == owned(second)


@given(trees())
def test_a_leaf_takes_the_refinement_of_what_it_is_unified_with(axis):
    node = leaf(axis.size)
    unify(node, axis) if axis.size > 1 else None
    assert owned(node) == owned(axis)


def test_a_view_refines_an_axis_into_row_major_factors():
    axis = leaf(12)
    heads, size = align([axis], [4, 3])
    assert positions(axis)[find(heads)].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert positions(axis)[find(size)].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_a_fused_axis_seen_as_heads_keeps_its_pieces():
    fused = leaf(24)
    query, key, value = cut(fused, [8, 8, 8])
    outer, inner = align([fused], [6, 4])  # q, k and v have two heads of size 4 each
    assert (outer.size, inner.size) == (6, 4)
    heads = [align([piece], [2, 4]) for piece in (query, key, value)]
    assert all(find(pair[1]) is find(inner) for pair in heads)
    for (first, _), (second, _) in itertools.pairwise(heads):
        unify(first, second)
    assert positions(fused)[find(heads[0][0])].tolist() == [
        [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],
        [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23],
    ]


def test_grouped_queries_refine_heads_by_key_value_heads():
    heads, groups, queries = leaf(6), leaf(2), leaf(3)
    unify(heads, product((groups, queries)))
    assert positions(heads)[find(groups)].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_boundaries_that_do_not_divide_freeze_everything():
    first, second = leaf(6), leaf(4)
    assert all(map(is_frozen, align([first, second], [4, 6])))
    assert is_frozen(first)
    assert is_frozen(second)
    axis = product((leaf(3), leaf(4)))
    assert all(map(is_frozen, cut(axis, [6, 6])))
    assert is_frozen(axis)


def test_reasons_and_uses_pass_to_what_is_unified_or_refined_later():
    first, second = leaf(8), leaf(8)
    freeze(first, WHY)
    tag(second, "used")
    unify(first, second)
    outer, inner = align([second], [2, 4])
    for node in (outer, inner):
        assert reasons(node) == (WHY,)
        assert tags(node) == {"used"}
    assert str(WHY) == "because (aten.op in module)"


def test_freezing_one_factor_leaves_the_other_free():
    axis = leaf(12)
    heads, size = align([axis], [4, 3])
    freeze(size, WHY)
    assert not is_frozen(heads)
    assert not is_frozen(axis)
    assert set(owned(axis)) == {find(heads)}


def test_what_cannot_be_the_same_is_refused():
    with pytest.raises(ValueError, match="axes of sizes 2 and 3 cannot be the same axis"):
        unify(leaf(2), leaf(3))
    with pytest.raises(ValueError, match=r"axes of sizes \[2, 3\] cannot be read as \[4\]"):
        align([leaf(2), leaf(3)], [4])
    with pytest.raises(ValueError, match=r"an axis of size 5 cannot be cut into \[2, 2\]"):
        cut(leaf(5), [2, 2])
