"""The families that people use: the axes that their code suggests, no more and no fewer, and the law on all of them."""

from __future__ import annotations

import pytest

from hf_geta import GETAConfig, build_qadg
from hf_geta.quantization import quantize_modules_
from tests.graph.named_families import CASES
from tests.zoo.law import Record, check_law


@pytest.mark.parametrize("name", CASES)
def test_family_has_the_axes_of_its_architecture_and_pruned_equals_masked_and_loaded(name):
    case = CASES[name]
    record = check_law(case.build(), case.inputs, Record(case.model, name, ""))
    assert record.sizes == case.axes


@pytest.mark.parametrize("name", CASES)
def test_quantized_model_has_the_axes_of_the_float_model(name):
    case = CASES[name]
    model = case.build()
    qadg = build_qadg(model, case.inputs, verify=False)
    quantize_modules_(model, GETAConfig(weight_bits=(4, 8), activation_bits=(4, 8)))
    quantized = build_qadg(model, case.inputs, verify=False)
    assert str(quantized).partition("Frozen")[0] == str(qadg).partition("Frozen")[0]
    for axis, same in zip(quantized.axes, qadg.axes, strict=True):
        for member, other in zip(axis.members, same.members, strict=True):
            assert (member.tensor, member.dim, member.indices.tolist()) == (
                other.tensor,
                other.dim,
                other.indices.tolist(),
            )
    assert quantized.operations == qadg.operations
