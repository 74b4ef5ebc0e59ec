"""Texts from the Hub or from disk -> blocks of tokens for a language model: concatenated, then cut to one length."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import datasets
import splits
import torch

DEFAULT_BLOCK_SIZE = 1024


@dataclasses.dataclass
class BlockArguments(splits.StreamArguments):
    """Which texts, and how long the blocks are; samples are blocks."""

    text_column: str = dataclasses.field(default="text", metadata={"help": "The column with the texts."})
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Train on this many blocks, the first ones; of a stream, the first it gives."}
    )
    max_eval_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Evaluate on this many blocks, the first ones."}
    )
    block_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Tokens in a block; by default what the model takes, at most 1024."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: a block needs 2 tokens, one to read and one to predict.")


def load_texts(arguments: BlockArguments) -> tuple[Any, Any]:
    """(train, evaluation) of the texts that the arguments name, with one column; both streamed if so wished.

    Raises:
        ValueError: where a split or the column cannot be found; the message names those there are.
    """
    loaded = splits.load_rows(arguments, arguments.streaming)
    train, evaluation = (_texts(rows, arguments.text_column) for rows in loaded)
    if arguments.streaming:
        train = train.shuffle(seed=0, buffer_size=splits.STREAM_BUFFER_ROWS)
    return train, evaluation


def _texts(rows: Any, column: str) -> Any:
    splits.require_columns(rows, [column])
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


def block_size_of(arguments: BlockArguments, tokenizer: Any, config: Any) -> int:
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
