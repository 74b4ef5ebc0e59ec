"""Laws of a whole run on texts: from a YAML file to a compressed model that a fresh load evaluates alike."""

import copy
import json

import evaluate_checkpoint
import pytest
import run_text_classification
import yaml
from runs import COST_KEYS
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_geta.report import load_report

LENGTHS = (3, 9, 6, 12)  # of different lengths, so that batches are padded
CLAIM = {"task": "text-classification", "metric": "accuracy", "samples": 32, "max_length": 16}
TEXTS = [{"sentence": " ".join([word] * n), "label": int(word == "good")} for word in ("good", "bad") for n in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_run):
    folder = tmp_path_factory.mktemp("run")
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS * 4))
    (folder / "config.yaml").write_text(yaml.safe_dump(text_run | {"data_dir": str(folder)}))
    return folder


def run(folder, name, *flags):
    arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / name)]
    return run_text_classification.main([*arguments, *flags])


@pytest.fixture(scope="module")
def compressed(folder):
    """Trained on a stream, evaluated on the way."""
    return run(folder, "compressed", "--streaming", "true", "--eval_strategy", "steps", "--eval_steps", "12")


def test_a_compressed_classifier_of_texts_is_what_was_asked_for(compressed, folder):
    assert tuple(compressed) == ("accuracy", *COST_KEYS)
    assert compressed["accuracy"] > 0.9  # one word decides; a coin gets half
    assert compressed["group_sparsity"] == pytest.approx(0.5)
    assert 4 <= compressed["mean_weight_bits"] <= 8
    assert f"{compressed['accuracy']:.2%}" in (folder / "compressed" / "README.md").read_text()


def test_a_loaded_classifier_is_measured_like_the_one_that_was_saved(compressed, folder):
    loaded = run(folder, "loaded", "--do_train", "false", "--model_name_or_path", str(folder / "compressed"))
    assert loaded | {"latency_ms": 0} == compressed | {"latency_ms": 0}
    report = load_report(folder / "compressed")
    assert report["compressed"]["accuracy"] == loaded["accuracy"]
    assert report["evaluation"] == CLAIM
    assert evaluate_checkpoint.main([str(folder / "compressed"), "--data_dir", str(folder)]) == 0


def test_a_compressed_classifier_is_trained_again(compressed, folder):
    flags = ["--model_name_or_path", str(folder / "compressed"), "--compress", "false", "--max_steps", "1"]
    assert run(folder, "again", *flags)["parameters"] == compressed["parameters"]


def test_a_decoder_whose_tokenizer_has_no_padding_classifies_batches(folder, word_tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(word_tokenizer))).save_pretrained(folder / "decoder")
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder / "decoder")
    assert AutoTokenizer.from_pretrained(folder / "decoder").pad_token is None
    found = run(folder, "of-decoder", "--model_name_or_path", str(folder / "decoder"))
    assert evaluate_checkpoint.main([str(folder / "of-decoder"), "--data_dir", str(folder)]) == 0
    config = AutoConfig.from_pretrained(folder / "of-decoder")
    assert config.pad_token_id == word_tokenizer.convert_tokens_to_ids("[SEP]")
    assert found["group_sparsity"] == pytest.approx(0.5, abs=0.02)


def test_the_dense_twin_of_texts_is_dense(folder):
    dense = run(folder, "dense", "--compress", "false", "--max_steps", "1")
    assert (dense["relative_bops"], dense["group_sparsity"], dense["mean_weight_bits"]) == (1.0, 0.0, 32)


def test_evaluation_of_texts_without_a_model_is_refused_before_data_is_read(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"do_train": False, "data_dir": "nowhere"}
    del config["model_name_or_path"]
    (folder / "nameless.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="write model_name_or_path"):
        run_text_classification.main(["--config", str(folder / "nameless.yaml")])
