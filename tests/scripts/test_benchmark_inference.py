import json
from pathlib import Path

import benchmark
import benchmark_alignment
import benchmark_inference
import benchmark_kernels
import inference_models
import pytest
import torch
from inference_models import VARIANTS, load, save_all, workloads
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hf_geta.checkpoint.integer import has_integer_kernel

SCRIPTS = Path(benchmark.__file__).parent
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


def test_a_size_is_compared_by_its_units(capsys):
    figures = benchmark_alignment.main(["--sizes", "9", "16", "--rounds", "1", "--rows", "2"])
    assert all(by_size[16] == 1 and by_size[9] > 0 for by_size in figures.values())
    assert "| hidden units | 9 | 16 |" in capsys.readouterr().out


def test_kernels_that_are_compared_make_the_same_product(capsys):
    figures = benchmark_kernels.main(["--outputs", "64", "--inputs", "96", "--rows", "3", "--rounds", "1"])[3]
    errors = {name: error for name, (_, error) in figures.items()}
    assert len(errors) == 5
    if not has_integer_kernel(torch.int8):  # without VNNI it may saturate
        errors.pop(benchmark_kernels.INT8)
    for name, error in errors.items():
        assert error < 1e-2 if name.endswith("bfloat16") else error == 0, name
    assert "| rows | 3 | largest error |" in capsys.readouterr().out


def test_one_program_measures_every_topic(capsys):
    assert set(benchmark.TOPICS) == {path.stem.removeprefix("benchmark_") for path in SCRIPTS.glob("benchmark_*.py")}
    figures = benchmark.main(["alignment", "--sizes", "9", "16", "--rounds", "1", "--rows", "2"])
    assert set(figures) == set(benchmark_alignment.KINDS)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "--steps_per_stage" in capsys.readouterr().out  # of training, which goes without its name
    with pytest.raises(SystemExit, match="there is no topic infrence; write one of training, inference"):
        benchmark.main(["infrence"])
