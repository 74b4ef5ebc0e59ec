"""Laws of the program that measures, and of its short topics."""

import json
from pathlib import Path

import benchmark
import benchmark_alignment
import benchmark_kernels
import benchmark_training
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_geta.checkpoint.integer import has_integer_kernel

SCRIPTS = Path(benchmark.__file__).parent


def test_one_program_measures_every_topic(capsys):
    assert set(benchmark.TOPICS) == {path.stem.removeprefix("benchmark_") for path in SCRIPTS.glob("benchmark_*.py")}
    figures = benchmark.main(["alignment", "--sizes", "9", "16", "--rounds", "1", "--rows", "2"])
    assert set(figures) == set(benchmark_alignment.KINDS)
    capsys.readouterr()
    benchmark.main([])
    told = capsys.readouterr().out
    assert all(f"benchmark.py {topic} " in told for topic in benchmark.TOPICS)
    with pytest.raises(SystemExit, match="there is no topic infrence; write one of training, inference"):
        benchmark.main(["infrence"])


@pytest.fixture
def tiny_llama(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_language_model_is_trained_by_the_config_of_a_decoder_and_a_vit_by_three(tiny_llama):
    (config,) = benchmark_training.BenchmarkArguments(model=tiny_llama).variants().values()
    assert (config.granularity, config.outlier_activation_bits, config.quantize_embeddings) == ("block", 16, 8)
    assert list(benchmark_training.BenchmarkArguments().variants()) == list(benchmark_training.VARIANTS)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_every_stage_of_training_lands_in_the_table(kind, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training, "peak_bytes", lambda arguments, variant: len(variant))  # no processes
    flags = ["--rounds", "1", "--steps_per_stage", "6", "--batch_size", "2", "--output", str(tmp_path / "figures.json")]
    llama = ["--model", tiny_llama, "--length", "8", "--bf16", "true"]
    figures = benchmark.main(["training", *flags, *(["--width", "64", "--depth", "1"] if kind == "vit" else llama)])
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert len(figures["step_ratio"]) == (3 if kind == "vit" else 1)
    for ratios in (*figures["step_ratio"].values(), *figures["optimizer_step_ratio"].values()):
        assert list(ratios) == ["warm-up", "projection", "joint", "cool-down", "run"]
        assert all(ratio > 0 for ratio in ratios.values())
    assert len(benchmark_training.table(figures).splitlines()) == 2 + 5 + 5 + 1 + 2
    assert "| step, joint |" in capsys.readouterr().out


def test_a_size_is_compared_by_its_units(capsys):
    figures = benchmark_alignment.main(["--sizes", "9", "16", "--rounds", "1", "--rows", "2"])
    assert all(by_size[16] == 1 and by_size[9] > 0 for by_size in figures.values())
    assert "| hidden units | 9 | 16 |" in capsys.readouterr().out


def test_kernels_that_are_compared_make_the_same_product(capsys):
    figures = benchmark_kernels.main(["--outputs", "64", "--inputs", "96", "--rows", "3", "--rounds", "1"])[3]
    errors = {name: error for name, (_, error) in figures.items()}
    assert len(errors) == 9
    if not has_integer_kernel(torch.int8):  # without VNNI it may saturate
        errors = {name: error for name, error in errors.items() if not name.endswith(benchmark_kernels.INT8)}
    for name, error in errors.items():
        assert error < 1e-2 if name.endswith("bfloat16") else error == 0, name
    assert "| rows | 3 | largest error |" in capsys.readouterr().out
