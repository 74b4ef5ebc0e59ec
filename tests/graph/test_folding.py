"""Folding names loses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.graph.folding import fold_names, format_numbers, unfold_name

STEPS = st.sampled_from(["a", "b", "w[0]", "0", "1", "2", "3", "7", "10", "01"])
NAMES = st.lists(st.lists(STEPS, min_size=1, max_size=4).map(".".join), max_size=30)


@given(NAMES, st.booleans())
def test_unfolding_inverts_folding(names, fold_words):
    unfolded = [name for folded in fold_names(names, fold_words) for name in unfold_name(folded)]
    assert sorted(unfolded) == sorted(set(names))


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"layers.{n}.mlp" for n in range(32)], ["layers.{0..31}.mlp"]),
        ([f"s.{i}.b.{j}" for i in range(2) for j in range(3)], ["s.{0..1}.b.{0..2}"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], ["s.0.b.{0..1}", "s.1.b.0"]),
        (["x.3", "x.1", "x.2", "x.9"], ["x.{1..3,9}"]),
        (["head"], ["head"]),
    ],
)
def test_names_that_differ_in_numbers_fold(names, folded):
    assert fold_names(names) == folded


def test_words_fold_only_on_request():
    assert fold_names(["a.q", "a.k"]) == ["a.q", "a.k"]
    assert fold_names(["a.q", "a.k"], fold_words=True) == ["a.{q,k}"]


def test_numbers_become_ranges():
    assert format_numbers([5, 0, 1, 2, 7, 8]) == "0..2,5,7..8"
