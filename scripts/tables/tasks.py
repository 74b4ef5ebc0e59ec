"""What a run needs of its task: the model, the data that it trains on, and the scores of the model that it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cifar_resnet  # noqa: F401  registers model_type cifar_resnet
import cifar_vgg  # noqa: F401  registers model_type cifar_vgg
from classification import evaluate_accuracy
from image_models import load_model, load_processor
from questions import BOOKKEEPING, QuestionArguments, load_questions, load_tokenizer, windows_of
from run_question_answering import evaluate_answers
from run_text_classification import load_classifier
from runs import load_to_train
from texts import TextArguments, load_texts
from texts import load_tokenizer as load_text_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from tables.data import DATA_KEYS, Images, TrainingImages, load_images, located, model_arguments, prepare_images

EVALUATION_BATCH = 250
TEXT_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """One experiment's, the same for every row."""

    auto_class: Any
    load_model: Callable[[], PreTrainedModel]
    train: Any  # a dataset
    collator: Callable[[Any], dict[str, Tensor]]
    score: Callable[[PreTrainedModel], dict[str, float]]  # shares in [0, 1], the first is the one that is compared
    evaluation_size: int
    examples: str = "images"  # what the data holds


def load_task(settings: Mapping[str, Any], data_dir: str | None, prepared: Path) -> Task:
    """The task of a run's settings.

    Args:
        data_dir: the user's folder of data sets and models; None for the Hub.
        prepared: file of decoded images; written by the first call, before any run.
    """
    return TASKS[settings.get("task", "images")](settings, data_dir, prepared)


def _images(settings: Mapping[str, Any], data_dir: str | None, prepared: Path) -> Task:
    prepare_images(settings["data"], settings["model"], data_dir, prepared)
    images = load_images(prepared)
    arguments = model_arguments(settings["model"], data_dir)
    augmentation = {k: settings["data"][k] for k in ("crop_padding", "horizontal_flip") if k in settings["data"]}
    return Task(
        AutoModelForImageClassification,
        lambda: load_model(arguments, load_processor(arguments, images.example()), images.names),
        TrainingImages(images, **augmentation),
        TrainingImages.collate,
        lambda model: evaluate_accuracy(model, _evaluation_batches(images)),
        len(images.evaluation),
    )


def _evaluation_batches(images: Images) -> Iterator[dict[str, Tensor]]:
    split = images.evaluation
    for pixels, labels in zip(split.pixels.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True):
        yield {"pixel_values": images.normalized(pixels), "labels": labels}


def _texts(settings: Mapping[str, Any], data_dir: str | None, prepared: Path) -> Task:
    model, arguments = model_arguments(settings["model"], data_dir), TextArguments(**_data(settings, data_dir))
    tokenizer = load_text_tokenizer(model.model_name_or_path)
    texts, collator = (
        load_texts(arguments).tokenized(tokenizer, arguments.max_length),
        DataCollatorWithPadding(tokenizer),
    )
    return Task(
        AutoModelForSequenceClassification,
        lambda: load_classifier(model, texts.names, tokenizer.pad_token_id),
        texts.train,
        collator,
        lambda model: evaluate_accuracy(model, DataLoader(texts.evaluation, TEXT_BATCH, collate_fn=collator)),
        len(texts.evaluation),
        "texts",
    )


def _questions(settings: Mapping[str, Any], data_dir: str | None, prepared: Path) -> Task:
    model, arguments = model_arguments(settings["model"], data_dir), QuestionArguments(**_data(settings, data_dir))
    tokenizer = load_tokenizer(str(model.model_name_or_path))
    train, examples = load_questions(arguments)
    windows, collator = windows_of(examples, tokenizer, arguments), DataCollatorWithPadding(tokenizer)

    def score(model: PreTrainedModel) -> dict[str, float]:
        scores, _ = evaluate_answers(model, windows, examples, collator, arguments, TEXT_BATCH)
        return {key: scores[key] / 100 for key in ("f1", "exact_match")}

    return Task(
        AutoModelForQuestionAnswering,
        lambda: load_to_train(AutoModelForQuestionAnswering, model),
        windows_of(train, tokenizer, arguments).remove_columns(list(BOOKKEEPING)),
        collator,
        score,
        len(windows),
        "windows",
    )


TASKS: dict[str, Callable[[Mapping[str, Any], str | None, Path], Task]] = {
    "images": _images,
    "texts": _texts,
    "questions": _questions,
}


def _data(settings: Mapping[str, Any], data_dir: str | None) -> dict[str, Any]:
    """The arguments of a run's `data`: {folder, hub}, and fields of the task's own arguments."""
    folder, hub = located(settings["data"], data_dir)
    options = {key: value for key, value in settings["data"].items() if key not in DATA_KEYS}
    return {"dataset_name": hub, "data_dir": folder, **options}
