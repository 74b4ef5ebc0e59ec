#!/usr/bin/env python
"""Measure a saved model, dense or compressed, and compare with what its card claims.

    python scripts/evaluate_checkpoint.py FOLDER                    # compressed, on the data that its report names
    python scripts/evaluate_checkpoint.py FOLDER --data_dir DATA    # on a local copy; a dense model has no report

The settings default to those of geta_report.json in FOLDER. Ends with status 1 where the claim is missed by more than
the tolerance (another machine or batch size rounds differently).
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from classification import evaluate_accuracy
from images import DataArguments, ImageDataset, load_splits
from multiple_choice import ChoiceArguments, evaluate_multiple_choice
from perplexity import evaluate_perplexity
from questions import QuestionArguments, load_questions, load_tokenizer, windows_of
from run_question_answering import evaluate_answers
from run_seq2seq import PairArguments, evaluate_texts, tokenize_pairs
from splits import load_text_rows
from texts import TextArguments, load_texts
from texts import load_tokenizer as load_text_tokenizer
from token_blocks import BlockArguments, block_size_of, stacked, token_blocks
from token_blocks import load_texts as load_plain_texts
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)
from transformers.hf_argparser import string_to_bool

import hf_geta  # noqa: F401  registers the compressed format
from hf_geta.report.figures import METRICS
from hf_geta.report.folder import clean, figures_of, mapping_of, number, read_report


def evaluate_image_classification(folder: str, data: DataArguments, batch_size: int) -> dict[str, float]:
    """The scores of the image classifier in `folder`."""
    _, images = load_splits(data)
    model = _classifier(AutoModelForImageClassification, folder, images.names)
    dataset = ImageDataset(images, AutoImageProcessor.from_pretrained(folder))
    return evaluate_accuracy(model, DataLoader(dataset, batch_size))


def evaluate_text_classification(folder: str, data: TextArguments, batch_size: int) -> dict[str, float]:
    """The scores of the classifier of texts in `folder`."""
    tokenizer = load_text_tokenizer(folder)
    texts = load_texts(data).tokenized(tokenizer, data.max_length)
    model = _classifier(AutoModelForSequenceClassification, folder, texts.names)
    collator = DataCollatorWithPadding(tokenizer)
    return evaluate_accuracy(model, DataLoader(texts.evaluation, batch_size, collate_fn=collator))


def evaluate_question_answering(folder: str, data: QuestionArguments, batch_size: int) -> dict[str, float]:
    """The scores of the model in `folder`, which marks answers."""
    tokenizer = load_tokenizer(folder)
    _, examples = load_questions(data)
    windows, collator = windows_of(examples, tokenizer, data), DataCollatorWithPadding(tokenizer)
    model = _loaded(AutoModelForQuestionAnswering, folder)
    return evaluate_answers(model, windows, examples, collator, data, batch_size)[0]


def evaluate_text_to_text(folder: str, data: PairArguments, batch_size: int) -> dict[str, float]:
    """The scores of the model in `folder`, which writes texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, rows = load_text_rows(data)
    model = _loaded(AutoModelForSeq2SeqLM, folder)
    return evaluate_texts(model, tokenizer, tokenize_pairs(rows, tokenizer, data), rows, data, batch_size)[0]


def evaluate_language_model(folder: str, data: BlockArguments, batch_size: int) -> dict[str, float]:
    """The perplexity of the language model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _loaded(AutoModelForCausalLM, folder)
    block_size = block_size_of(data, tokenizer, model.config)
    blocks = token_blocks(load_plain_texts(data)[1], tokenizer, block_size, data.max_eval_samples)
    return evaluate_perplexity(model, stacked(blocks, batch_size))


def evaluate_choices(folder: str, data: ChoiceArguments, batch_size: int) -> dict[str, float]:
    """The scores of the language model in `folder`, which chooses among answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _loaded(AutoModelForCausalLM, folder)
    return evaluate_multiple_choice(model, tokenizer, data.questions(), data.prompt, batch_size)


def _loaded(auto_class: Any, folder: str) -> PreTrainedModel:
    """The model of the folder to evaluate, on a GPU where there is one."""
    return auto_class.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _classifier(auto_class: Any, folder: str, names: Sequence[str]) -> PreTrainedModel:
    model = _loaded(auto_class, folder)
    if len(names) != model.config.num_labels:
        raise ValueError(f"the data has {len(names)} classes, the model {model.config.num_labels}.")
    return model


# Task -> (its data, their evaluation, the metric that is compared); the report says which task is its own.
TASKS: dict[str, tuple[Any, Callable[[str, Any, int], dict[str, float]], str]] = {
    "image-classification": (DataArguments, evaluate_image_classification, "accuracy"),
    "text-classification": (TextArguments, evaluate_text_classification, "accuracy"),
    "question-answering": (QuestionArguments, evaluate_question_answering, "f1"),
    "language-modeling": (BlockArguments, evaluate_language_model, "perplexity"),
    "multiple-choice": (ChoiceArguments, evaluate_choices, "accuracy_norm"),
    "text-to-text": (PairArguments, evaluate_text_to_text, "rouge_l"),
}
OTHER_NAMES = {"perplexity": "language-modeling", "qa": "question-answering", "classification": "text-classification"}
VOCABULARY_METRICS = ("perplexity", "accuracy_norm")  # of tasks that take logits over the vocabulary at every token
PERCENT = ("f1", "rouge_l")  # metrics that are no shares
BATCH_SIZE, LOGITS_BATCH_SIZE = 64, 8  # of any other; of these


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if not Path(options.folder).is_dir():
        raise ValueError(f"{options.folder}: there is no such folder.")
    report = read_report(options.folder)
    claimed = mapping_of(report, "evaluation")
    task = options.task or claimed.get("task") or "image-classification"
    if isinstance(task, str):
        task = OTHER_NAMES.get(task, task.replace("_", "-"))
    if task not in TASKS:
        raise ValueError(f"--task {clean(str(task))} is not known here; known are {', '.join(TASKS)}.")
    data_class, measure, metric = TASKS[task]
    batch_size = options.batch_size or (LOGITS_BATCH_SIZE if metric in VOCABULARY_METRICS else BATCH_SIZE)
    value = measure(options.folder, _data(data_class, options, claimed), batch_size)[metric]
    label, form = METRICS[metric]
    print(f"measured: {label} {form.format(value)}")
    claim = figures_of(report, "compressed").get(metric)
    if claim is None:
        print("claimed: nothing")
        return 0
    unit = claim if metric == "perplexity" else 100 if metric in PERCENT else 1
    holds = abs(value - claim) <= options.tolerance * unit
    print(f"claimed:  {label} {form.format(claim)}; {'it holds' if holds else 'IT DOES NOT HOLD'}")
    return 0 if holds else 1


def _data(data_class: Any, options: argparse.Namespace, claimed: Mapping[str, Any]) -> Any:
    """The flags that were given, over what the report says; checked, for a report may come from anyone."""
    data = {}
    for name, kind in _kinds(data_class).items():
        value = getattr(options, name)
        if value is None and name != "data_dir" and (value := claimed.get(name)) is not None:
            value = _checked(name, value, kind)
        if value is not None:
            data[name] = value
    arguments = data_class(**data)
    arguments.trains = False
    return arguments


def _kinds(data_class: Any) -> dict[str, Any]:
    """Field -> str, int, float, bool or list, for those that decide what is evaluated."""
    hints = typing.get_type_hints(data_class)
    kinds = {}
    for name in data_class.evaluation_fields():
        first = next(kind for kind in (*typing.get_args(hints[name]), hints[name]) if kind is not type(None))
        kinds[name] = list if typing.get_origin(hints[name]) is list else first
    return kinds


def _checked(name: str, value: Any, kind: Any) -> Any:
    if kind in (int, float):
        return kind(number(name, value))
    if kind is list:
        return [str(item) for item in value]
    return kind(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure a saved model, and compare with what its card claims.")
    parser.add_argument("folder", metavar="FOLDER", help="a folder that save_pretrained wrote")
    parser.add_argument("--task", help=f"one of {', '.join([*TASKS, *OTHER_NAMES])} (default: the report's)")
    for name, kind in {name: kind for task in TASKS.values() for name, kind in _kinds(task[0]).items()}.items():
        options = {"nargs": "+"} if kind is list else {"type": string_to_bool if kind is bool else kind}
        parser.add_argument(f"--{name}", **options, help="as in the task's run_*.py (default: the report's)")
    batches = f"examples at a time (default: {BATCH_SIZE}, of language models {LOGITS_BATCH_SIZE})"
    parser.add_argument("--batch_size", type=int, help=batches)
    parser.add_argument("--tolerance", type=float, default=0.005, help="accepted difference, a share (default: 0.005)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_checkpoint.py: {error}")
