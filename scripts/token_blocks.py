"""Texts from the Hub or from disk -> blocks of tokens for a language model: concatenated, then cut to one length."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import datasets
import torch

# The Hub's data sets call the second split one or the other.
EVAL_SPLITS = ("validation", "valid", "val", "test")
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
DEFAULT_BLOCK_SIZE = 1024
SHUFFLE_BUFFER_TEXTS = 10_000  # that streamed training data is shuffled within


@dataclasses.dataclass
class TextArguments:
    """Which texts, and how long the blocks are."""

    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration."})
    data_dir: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Folder with train* and validation* (or test*) as jsonl, parquet or txt, where a line is a text. "
            "Goes before dataset_name."
        },
    )
    text_column: str = dataclasses.field(default="text", metadata={"help": "The column with the texts."})
    block_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Tokens in a block; by default what the model takes, at most 1024."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read the texts while training, for data that no disk should hold twice."}
    )
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "Train on this many blocks."})
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Evaluate on this many blocks."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.data_dir is None:
            raise ValueError("write dataset_name (a data set on the Hub) or data_dir (a folder).")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: a block needs 2 tokens, one to read and one to predict.")


def load_splits(arguments: TextArguments) -> tuple[Any, Any]:
    """(train, evaluation) of the texts that the arguments name, as data sets with one column; streamed if so wished.

    Raises:
        ValueError: where a split or the column cannot be found; the message names those there are.
    """
    if arguments.data_dir is not None:
        builder, files = _files(Path(arguments.data_dir))
        splits = datasets.load_dataset(builder, data_files=files, streaming=arguments.streaming)
    else:
        name, config = arguments.dataset_name, arguments.dataset_config_name
        splits = datasets.load_dataset(name, config, streaming=arguments.streaming)
    evaluation = next((name for name in EVAL_SPLITS if name in splits), None)
    if "train" not in splits or evaluation is None:
        raise ValueError(f"splits {', '.join(splits)}: a train split and one of {', '.join(EVAL_SPLITS)} are needed.")
    return tuple(_texts(splits[name], arguments.text_column) for name in ("train", evaluation))


def _files(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """(builder of `datasets`, split -> files) of a local folder."""
    files: dict[str, list[str]] = {}
    found = sorted(file for file in folder.glob("*") if file.suffix in BUILDERS)
    for file in found:
        files.setdefault(file.stem.split("-")[0].split(".")[0], []).append(str(file))
    builders = {BUILDERS[file.suffix] for file in found}
    if len(builders) != 1:
        raise ValueError(
            f"data_dir={str(folder)!r} holds {', '.join(sorted(builders)) or 'no texts'}: write train* and validation* "
            f"files of one kind, {', '.join(BUILDERS)}."
        )
    return builders.pop(), files


def _texts(rows: Any, column: str) -> Any:
    names = rows.column_names or list(next(iter(rows)))  # a stream may not know before it is read
    if column not in names:
        raise ValueError(f"column {column!r} is not in the data; there are: {', '.join(names)}. Write text_column.")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def token_blocks(texts: Any, tokenizer: Any, block_size: int, limit: int | None = None) -> Any:
    """Blocks {"input_ids", "labels"} of `block_size` tokens each: all texts in one row, the end token after each.

    Blank texts are left out, and so is the rest of every thousand texts that does not fill a block. Labels are the
    tokens themselves: the model moves them by one.

    Args:
        texts: a data set or a stream with the column `text`.
        limit: blocks to keep, the first ones; None keeps all.

    Raises:
        ValueError: where the texts are shorter than one block; of a stream, not before it is read.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch["text"] if text.strip()]
        # Not verbose: it would warn of texts that are longer than the model's window, and these will be cut.
        ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        row = list(itertools.chain.from_iterable(text if text[-1:] == end else text + end for text in ids))
        blocks = [row[start : start + block_size] for start in range(0, len(row) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = texts.map(cut, batched=True, remove_columns=["text"])
    if isinstance(blocks, datasets.IterableDataset):
        return blocks if limit is None else blocks.take(limit)
    if not len(blocks):
        raise ValueError(f"the texts are shorter than one block of {block_size} tokens: write a smaller block_size.")
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))


def block_size_of(arguments: TextArguments, tokenizer: Any, config: Any) -> int:
    """Tokens in a block.

    Raises:
        ValueError: for more tokens than the model's positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    size = arguments.block_size or min(DEFAULT_BLOCK_SIZE, positions)
    if size > positions:
        raise ValueError(f"block_size={size}: the model takes {positions} tokens.")
    return size


def stacked(blocks: Any, batch_size: int) -> Any:
    """A loader of batches {"input_ids", "labels"}, int64 (batch, block_size)."""
    return torch.utils.data.DataLoader(blocks.with_format("torch"), batch_size)
