"""What random runs found, each by its smallest example; what it was about is in the name."""

from tests.fuzz.law import run_or_refusal

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
