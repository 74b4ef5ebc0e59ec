"""Layers that read the very same tensor, found by running the model: their one input quantizer, their one width."""

import pytest
import torch
import transformers
from torch import nn

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.readers import readers_of_one_tensor

IDS = {"input_ids": torch.arange(12).view(2, 6)}
VALUES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**VALUES, intermediate_size=24))


def expected():
    """What is one product in programs that fuse layers."""
    sets = []
    for layer in ("model.layers.0", "model.layers.1"):
        sets.append({f"{layer}.self_attn.{name}_proj" for name in "qkv"})
        sets += [{f"{layer}.self_attn.o_proj"}, {f"{layer}.mlp.down_proj"}]
        sets.append({f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"})
    return sets


def test_queries_keys_and_values_read_one_tensor_and_gate_and_up_another():
    model = tiny_llama()
    layers = {
        name: module for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)
    }
    found = readers_of_one_tensor(layers, lambda: model(**IDS))
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected()))


def test_a_tensor_that_is_handed_over_by_name_is_read_as_well():
    layers, x = {name: nn.Linear(4, 4) for name in ("first", "second", "third")}, torch.randn(2, 4)

    def forward():
        layers["first"](input=x)
        layers["third"](input=layers["second"](x))

    assert readers_of_one_tensor(layers, forward) == [["first", "second"], ["third"]]


def test_a_layer_that_is_called_once_more_than_another_reads_something_else():
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)

    def forward():
        second(first(x))
        second(x)

    assert readers_of_one_tensor({"first": first, "second": second}, forward) == [["first"], ["second"]]


def test_a_layer_that_is_never_called_is_by_itself():
    layers = {"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}
    found = readers_of_one_tensor(layers, lambda: layers["used"](torch.randn(2, 4)))
    assert found == [["used"], ["unused"], ["idle"]]


def trained(config, steps=20):
    model = prepare_model(tiny_llama().train(), config, IDS)
    optimizer = create_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps)
    for _ in range(steps):
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_with_shared_inputs_what_reads_one_tensor_rounds_it_alike_before_and_after_training():
    config = GETAConfig(group_sparsity=0.25, activation_bits=(4, 8), share_inputs=True, pruning_periods=2)
    model, _ = trained(config)
    assert len({id(layer.input_quantizer) for layer in quantized_layers(model).values()}) == len(expected())
    written = finalize_model(model).config.quantization_config["layers"]
    keys = ("activation_bits", "activation_step_size", "activation_signed")
    for names in expected():
        assert len({tuple(written[name][key] for key in keys) for name in names}) == 1


@pytest.mark.parametrize("activation_bits", [None, (8, 8)])
@pytest.mark.parametrize("target", [{"target_bops": 0.16}, {"target_size": "16KB"}])  # the least is 13 KB
def test_with_shared_inputs_a_budget_gives_what_reads_one_tensor_one_width(target, activation_bits):
    """Without, it gives several; either way the budget is met, and no width can be raised without leaving it."""
    widths = {"weight_bits": (2, 8), "activation_bits": activation_bits, "pruning_periods": 2}
    if "target_bops" in target and activation_bits is not None:
        target = {"target_bops": 0.115}  # the head of the model, in float, is most of it
    differ = []
    for share_inputs in (False, True):
        model, optimizer = trained(GETAConfig(**target, **widths, share_inputs=share_inputs))
        assert -0.05 < optimizer.targets.gap(optimizer.removed) <= 1e-6
        layers = finalize_model(model).config.quantization_config["layers"]
        differ.append([len({layers[name]["bits"] for name in names}) > 1 for names in expected()])
    assert any(differ[0])
    assert not any(differ[1])
