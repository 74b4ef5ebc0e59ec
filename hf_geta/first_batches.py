"""What a run looks at before its first step: some batches, which all processes read their part of."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from transformers import PreTrainedModel

from hf_geta.distillation import DECODER_INPUTS, IGNORED


def first_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    size: int,
    count: int,
    seed: int,
    processes: int = 1,
    process: int = 0,
) -> list[Any]:
    """The part of one process of the first `count` batches of `size` x `processes` samples, shuffled by `seed`.

    Split as accelerate splits a training set: batch i of a single process's pass goes to process i % `processes`.
    Samples that only come one after the other are not shuffled.
    """
    shard = {"num_processes": processes, "process_index": process}
    generator = torch.Generator().manual_seed(seed)
    order: dict[str, Any] = {"batch_size": size}
    if not isinstance(dataset, IterableDataset):
        sampler = BatchSampler(RandomSampler(dataset, generator=generator), size, drop_last=False)
        order = {"batch_sampler": sampler if processes == 1 else BatchSamplerShard(sampler, **shard)}
    elif processes > 1:
        dataset = IterableDatasetShard(dataset, size, **shard)
    loader = DataLoader(dataset, collate_fn=collate, generator=generator, **order)
    return list(itertools.islice(loader, count))


def without_labels(batch: Mapping[str, Any], model: PreTrainedModel, labels: Collection[str]) -> dict[str, Any]:
    """The batch as the forward takes it to predict; a decoder that is fed by the labels gets what it makes of them.

    Args:
        labels: the names that labels have in a batch.
    """
    kept = {name: value for name, value in batch.items() if name not in labels}
    targets = batch.get("labels")
    is_text = isinstance(targets, Tensor) and targets.ndim == 2 and not targets.is_floating_point()
    if is_text and model.config.is_encoder_decoder and DECODER_INPUTS.isdisjoint(kept):
        kept["decoder_input_ids"] = _shifted(batch["labels"], model)
    return kept


def _shifted(labels: Tensor, model: Any) -> Tensor:
    """The ids by which a decoder predicts `labels`, (batch, length): the start token, and all of them but the last."""
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):  # which know of language codes, and the like
        if hasattr(model, name):
            return getattr(model, name)(labels)
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def refuse_unreadable(batches: Sequence[Mapping[str, Any]], model: nn.Module, labels: Sequence[str], data: Any) -> None:
    """Refuse batches of which a model reads nothing but labels.

    Args:
        labels: the names that labels have in a batch.
        data: the training data that the batches are of.

    Raises:
        ValueError: for those, and where there is no batch at all.
    """
    if not batches:
        raise ValueError("the training dataset is empty: there is nothing to calibrate or to train on.")
    if any(set(batch) <= set(labels) for batch in batches):
        taken = [name for name in inspect.signature(model.forward).parameters if name not in (*labels, "kwargs")]
        columns = getattr(data, "column_names", None) or next(iter(data))
        raise ValueError(
            f"the training data has {', '.join(columns)}, and nothing that {type(model).__name__} takes beside labels "
            f"({', '.join(taken)}): rename the columns, or, where a data_collator makes its inputs of them, set "
            "remove_unused_columns=False in TrainingArguments."
        )
