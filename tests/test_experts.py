"""Laws of mixtures of experts: stacked weights are quantized, pruned, packed and counted, routers are left alone."""

import pytest
import torch
import yaml
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
    default_data_collator,
)

from hf_geta import (
    GETAConfig,
    GETAQuantizationConfig,
    GETATrainer,
    create_optimizer,
    finalize_model,
    prepare_model,
    set_backend_,
)
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.export.dense import write_dense
from hf_geta.measure import float_inputs, measure_compression, output_difference
from hf_geta.plan.plan import make_plan
from hf_geta.plan.run import read_run
from hf_geta.quantization.experts import StackedLinear, router_names, split_experts_
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from hf_geta.report.check import check_folder
from tests.checkpoint.numpy_reader import read_weights
from tests.zoo.configs import tiny_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that a wrong expert or step size shows
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
EXPERTS, PER_TOKEN = 4, 2
QWEN = {**SIZES, "num_experts": EXPERTS, "moe_intermediate_size": 24}
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=16)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN)),
    "gpt_oss": lambda: GptOssForCausalLM(  # (experts, in, out), biases, gate and up in turn
        GptOssConfig(**SIZES, num_local_experts=EXPERTS, sliding_window=6)
    ),
}
CONFIG = {"weight_bits": [4, 8], "activation_bits": [8, 8], "initial_bits": 8, "granularity": "block"}
PROMPTS = torch.tensor([[5, 9, 33, 2, 17], [1, 60, 8, 8, 40]])
TOKENS = PROMPTS.numel()


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # zero at the start, where they could be lost unseen
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prepared(family, **changes):
    return prepare_model(build(family), GETAConfig(**CONFIG | changes), {"input_ids": PROMPTS})


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """(masked, small): a third of the groups of every axis gone."""
    masked = prepared(request.param)
    masked.geta.qadg.zero_(masked, {axis.name: list(range(0, axis.size, 3)) for axis in masked.geta.qadg.axes})
    return masked, finalize_model(masked).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_as_layers_compute_what_the_stack_did_and_give_its_parameters_the_same_gradients(family):
    stacked, split = build(family), build(family)
    parameters = [module.experts.gate_up_proj for module in split.modules() if hasattr(module, "experts")]
    split_experts_(split)
    for module in split.modules():
        if hasattr(module, "experts"):
            assert module.experts.gate_up_proj.weight is parameters.pop(0)
    results = []
    for model in (stacked, split):
        logits = model(input_ids=PROMPTS).logits
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in model.parameters() if p.ndim == 3]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert len(results[0][1]) == 4
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)


def test_experts_that_share_their_weights_stay_stacked(caplog):
    """As those of an encoder and a decoder that are tied: transformers saves them by the names of the stacks."""
    model = build("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    split_experts_(model)
    assert not any(isinstance(module, StackedLinear) for module in model.modules())
    assert "model.layers.1.mlp.experts: experts of this kind stay in float" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_has_a_step_size_of_its_own_and_a_layer_one_width(family):
    model = build(family)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "experts"):
                module.experts.down_proj[1] *= 100
    prepare_model(model, GETAConfig(**CONFIG), {"input_ids": PROMPTS})
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, StackedLinear)}
    assert len(layers) == 4
    for name, layer in layers.items():
        assert layer.weight_quantizer.bits.item() == 8
        assert layer.input_quantizer.enabled
        assert (layer.weight_quantizer.codes(layer.weight).abs().amax((1, 2)) == 127).all()
        scales = layer.weight_quantizer.channel_scale.flatten()
        assert len(scales) == EXPERTS
        assert scales[1] > (20 if name.endswith("down_proj") else 0) * scales[0]


def test_rounding_the_experts_moves_the_output(models):
    masked, _ = models
    with float_inputs(masked):
        rounded = masked(input_ids=PROMPTS).logits
        for layer in quantized_layers(masked).values():
            if isinstance(layer, StackedLinear):
                layer.weight_quantizer.enabled = False
        unrounded = masked(input_ids=PROMPTS).logits
        for layer in quantized_layers(masked).values():
            layer.weight_quantizer.enabled = True
        assert not torch.allclose(rounded, unrounded, rtol=1e-4, atol=1e-4)
        assert torch.equal(masked(input_ids=PROMPTS).logits, rounded)


def test_the_small_model_computes_what_the_masked_one_does_with_fewer_hidden_units_and_the_same_router(models):
    masked, small = models
    assert output_difference(masked, small, {"input_ids": PROMPTS}) < 1e-5
    stacks = [layer for layer in small.modules() if isinstance(layer, StackedLinear)]
    assert len(stacks) == 4
    assert all(isinstance(layer, PackedLayer) for layer in stacks)
    dense = [layer.weight.numel() for layer in masked.modules() if isinstance(layer, StackedLinear)]
    assert all(layer.weight.numel() < numel for layer, numel in zip(stacks, dense, strict=True))
    routers = [
        [p for name, p in model.named_parameters() if ".gate." in name or ".router." in name] for model in models
    ]
    assert len(routers[0]) >= 2
    for ours, theirs in zip(*routers, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "model_type", ["afmoe", "dbrx", "hunyuan_v1_moe", "jetmoe", "longcat_flash", "qwen2_moe", "switch_transformers"]
)
def test_routers_that_are_linear_layers_stay_in_float(model_type):
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_config(model_type))
    routers = router_names(model)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in routers)
    assert routers
    assert not routers & set(quantize_modules_(model, GETAConfig(granularity="channel")))


def test_a_gate_is_a_router_beside_experts_only():
    def mlp(**more):
        return nn.ModuleDict({"gate": nn.Linear(4, 4), "gate_proj": nn.Linear(4, 4), **more})

    model = nn.ModuleDict({"gated": mlp(), "mixture": mlp(experts=nn.ModuleList([mlp()]))})
    assert router_names(model) == {"mixture.gate"}


def test_a_loaded_model_computes_the_same_with_every_backend_and_saves_the_same_bytes(models, tmp_path):
    _, small = models
    small.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for backend in ("reference", "packed", "auto"):
        set_backend_(loaded, backend)
        set_backend_(small, backend)
        assert torch.equal(loaded(input_ids=PROMPTS).logits, small(input_ids=PROMPTS).logits)
    set_backend_(small, "auto")
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_text_is_that_of_the_masked_model_with_every_cache(models, tmp_path):
    masked, small = models
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        text, *others = [
            model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **options, **cache)
            for model in (small, masked, loaded)
        ]
        assert all(torch.equal(text, other) for other in others), cache
        assert text.shape == (2, 17)
        assert len(set(text[0, 5:].tolist())) > 3  # it says more than one thing


def test_packed_experts_decode_one_by_one_to_what_they_are_together(models):
    _, small = models
    for layer in small.modules():
        if isinstance(layer, StackedLinear):
            together = layer.weight
            layer.set_backend_("packed")
            assert torch.equal(torch.stack([layer.per_expert()[expert] for expert in range(EXPERTS)]), together)
            layer.set_backend_("auto")


def test_numpy_reads_the_weights_of_experts(models, tmp_path):
    _, small = models
    small.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    stacks = {name: layer for name, layer in small.named_modules() if isinstance(layer, StackedLinear)}
    for name, layer in stacks.items():
        _, _, number, *_, last = name.split(".")
        (in_file,) = (key for key in weights if f"layers.{number}." in key and key.endswith(f"experts.{last}"))
        assert torch.equal(torch.from_numpy(weights[in_file]), layer.weight)


def test_a_dequantized_model_has_stacked_parameters_again_and_loads_as_a_pruned_one(models, tmp_path):
    _, small = models
    small.save_pretrained(tmp_path / "packed")
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=GETAQuantizationConfig(dequantize=True)
    )
    assert not any(isinstance(module, StackedLinear) for module in dense.modules())
    with float_inputs(small):
        torch.testing.assert_close(
            dense(input_ids=PROMPTS).logits, small(input_ids=PROMPTS).logits, rtol=1e-4, atol=1e-4
        )
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(input_ids=PROMPTS).logits, dense(input_ids=PROMPTS).logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_of_the_experts_only_those_that_a_token_goes_to_count_as_operations(family):
    model = prepared(family)
    stacks = [op for op in measure_compression(model).operations if op.weight and ".experts." in op.weight]
    assert len(stacks) == 4
    for operation in stacks:
        _, *matrix = model.get_parameter(operation.weight).shape
        assert operation.dense_macs == TOKENS * PER_TOKEN * matrix[0] * matrix[1]
        assert (operation.weight_bits, operation.activation_bits) == (8, 8)


def test_a_run_prunes_the_hidden_units_of_experts_and_brings_their_widths_into_range():
    changes = {"weight_bits": [4, 4], "initial_bits": 16, "bit_reduction": 6}
    model = prepared("qwen2_moe", group_sparsity=0.25, pruning_periods=2, **changes)
    model.train()
    optimizer = create_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), total_steps=24)
    for _ in range(24):
        model(input_ids=PROMPTS, labels=PROMPTS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    cost = measure_compression(model, finalized=True)
    assert cost.group_sparsity == pytest.approx(0.25, abs=0.01)
    small = finalize_model(model.eval()).eval()
    assert {layer.manifest.bits for layer in small.modules() if isinstance(layer, PackedLayer)} == {4}
    widths = [layer.weight.shape[2] for name, layer in small.named_modules() if name.endswith("experts.down_proj")]
    assert min(widths) < QWEN["moe_intermediate_size"]
    with float_inputs(model), float_inputs(small):
        assert output_difference(model, small, {"input_ids": PROMPTS}) < 1e-4


def test_a_uniform_model_exports_as_an_ordinary_one(tmp_path):
    model = prepared("qwen3_moe", uniform=True)
    for axis in model.geta.qadg.axes:
        model.geta.qadg.zero_(model, {axis.name: list(range(8 if axis.size == 24 else 1))})
    small = finalize_model(model).eval()
    with float_inputs(small):
        expected = small(input_ids=PROMPTS).logits
    write_dense(small, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.moe_intermediate_size == 16
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(input_ids=PROMPTS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", ["experts", "down_proj"])
def test_experts_that_are_not_to_be_converted_stay_stacked_and_in_float(named):
    model = prepared("mixtral", modules_to_not_convert=["lm_head", named])
    assert not any(isinstance(module, StackedLinear) for module in model.modules())
    assert model.model.layers[0].mlp.experts.gate_up_proj.ndim == 3
    assert any(".experts." in member.tensor for axis in model.geta.qadg.axes for member in axis.members)


def test_experts_without_a_gate_stay_in_float_with_a_warning(caplog):
    config = NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["attention", "moe"], n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1,
    )  # fmt: skip
    model = NemotronHForCausalLM(config)
    split_experts_(model)
    assert not any(isinstance(module, StackedLinear) for module in model.modules())
    assert "experts of this kind stay in float" in caplog.text


def test_a_model_of_which_only_experts_would_be_packed_is_refused_and_left_as_it_was():
    model = build("mixtral")
    before = dict(model.named_parameters())
    config = GETAConfig(**CONFIG, modules_to_not_convert=["self_attn", "lm_head"])
    with pytest.raises(ValueError, match="only experts would be quantized"):
        prepare_model(model, config, {"input_ids": PROMPTS})
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_plan_knows_the_widths_the_groups_and_the_memory_of_experts(tmp_path):
    Qwen3MoeConfig(**QWEN, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path / "model")
    run = {
        "dataset_name": "some/text",
        "block_size": 16,
        "max_steps": 40,
        "per_device_train_batch_size": 2,
        "geta": {**CONFIG, "weight_bits": [4, 4], "group_sparsity": 0.25},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    plan = make_plan(read_run(tmp_path / "run.yaml", model=str(tmp_path / "model")))
    experts = plan.dense.parameters - sum(
        parameter.numel() for name, parameter in build("qwen3_moe").named_parameters() if ".experts." not in name
    )
    assert plan.ends[0].file_bytes < 4 * (plan.dense.parameters - experts) + experts  # experts at 4 bits
    assert plan.memory.activations is not None


def test_a_trained_model_resumes_bit_for_bit_and_its_folder_holds_what_it_says(tmp_path):
    blocks = [{"input_ids": row, "labels": row} for row in PROMPTS.repeat(8, 1)]

    def trainer(folder):
        config = GETAConfig(**CONFIG | {"weight_bits": [4, 4]}, group_sparsity=0.25, pruning_periods=2)
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=16, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=8,
            report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = build("qwen3_moe").train()
        return GETATrainer(model, args, default_data_collator, geta_config=config, train_dataset=blocks)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    theirs = resumed.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.model.state_dict().items())
    whole.save_model(str(tmp_path / "saved"))
    checks = list(check_folder(tmp_path / "saved"))
    assert [check for check in checks if not check.holds] == []
    assert len(checks) > 5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with float_inputs(loaded), float_inputs(whole.model):
        assert output_difference(whole.model, loaded, {"input_ids": PROMPTS}) < 1e-4
