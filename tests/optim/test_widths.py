"""Widths as vectors: what they are projected onto."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.optim.widths import WidthTable, nearest_allowed
from hf_geta.quantization.quantizers import Quantizer

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


def quantizer_with_gradients(bits, gradient):
    quantizer = Quantizer()
    quantizer.set_range_(2.0, bits)
    for parameter in quantizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    quantizer.log_step_size.grad.fill_(gradient)
    return quantizer


@pytest.mark.parametrize(
    ("bits", "gradient", "is_handed_on"),
    [(8, 1.0, True), (8, -1.0, False), (4, -1.0, True), (4, 1.0, False), (6, 1.0, False), (6, -1.0, False)],
)
def test_what_a_step_size_cannot_follow_is_handed_to_its_clip(bits, gradient, is_handed_on):
    """A descent that makes d finer ends at the upper bound of the width, 8 bits, one that makes it coarser at 4."""
    quantizer = quantizer_with_gradients(bits, gradient)
    WidthTable([quantizer]).fold_step_size_gradients_(torch.tensor([4.0]), torch.tensor([8.0]))
    handed = gradient if is_handed_on else 0.0
    assert quantizer.log_clip_max.grad == handed  # t = 1
    assert quantizer.log_exponent.grad == pytest.approx(handed * math.log(2.0))


def test_no_quantizers_make_empty_vectors():
    table = WidthTable([])
    table.project_(table.bits(), table.bits())
    table.fold_step_size_gradients_(table.bits(), table.bits())
    assert table.bits().shape == table.exponent().shape == table.log_range().shape == (0,)
