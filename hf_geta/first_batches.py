"""What a run looks at before its first step: some batches, which all processes read their part of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler


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


def column_names(dataset: Any) -> list[str]:
    """What a sample of the data set has."""
    return list(getattr(dataset, "column_names", None) or next(iter(dataset)))
