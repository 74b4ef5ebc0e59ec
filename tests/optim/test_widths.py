"""Widths as vectors: what they are projected onto."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.optim.widths import WidthTable, nearest_allowed

allowed_sets = st.sets(st.integers(2, 16), min_size=1).map(sorted)


@given(st.lists(st.floats(1, 17), max_size=8), allowed_sets)
def test_every_width_goes_to_the_nearest_allowed_one_and_a_tie_to_the_wider(bits, allowed):
    found = nearest_allowed(torch.tensor(bits, dtype=torch.float64), allowed).tolist()
    assert found == [min(allowed, key=lambda width: (abs(width - b), -width)) for b in bits]


@given(allowed_sets)
def test_allowed_widths_stay_as_they_are(allowed):
    bits = torch.tensor(allowed, dtype=torch.float32)
    assert torch.equal(nearest_allowed(bits, allowed), bits)


def test_without_a_set_every_width_is_allowed():
    bits = torch.tensor([3.2, 5.0])
    assert nearest_allowed(bits, None) is bits


@pytest.mark.parametrize("bits", [2.0, 5.9, 6.0, 6.1, 30.0])
def test_one_width_is_projected_as_many_are(bits):
    assert nearest_allowed(torch.tensor(bits), (4, 8)).tolist() == nearest_allowed(torch.tensor([bits]), (4, 8)).item()


def test_no_quantizers_make_empty_vectors():
    table = WidthTable([])
    table.project_(table.bits(), table.bits())
    table.fold_step_size_gradients_()
    assert table.bits().shape == table.exponent().shape == table.log_range().shape == (0,)
