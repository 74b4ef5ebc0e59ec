import json

import benchmark_inference
import inference_models
import pytest
from inference_models import VARIANTS, load, save_all, workloads
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TINY_MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**TINY, image_size=16, patch_size=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2, vocab_size=32)),
}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_variant_of_a_model_is_measured_and_lands_in_the_table(name, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_inference, "VARIANTS", VARIANTS[:6])  # those that need nothing else installed
    monkeypatch.setattr(benchmark_inference, "MODELS", TINY_MODELS)
    monkeypatch.setattr(benchmark_inference, "small_model", lambda name: TINY_MODELS[name]())
    monkeypatch.setattr(benchmark_inference, "memory", benchmark_inference._memory_here)  # not six processes
    figures = benchmark_inference.main(
        ["--models", name, "--rounds", "1", "--batch_size", "2", "--output", str(tmp_path / "figures.json")]
    )
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    measured = figures["models"][name]
    names = [variant.name for variant in VARIANTS[:6]]
    assert all(list(by_variant) == names for by_variant in measured["latency_seconds"].values())
    files = {variant: taken["file_bytes"] for variant, taken in measured["memory"].items()}
    assert files["packed, auto"] < files["pruned, float32"] < files["dense, float32"]
    rows = benchmark_inference.table(figures).splitlines()
    assert rows[2].startswith("| dense, float32 | 1.00x")
    assert len(rows) == 2 + len(names) + 2
    measured["memory"]["dense, float32"]["resident_bytes"] = 0  # it fits into pages that the process has already
    resident = [row.split(" | ")[-2] for row in benchmark_inference.table(figures).splitlines()[2 : 2 + len(names)]]
    assert set(resident) == {"-"}


def test_the_packed_model_is_the_pruned_one_in_integers_of_the_widths_that_are_said(tmp_path):
    save_all(TINY_MODELS["llama"](), tmp_path)
    pruned, packed = (load(tmp_path, VARIANTS[i]) for i in (2, 4))
    layers = packed.config.quantization_config.manifest.layers.values()
    assert {layer.bits for layer in layers} == {4, 8}
    assert {layer.activation_bits for layer in layers} == {8}
    assert (
        pruned.model.layers[0].mlp.up_proj.weight.shape == packed.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    )


def test_a_next_token_leaves_the_cache_as_long_as_it_was(tmp_path):
    model = TINY_MODELS["llama"]().eval()
    lengths = []

    def note(module, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers 5.24 renamed it
        lengths.append(cache.get_seq_length())

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    step = workloads("llama", model, 2)["next token, batch 2"]
    step(), step(), handle.remove()
    prompt = inference_models.PROMPT_TOKENS
    assert lengths == [0, prompt, prompt]
