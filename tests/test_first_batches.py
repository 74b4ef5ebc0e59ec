"""The parts of several processes make up what one process would read."""

import itertools

import pytest
from torch.utils.data import IterableDataset

from hf_geta.first_batches import first_batches


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(50))


@pytest.mark.parametrize("dataset", [list(range(50)), Stream()], ids=["shuffled", "stream"])
def test_the_parts_of_all_processes_are_the_batches_of_one(dataset):
    whole = first_batches(dataset, list, size=8, count=3, seed=0)
    parts = [first_batches(dataset, list, 2, 3, 0, processes=4, process=process) for process in range(4)]
    assert [[*itertools.chain(*part)] for part in zip(*parts, strict=True)] == whole
    assert len({sample for batch in whole for sample in batch}) == 24


def test_every_process_has_a_batch_of_few_samples():
    assert all(len(first_batches([7, 8, 9], list, 2, 1, 0, 4, process)[0]) == 2 for process in range(4))
