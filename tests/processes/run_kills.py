"""Runs of `run_killed.py` on two processes, killed one after the other, as a program: `run_kills.py FOLDER`.

Every run is launched as by `torchrun`, whose processes are forked from this one: it has imported all that they need.
"""

import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import ViTConfig, ViTForImageClassification

from hf_geta import prepare_model
from hf_geta.checkpoint.resumable import last_whole_checkpoint

sys.path.append(str(Path(__file__).parents[2]))
from tests.processes import run_killed

# where a process dies, which one, the step of the checkpoint that is left; the first one writes what all share
KILLS = [
    ("step-4", 0, 3),  # warm-up
    ("weights-9", 0, 6),  # projection
    ("step-11", 0, 9),
    ("step-20", 0, 18),  # joint
    ("rename-27", 0, 24),  # cool-down
]


def launch(*arguments):
    """What each process returns."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="kills",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        monitor_interval=0.1,
    )
    return list(elastic_launch(config, run_killed.main)(*arguments).values())


def main(folder):
    example = {"pixel_values": torch.stack([sample["pixel_values"] for sample in run_killed.digits()[:8]])}
    model = ViTForImageClassification(ViTConfig(**run_killed.SIZES, **run_killed.IMAGES))
    prepare_model(model, run_killed.TARGETS["share"], example)  # imports what the runs will
    uninterrupted = launch("share", f"{folder}/whole")
    for place, rank, left in KILLS:
        with pytest.raises(ChildFailedError) as failed:
            launch("share", f"{folder}/killed", f"{place}@{rank}")
        assert failed.value.failures[rank].exitcode == -signal.SIGKILL, place
        assert last_whole_checkpoint(f"{folder}/killed") == f"{folder}/killed/checkpoint-{left}"
    assert launch("share", f"{folder}/killed") == uninterrupted


if __name__ == "__main__":
    main(*sys.argv[1:])
