"""Laws of a whole run on questions: answers and scores of a compressed model, saved and loaded alike."""

import json

import evaluate_checkpoint
import pytest
import run_question_answering
import yaml
from runs import COST_KEYS

WORDS = list("bcdefghijklmnopqrstuvw")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_run):
    """The answer is the word "good", somewhere in a context of several windows."""
    folder = tmp_path_factory.mktemp("run")
    lines = []
    for i in range(12):
        context = " ".join([*WORDS[: 2 * i], "good", *WORDS[2 * i :]])
        answers = {"text": ["good"], "answer_start": [context.index("good")]}
        lines.append(json.dumps({"id": str(i), "question": "what is it ?", "context": context, "answers": answers}))
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"data_dir": str(folder), "max_question_length": 6, "doc_stride": 3, "max_answer_length": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump(text_run | settings | {"max_steps": 40, "eval_steps": 20}))
    return folder


def run(folder, name, *flags):
    arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / name)]
    return run_question_answering.main([*arguments, *flags])


@pytest.fixture(scope="module")
def compressed(folder):
    return run(folder, "compressed", "--eval_strategy", "steps")


def test_a_compressed_model_finds_the_answers(compressed):
    assert tuple(compressed) == ("exact_match", "f1", *COST_KEYS)
    assert compressed["exact_match"] > 50  # one word in 23: guessing finds one in twenty
    assert compressed["group_sparsity"] == pytest.approx(0.5)


def test_the_score_while_it_trains_is_that_of_the_same_answers(compressed, folder):
    """Trainer pads the logits of all windows to one length; that changes no answer."""
    flags = ["--compress", "false", "--max_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1"]
    entry = run(folder, "dense", *flags, "--save_strategy", "steps", "--save_steps", "1")
    state = json.loads((folder / "dense" / "checkpoint-1" / "trainer_state.json").read_text())
    evaluated = next(entry for entry in state["log_history"] if "eval_f1" in entry)
    assert evaluated["eval_f1"] == pytest.approx(entry["f1"])


def test_loaded_answers_are_the_saved_ones(compressed, folder):
    loaded = run(folder, "loaded", "--do_train", "false", "--model_name_or_path", str(folder / "compressed"))
    assert loaded | {"latency_ms": 0} == compressed | {"latency_ms": 0}
    first, second = (json.loads((folder / name / "predictions.json").read_text()) for name in ("compressed", "loaded"))
    assert first == second
    assert set(first) == {str(i) for i in range(12)}
    assert evaluate_checkpoint.main([str(folder / "compressed"), "--data_dir", str(folder)]) == 0
