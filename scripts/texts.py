"""Texts with one label each, or pairs of texts: rows -> token ids, padded a batch at a time to its longest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import datasets
import splits
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@dataclasses.dataclass
class TextArguments(splits.StreamArguments):
    """Which texts, and how long they may be."""

    text_columns: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "The column of the text, or the two of a pair; by default all texts."}
    )
    label_column: str = dataclasses.field(default="label", metadata={"help": "The column of the class."})
    max_length: int = dataclasses.field(default=128, metadata={"help": "Texts are cut after this many tokens."})


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """Both splits, with `labels` as class indices; the training split may be an IterableDataset."""

    train: Any
    evaluation: datasets.Dataset
    columns: list[str]  # of the text, or of both of a pair
    names: list[str]  # of the classes, by index

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> LabelledTexts:
        """The same with token ids (`input_ids`, ...) in place of texts."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return dict(tokenizer(*(batch[column] for column in self.columns), truncation=True, max_length=max_length))

        train, evaluation = (
            split.map(encode, batched=True, remove_columns=self.columns) for split in (self.train, self.evaluation)
        )
        return dataclasses.replace(self, train=train, evaluation=evaluation)


def load_tokenizer(name: str | None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads: a decoder's mostly has no token for that, and takes the one that ends a text.

    Args:
        options: of `from_pretrained`.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_texts(arguments: TextArguments) -> LabelledTexts:
    """The texts that the arguments name.

    Raises:
        ValueError: for a split or a column that there is not, for labels that are no classes, and where more than two
            columns hold texts.
    """
    train, evaluation = splits.load_text_rows(arguments)
    columns, label = _text_columns(evaluation, arguments), arguments.label_column
    names, index_of = _classes(evaluation if arguments.streaming else train, label)

    def numbered(split: Any) -> Any:
        kept = split.select_columns([*columns, label])
        return kept.map(lambda row: {"labels": index_of(row[label])}, remove_columns=[label])

    return LabelledTexts(numbered(train), numbered(evaluation), columns, names)


def _text_columns(rows: datasets.Dataset, arguments: TextArguments) -> list[str]:
    columns = arguments.text_columns or [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string") and name != arguments.label_column
    ]
    splits.require_columns(rows, [*columns, arguments.label_column])
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"one text or a pair is classified, the data has {columns}: write text_columns.")
    return columns


def _known_class(column: str, label: int | None) -> int:
    if label is None or label < 0:
        raise ValueError(f"column {column!r}: some texts have no class (-1); leave them out, or take another split.")
    return int(label)


def _classes(rows: datasets.Dataset, column: str) -> tuple[list[str], Callable[[Any], int]]:
    """(names, value -> index) of the classes: as the data set declares them, or the values that occur, sorted."""
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), functools.partial(_known_class, column)
    if feature.dtype.startswith("float"):
        raise ValueError(f"column {column!r} holds {feature.dtype} numbers, which are no classes: write label_column.")
    values = sorted(set(rows[column]))
    index = {value: i for i, value in enumerate(values)}

    def index_of(value: Any) -> int:
        if value not in index:
            raise ValueError(f"column {column!r} holds {value!r}, which is none of the classes {values}.")
        return index[value]

    return [str(value) for value in values], index_of
