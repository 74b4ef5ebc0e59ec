"""Axes that nobody gets who does not ask: the queries of a key-value group, the size of a head."""

import pytest

from hf_geta import build_qadg, verify_qadg
from tests.graph.conftest import make_inputs, make_model

# family, asked for -> kind -> sizes; rotary embeddings fix the size of a head in what code rebuilds
CASES = {
    ("llama", "query_head"): {"query_head": [2, 2], "mlp": [24, 24]},
    ("llama", "head_dim"): {"kv_group": [4, 4], "mlp": [24, 24]},
    ("vit", "query_head"): {"attention_head": [4, 4], "mlp": [24, 24]},
    ("vit", "head_dim"): {"head_dim": [8, 8], "mlp": [24, 24]},
    ("gpt2", "head_dim"): {"head_dim": [8, 8], "mlp": [24, 24]},
    ("bert", "head_dim"): {"head_dim": [8, 8], "mlp": [24, 24, 32]},
}


@pytest.mark.parametrize(("family", "asked"), CASES)
def test_an_axis_that_is_asked_for_comes_instead_of_its_rival_and_keeps_the_law(family, asked):
    model = make_model(family)
    inputs = make_inputs(model)
    qadg = build_qadg(model, inputs, optional=[asked])
    found = {}
    for axis in qadg.axes:
        found.setdefault(axis.kind, []).append(axis.size)
    assert found == CASES[family, asked]
    assert all(asked == axis.kind for axis in qadg.axes if axis.name.endswith(("query_heads", "head_dim")))
    verification = verify_qadg(model, inputs, qadg, seed=2)
    assert verification.holds, str(verification)


def test_a_kind_that_does_not_exist_is_named_with_those_that_do():
    model = make_model("vit")
    with pytest.raises(ValueError, match="optional=.*'width'.*query_head, head_dim"):
        build_qadg(model, make_inputs(model), optional=["width"])
