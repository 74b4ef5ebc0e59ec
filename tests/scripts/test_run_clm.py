"""Laws of a language model's run: from a YAML file to a compressed model that a fresh load evaluates alike."""

import json
import math
import random

import datasets
import evaluate_checkpoint
import pytest
import run_clm
import torch
import yaml
from perplexity import evaluate_perplexity
from runs import COST_KEYS
from token_blocks import BlockArguments, load_texts, stacked, token_blocks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_geta.report import load_report

SUBJECTS, VERBS, SIZES, PLACES = (
    ["cat", "dog", "bird"],
    ["sees", "hears", "likes"],
    ["red", "big", "old"],
    ["tree", "house", "river"],
)
WORDS = ["</s>", "<unk>", "the", "a", *SUBJECTS, *VERBS, *SIZES, *PLACES]
BLOCK = 16
CONFIG = {
    "block_size": BLOCK,
    "do_train": True,
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "learning_rate": 2e-2,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "geta": {
        "group_sparsity": 0.25,
        "weight_bits": [4, 8],
        "activation_bits": [8, 8],
        "granularity": "channel",
        "pruning_periods": 2,
        "warmup_steps": 4,
        "projection_steps": 4,
        "joint_steps": 6,
        "calibration_batches": 2,
    },
}


def tokenizer_of_words():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def sentences(count, seed):
    draw = random.Random(seed).choice
    return [f"the {draw(SUBJECTS)} {draw(VERBS)} a {draw(SIZES)} {draw(PLACES)}" for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sentences of a tiny language, a Llama that does not speak it yet, and a config that teaches it."""
    folder = tmp_path_factory.mktemp("clm")
    (folder / "data").mkdir()
    for split, count in (("train", 400), ("validation", 60)):
        lines = [json.dumps({"text": text}) for text in sentences(count, seed=count)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), **sizes, **heads, eos_token_id=0, bos_token_id=0)
    ).save_pretrained(folder / "model")
    tokenizer_of_words().save_pretrained(folder / "model")
    paths = {"data_dir": str(folder / "data"), "model_name_or_path": str(folder / "model")}
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | paths))
    return folder


def run(folder, name, *flags):
    return run_clm.main(["--config", str(folder / "config.yaml"), "--output_dir", str(folder / name), *flags])


@pytest.fixture(scope="module")
def runs(folder):
    """Entries of the untrained model, of the dense run, of the compressed one, and of it evaluated alone."""
    evaluated = ("--do_train", "false", "--model_name_or_path")
    return {
        "untrained": run(folder, "untrained", *evaluated, str(folder / "model")),
        "dense": run(folder, "dense", "--compress", "false"),
        "compressed": run(folder, "compressed"),
        "loaded": run(folder, "loaded", *evaluated, str(folder / "compressed")),
    }


def test_weights_that_are_stored_in_bfloat16_train_in_float32_unless_asked(folder):
    LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "halves")
    tokenizer_of_words().save_pretrained(folder / "halves")
    assert AutoModelForCausalLM.from_pretrained(folder / "halves").dtype == torch.bfloat16
    for flags, dtype in (((), torch.float32), (("--dtype", "auto"), torch.bfloat16)):
        run(folder, "from_halves", "--model_name_or_path", str(folder / "halves"), "--max_steps", "17", *flags)
        assert AutoModelForCausalLM.from_pretrained(folder / "from_halves").dtype == dtype


def test_every_entry_has_the_keys_of_the_report(runs):
    for entry in runs.values():
        assert tuple(entry) == ("perplexity", *COST_KEYS)
        assert None not in entry.values()


def test_training_lowers_the_perplexity_dense_and_compressed(runs):
    # The untrained model guesses among 16 words; the language leaves 3 choices in 4 of 7 places, 1.87 on average.
    assert runs["untrained"]["perplexity"] > 10
    assert max(runs["dense"]["perplexity"], runs["compressed"]["perplexity"]) < 4


def test_the_compressed_language_model_is_what_was_asked_for(runs):
    compressed = runs["compressed"]
    assert compressed["group_sparsity"] == pytest.approx(0.25, abs=0.01)
    assert 4 <= compressed["mean_weight_bits"] <= 8
    assert compressed["mean_activation_bits"] == 8
    assert compressed["parameters"] < runs["dense"]["parameters"]


def test_a_loaded_language_model_is_measured_like_the_one_that_was_saved(runs, folder):
    timeless = ["perplexity", *(key for key in COST_KEYS if key != "latency_ms")]
    assert [runs["loaded"][key] for key in timeless] == [runs["compressed"][key] for key in timeless]
    assert load_report(folder / "compressed")["compressed"]["perplexity"] == runs["compressed"]["perplexity"]
    assert json.loads((folder / "loaded" / "report.json").read_text()) == {"compressed": runs["loaded"]}


def test_streamed_blocks_are_the_same_blocks(folder):
    tokenizer = tokenizer_of_words()
    held, streamed = (
        load_texts(BlockArguments(data_dir=str(folder / "data"), streaming=each))[1] for each in (False, True)
    )
    held, streamed = (token_blocks(texts, tokenizer, BLOCK) for texts in (held, streamed))
    assert [block["input_ids"] for block in streamed] == list(held["input_ids"])


def test_a_streamed_run_trains_without_a_length(folder):
    with pytest.raises(ValueError, match="max_steps"):
        run(folder, "endless", "--streaming", "true", "--max_steps", "-1")
    assert run(folder, "streamed", "--streaming", "true", "--compress", "false")["perplexity"] < 4


def test_blocks_are_all_texts_in_one_row_with_the_end_token_after_each():
    tokenizer = tokenizer_of_words()
    texts = datasets.Dataset.from_dict({"text": ["the cat sees", "", "a dog", " ", "the old river"]})
    blocks = token_blocks(texts, tokenizer, 4)
    words = [WORDS[token] for block in blocks["input_ids"] for token in block]
    assert " ".join(words) == "the cat sees </s> a dog </s> the"  # "old river </s>" is less than a block
    assert list(blocks["labels"]) == list(blocks["input_ids"])
    assert len(token_blocks(texts, tokenizer, 4, limit=1)) == 1
    with pytest.raises(ValueError, match="smaller block_size"):
        token_blocks(texts, tokenizer, 40)


def test_lines_of_a_text_file_are_texts(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"the {split}\na cat\n")
    train, evaluation = load_texts(BlockArguments(data_dir=str(tmp_path)))
    assert (train["text"][:], evaluation["text"][:]) == (["the train", "a cat"], ["the test", "a cat"])


def test_what_is_not_in_the_data_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no column story; there are: text"):
        load_texts(BlockArguments(data_dir=str(folder / "data"), text_column="story"))
    with pytest.raises(ValueError, match="there is no such folder"):
        load_texts(BlockArguments(data_dir=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="the model takes 64 tokens"):
        run(folder, "long", "--block_size", "65")


def test_perplexity_is_that_of_the_models_own_loss(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    blocks = token_blocks(load_texts(BlockArguments(data_dir=str(folder / "data")))[1], tokenizer_of_words(), BLOCK)
    batch = next(iter(stacked(blocks, 5)))
    loss = model(**batch).loss.item()
    assert evaluate_perplexity(model, [batch])["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_uniform_guesser_has_the_perplexity_of_its_vocabulary(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.nn.init.zeros_(model.model.norm.weight)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    assert evaluate_perplexity(model.eval(), [batch])["perplexity"] == pytest.approx(len(WORDS), rel=1e-5)


def test_a_saved_language_model_is_measured_again_from_its_report(runs, folder, capsys):
    assert evaluate_checkpoint.main([str(folder / "compressed"), "--data_dir", str(folder / "data")]) == 0
    assert "it holds" in capsys.readouterr().out
    (folder / "data" / "validation.jsonl").rename(folder / "data" / "texts.jsonl.kept")
    row = {"question": "what the cat", "choices": ["sees", "tree old the"], "answer": 0}
    (folder / "data" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--task", "multiple-choice", "--data_dir", str(folder / "data"), "--prompt", "the cat"]
    assert evaluate_checkpoint.main([str(folder / "compressed"), *flags]) == 0
    assert "measured: Accuracy, length-normalized 100.00%" in capsys.readouterr().out
