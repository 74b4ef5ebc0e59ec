"""The families that people use: the axes that their code suggests, no more and no fewer, and the law on all of them."""

from __future__ import annotations

import pytest

from tests.graph.named_families import CASES
from tests.zoo.law import Record, check_law


@pytest.mark.parametrize("name", CASES)
def test_family_has_the_axes_of_its_architecture_and_pruned_equals_masked_and_loaded(name):
    case = CASES[name]
    record = check_law(case.build(), case.inputs, Record(case.model, name, ""))
    assert record.sizes == case.axes
