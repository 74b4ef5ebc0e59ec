"""What random runs found, each by its smallest example; what it was about is in the name."""

import copy

from hf_geta import build_qadg
from hf_geta.measure import output_difference
from tests.fuzz.law import EXACT, run_or_refusal
from tests.fuzz.modules import make_batch, make_model

EIGHT = {"weight_bits": (8, 8), "warmup_steps": 2, "projection_steps": 4, "joint_steps": 4, "bit_reduction": 16}
EIGHT |= {"pruning_periods": 1}


def test_a_model_without_anything_to_prune_is_told_to_be_only_quantized():
    model = ("image", 3, [["pool", "mean"], ["image_norm", "group", 3]], False)
    assert "write group_sparsity=0" in run_or_refusal(model, EIGHT, "adamw")
    assert (
        run_or_refusal(("vectors", 4, [["linear", 4, "bias"]], False), EIGHT | {"group_sparsity": 0}, "sgd") == "kept"
    )


def test_a_model_is_refused_whose_every_parameter_would_be_packed():
    """OLMo is one, with its embeddings quantized: no biases, and norms without weights."""
    model = ("text", 4, [["linear", 12, "none"], ["linear", 4, "none"]], True)
    options = EIGHT | {"quantize_embeddings": 8, "group_sparsity": 0.5}
    assert "modules_to_not_convert=['head']" in run_or_refusal(model, options, "adamw")
    assert run_or_refusal(model, options | {"quantize_embeddings": None}, "adamw") == "kept"


def test_halves_that_a_chunk_cuts_shrink_together_or_not_at_all():
    """Of two entries each: torch cuts what is left at multiples of half of it, so that one half cannot shrink alone."""
    steps = [["linear", 4, "bias"], ["split", [["linear", 4, "bias"]], "cat"], ["split", [["slice", 2, 1]], "cat"]]
    model, inputs = (
        make_model("text", 4, [*steps, ["mlp", 3, "gelu", "plain"]]).eval(),
        {"x": make_batch("text", 4)["x"]},
    )
    qadg = build_qadg(model, inputs)
    assert len(qadg.axes) == 3
    for axis in qadg.axes:
        masked = copy.deepcopy(model)
        qadg.zero_(masked, {axis.name: [0]})
        assert output_difference(masked, qadg.prune(model, {axis.name: [0]}), inputs) < EXACT
