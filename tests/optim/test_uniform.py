"""Whole runs with `uniform=True`: the layers of a family keep equally many groups, at every step."""

import io
import logging

import pytest
import torch
import transformers

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model
from hf_geta.checkpoint.prune import slice_
from hf_geta.export.formats import export_checkpoint
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.measure import measure_compression
from tests.optim.test_qasso import CONFIG, OPTIMIZERS, TOTAL_STEPS, batch, tiny_vit, train

UNIFORM = CONFIG.to_dict() | {"uniform": True}
# 4 bits everywhere are 1.6 % of the bit operations: groups have to go
BUDGET = {"target_bops": 0.012, "group_sparsity": None, "weight_bits": [4, 8], "activation_bits": [4, 8]}


def started(changes):
    config = GETAConfig.from_dict(UNIFORM | changes)
    model = prepare_model(tiny_vit().train(), config, {"pixel_values": batch(0)["pixel_values"]})
    return model, create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)


def kept_per_family(model, optimizer):
    """What is left of the axes of each family, as a set."""
    gone = dict(zip(optimizer.space.axis_names, optimizer.removed.split(optimizer.space.axis_sizes), strict=True))
    return [{int((~gone[axis]).sum()) for axis in family.axes} for family in model.geta.families]


@pytest.mark.parametrize(
    "changes",
    [{"group_divisible": 5, "min_groups": 2}, BUDGET | {"group_divisible": 8, "group_sparsity": 0.6}],
    ids=str,
)
def test_layers_of_a_family_keep_equally_many_groups_at_every_step_and_what_is_left_can_be_exported(changes, tmp_path):
    model, optimizer = started(changes)
    for _ in train(model, optimizer, range(TOTAL_STEPS)):
        assert all(len(sizes) == 1 for sizes in kept_per_family(model, optimizer))
    removed = model.geta.qadg.zero_groups(model)
    assert sum(map(len, removed.values())) == int(optimizer.removed.sum()) == optimizer.groups_to_remove > 0
    if "target_bops" in changes:
        assert measure_compression(model).relative_bops <= changes["target_bops"] * (1 + 1e-6)
    for family, (kept,) in zip(model.geta.families, kept_per_family(model, optimizer), strict=True):
        divisible = changes.get("group_divisible", 1)
        assert kept >= changes.get("min_groups", 1)
        assert family.sizes[-1] <= divisible or kept == family.sizes[-1] or kept % divisible == 0
    finalize_model(model).save_pretrained(tmp_path / "compressed")
    export_checkpoint(tmp_path / "compressed", tmp_path / "out", "dense")


def test_a_resumed_run_equals_the_uninterrupted_run():
    stop, changes = 26, {"share_inputs": True}
    model, optimizer = started(changes)
    list(train(model, optimizer, range(stop)))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    list(train(model, optimizer, range(stop, TOTAL_STEPS)))
    resumed, second = started(changes)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    list(train(resumed, second, range(stop, TOTAL_STEPS)))
    assert torch.equal(optimizer.removed, second.removed)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_number_of_groups_that_lockstep_does_not_reach_becomes_the_nearest_and_is_logged(caplog):
    """Two layers lose groups in pairs: 27 of 56 become 28."""
    _, optimizer = started({"group_sparsity": 27 / 56})
    assert optimizer.groups_to_remove == 28
    assert any(
        "asks for 27 of 56 groups" in record.message and "uniform" in record.message for record in caplog.records
    )


def test_axes_that_no_config_states_stay_whole_are_not_counted_and_that_is_logged(caplog):
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
        )
    )
    with caplog.at_level(logging.WARNING):
        prepare_model(model, GETAConfig(uniform=True), example_inputs(model))
    assert "bert.encoder.layer.{0..1}.attention.heads" in caplog.text
    assert "stay whole: no field of BertConfig states their size alone" in caplog.text
    assert {axis.kind for axis in model.geta.qadg.axes} == {"mlp"}
    assert "states its size alone" in model.geta.qadg.explain("bert.encoder.layer.0.attention.self.query.weight")


def test_only_numbers_of_heads_that_the_config_takes_are_left():
    """LlamaConfig refuses numbers of heads that do not divide the width, even where the size of a head is stated."""
    values = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(**values, num_attention_heads=8, head_dim=4)
    model = transformers.LlamaForCausalLM(config)
    prepare_model(model, GETAConfig(uniform=True), example_inputs(model))
    assert {family.sizes for family in model.geta.families} == {(1, 2, 4, 8), tuple(range(1, 25))}


def test_with_a_frozen_layer_its_whole_family_stays_whole():
    config = GETAConfig.from_dict(UNIFORM)
    model = prepare_model(tiny_vit().train(), config, {"pixel_values": batch(0)["pixel_values"]})
    model.vit.layers[0].mlp.fc1.weight.requires_grad_(False)
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    assert set(optimizer.space.axis_kinds) == {"attention_head"}


def test_a_model_that_its_config_does_not_build_is_refused():
    model = tiny_vit()
    slice_(model, {name: {dim: torch.arange(7)} for name, dim in _hidden_of_the_first_layer()})
    with pytest.raises(ValueError, match="ViTConfig does not build this ViTForImageClassification"):
        prepare_model(model, GETAConfig(uniform=True), {"pixel_values": batch(0)["pixel_values"]})


def _hidden_of_the_first_layer():
    mlp = "vit.layers.0.mlp"
    return [(f"{mlp}.fc1.weight", 0), (f"{mlp}.fc1.bias", 0), (f"{mlp}.fc2.weight", 1)]
