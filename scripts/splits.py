"""Rows of a data set on the Hub, or of files in a folder: a train and an evaluation split, as large as asked for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}  # ending -> reader
# Data sets call the second split one or the other; where there are both, a test split is often without labels.
EVAL_SPLITS = ("validation", "validation_matched", "valid", "val", "test")
TRAINING_FIELDS = ("max_train_samples", "crop_padding", "horizontal_flip", "streaming")  # evaluation needs none of them
STREAM_BUFFER_ROWS = 10_000  # rows of a stream that are shuffled among each other


@dataclasses.dataclass
class DataArguments:
    """Which data; every program may add to it.

    Attributes:
        trains: False where rows are only evaluated, which a folder without a train split serves too.
    """

    trains = True

    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration."})
    data_dir: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Folder with a file for each split, or several, as parquet, jsonl, json, csv or txt (a row a "
            "line): train.parquet, train-00000-of-00002.parquet, validation.jsonl, ... Goes before dataset_name."
        },
    )
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Train on this many rows, drawn once with a fixed seed."}
    )
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Evaluate on this many rows."})
    validation_split_percentage: float | None = dataclasses.field(
        default=None, metadata={"help": "Of data with a train split alone: evaluate on this share of it, drawn once."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.data_dir is None:
            raise ValueError("write dataset_name (a data set on the Hub) or data_dir (a folder).")

    @classmethod
    def evaluation_fields(cls) -> dict[str, dataclasses.Field]:
        """The fields that decide what is evaluated, by name."""
        return {field.name: field for field in dataclasses.fields(cls) if field.name not in TRAINING_FIELDS}

    def claim(self, task: str, metric: str, samples: int) -> dict[str, Any]:
        """What a report says of these data: a name on the Hub, unless they came from a folder; how to measure again."""
        on_hub = self.data_dir is None
        hidden = ("data_dir",) if on_hub else ("data_dir", "dataset_name", "dataset_config_name")
        evaluation = {"task": task, "metric": metric, "samples": samples}
        for name, field in self.evaluation_fields().items():
            default = field.default_factory() if callable(field.default_factory) else field.default
            if name not in hidden and (value := getattr(self, name)) != default:
                evaluation[name] = value
        return {"evaluation": evaluation, **({"dataset": self.dataset_name} if on_hub else {})}


@dataclasses.dataclass
class StreamArguments(DataArguments):
    """Data that need not fit into memory."""

    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read training rows while it trains, never all at once; needs max_steps."}
    )


def load_rows(arguments: DataArguments, streaming: bool = False) -> tuple[Any, Any]:
    """(train, evaluation): the train split and the first of `EVAL_SPLITS` that there is, or a part of the first.

    Where nothing trains, evaluation rows stand in for a train split that is not there: they name columns and classes.

    Args:
        streaming: both are IterableDatasets, read while they are used.

    Raises:
        ValueError: where there is no such folder or split; the message names those there are.
    """
    if arguments.data_dir is not None:
        source = _files(Path(arguments.data_dir))
    else:
        source = {"path": arguments.dataset_name, "name": arguments.dataset_config_name}
    found = datasets.load_dataset(**source, streaming=streaming)
    evaluation = next((name for name in EVAL_SPLITS if name in found), None)
    if evaluation is None and "train" in found and arguments.validation_split_percentage is not None:
        if streaming:
            raise ValueError("validation_split_percentage draws from all rows, and a stream has them one by one.")
        parts = found["train"].train_test_split(arguments.validation_split_percentage / 100, seed=0)
        return parts["train"], parts["test"]
    if evaluation is None or ("train" not in found and arguments.trains):
        raise ValueError(
            f"splits {', '.join(found)}: a train split and one of {', '.join(EVAL_SPLITS)} are needed, or, for a part "
            "of the first as the second, validation_split_percentage."
        )
    return _with_features(found["train" if "train" in found else evaluation]), _with_features(found[evaluation])


def _with_features(rows: Any) -> Any:
    """The rows, of which a stream may not know the columns before it is read."""
    if rows.features is not None:
        return rows
    return rows.cast(datasets.Dataset.from_list(list(rows.take(1))).features)


def _files(folder: Path) -> dict[str, Any]:
    """The arguments of `load_dataset` for the folder; without files of rows it is one of images, SPLIT/CLASS/FILE."""
    if not folder.is_dir():
        raise ValueError(f"data_dir={str(folder)!r}: there is no such folder.")
    for ending, builder in BUILDERS.items():
        files: dict[str, list[str]] = {}
        for file in sorted([*folder.glob(f"*{ending}"), *folder.glob(f"data/*{ending}")]):
            split = _split_of(file.stem)
            if split == "metadata" or (builder == "text" and split not in ("train", *EVAL_SPLITS)):
                continue  # of an image folder; of no data at all
            files.setdefault(split, []).append(str(file))
        if files:
            return {"path": builder, "data_files": files}
    return {"path": "imagefolder", "data_dir": str(folder)}


def _split_of(stem: str) -> str:
    """The split that a file is of, or belongs to as one of several: train-00000-of-00002, train_0, validation.clean."""
    known = [name for name in ("train", *EVAL_SPLITS) if re.match(rf"{name}([-.]|_?\d|$)", stem)]
    return known[0] if known else re.split(r"[-.]", stem)[0]


def load_text_rows(arguments: DataArguments) -> tuple[Any, Any]:
    """(train, evaluation), as many rows as the arguments allow; streamed, the first is an IterableDataset."""
    streaming = isinstance(arguments, StreamArguments) and arguments.streaming
    train, evaluation = load_rows(arguments, streaming)
    train = first_rows(train, arguments.max_train_samples)
    evaluation = first_rows(evaluation, arguments.max_eval_samples)
    if streaming:
        evaluation = datasets.Dataset.from_list(list(evaluation), features=evaluation.features)
    return train, evaluation


def require_columns(rows: Any, names: Sequence[str]) -> None:
    """ValueError for a column that the data has not."""
    if missing := [name for name in names if name not in rows.column_names]:
        raise ValueError(f"the data has no column {', '.join(missing)}; there are: {', '.join(rows.column_names)}.")


def first_rows(rows: Any, limit: int | None) -> Any:
    """`limit` rows, or all, drawn by a fixed seed: rows are often sorted by class, and every run sees the same ones."""
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.shuffle(seed=0, buffer_size=STREAM_BUFFER_ROWS)
        return rows if limit is None else rows.take(limit)
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=0).select(range(limit))
