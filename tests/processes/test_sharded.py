"""A model that lies in pieces on several processes (FSDP2, HSDP) ends as a whole one: groups, widths, weights, files.

Real launches of `run_sharded.py`, compared with runs of a single process, which is this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_geta import finalize_model
from tests.processes import run_sharded

PROGRAM = Path(run_sharded.__file__)
TOLERANCE = 1e-6  # of float64 weights and float32 quantizers after 30 steps; one group that differs is 1e-2
# Of a step: quantizers' gradients, whether all are finite, scores, sums of what is forgotten; magnitudes once a period.
MOST_MESSAGES = 5


def launch(processes, folder, *names):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [PROGRAM, folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Processes -> the folder with what their runs ended with."""
    folders = {processes: tmp_path_factory.mktemp(f"of-{processes}") for processes in (2, 4)}
    launch(2, folders[2], *run_sharded.MODELS)
    launch(4, folders[4], "vit")
    return folders


def check_messages(in_steps, plan, means):
    """As planned; of a step's quantizers' gradients, `means` over as many dimensions of the mesh."""
    first = [plan.quantizer_gradients] * means * (plan.quantizer_gradients > 0) + [8]  # are all gradients finite
    for sizes in in_steps:
        assert len(sizes) <= MOST_MESSAGES + means - 1
        assert sizes[: len(first)] == first
        *scores, last = sizes[len(first) :] or [0]
        assert set(scores) <= {plan.scores}
        assert last == plan.scores or last <= plan.forgotten
    assert any(plan.scores in sizes for sizes in in_steps)


@pytest.mark.parametrize(("processes", "name"), [*((2, name) for name in run_sharded.MODELS), (4, "vit")])
def test_in_pieces_a_run_ends_as_whole(ended, processes, name, tmp_path):
    whole, model = run_sharded.train(name)
    pieces = torch.load(ended[processes] / f"{name}.pt", weights_only=False)
    assert (pieces["processes"], whole["processes"]) == (processes, 1)
    assert pieces["groups"] == whole["groups"]
    assert sum(pieces["groups"][-1]) > 0
    (wholes, held), *others = pieces["held"]
    assert wholes == 1
    assert held > 0
    assert others == [(1, 0)] * (processes - 1)  # no one but rank 0 holds anything of the small model
    check_messages(pieces["messages"], pieces["plan"], means=processes // 2)
    torch.testing.assert_close(pieces["widths"], whole["widths"], rtol=0, atol=TOLERANCE)
    assert pieces["weights"].keys() == whole["weights"].keys()
    for key, expected in whole["weights"].items():
        torch.testing.assert_close(pieces["weights"][key], expected, rtol=0, atol=TOLERANCE, msg=key)
    finalize_model(model).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (ended[processes] / name / "config.json").read_text()
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, ended[processes] / name))
    assert ours.keys() == theirs.keys()
    for key, expected in ours.items():
        torch.testing.assert_close(theirs[key], expected, rtol=0, atol=TOLERANCE, msg=key)
