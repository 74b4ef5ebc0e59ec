"""A run ends the same on several processes with the same global batch, resumed on others, or computed in another way.

Real launches of `run_variants.py`, compared with runs of a single process, which is this one.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

import hf_geta  # noqa: F401  # or transformers cannot load what the runs saved
from hf_geta.optim.schedule import Stage
from tests.processes import run_variants

PROGRAM = Path(run_variants.__file__)
DDP_CONFIG = PROGRAM.parents[2] / "configs" / "accelerate" / "cpu_2_processes.yaml"
NODES_CONFIG = DDP_CONFIG.with_name("multi_node.yaml")
ACCELERATE = ("accelerate.commands.launch", "--config_file", DDP_CONFIG)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "4")
CHECKPOINT = f"checkpoint-{run_variants.RESUMED_STEP}"

# Parameters are float64, those of quantizers float32 (1e-7); 40 steps of SGD or AdamW carry that on. Without the same
# calibration, or with one group or one rounding that differs, the runs part by 1e-2.
TOLERANCE = 1e-6
# What calibration sums up in float32, over the square of an input: an ulp or two of the largest.
STATISTICS_TOLERANCE = 1e-5


def launch(launcher, folder, *names):
    command = [sys.executable, "-m", *launcher, PROGRAM, folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(processes, name) -> what a run ended with."""
    folders = {processes: tmp_path_factory.mktemp(f"of-{processes}") for processes in (1, 2, 4)}
    names = ("share", "budget", "stream", "dropped", "nan", "overflow")
    results = {(1, name): run_variants.train(name, folders[1]) for name in names}
    resumed = f"share@{folders[1] / 'share' / CHECKPOINT}"
    launch(ACCELERATE, folders[2], *names, "uneven", "checkpointed", resumed, "compiled")
    launch(TORCHRUN, folders[4], "share")
    for processes in (2, 4):
        for file in folders[processes].glob("*.pt"):
            results[processes, file.stem] = torch.load(file, weights_only=False)
            assert results[processes, file.stem]["processes"] == processes
    checkpoint = folders[2] / "share" / CHECKPOINT
    results[1, "share-resumed"] = run_variants.train("share", folders[1], str(checkpoint))
    return results, folders


def check_same(ours, theirs):
    periods = min(len(ours["groups"]), len(theirs["groups"]))  # of a resumed run, the later ones
    assert ours["groups"][-periods:] == theirs["groups"][-periods:]
    for name, expected in theirs["weights"].items():
        measured = name.endswith(("input_power", "log_clips"))
        scale = expected.abs().max() if measured else 1
        tolerance = STATISTICS_TOLERANCE if measured else TOLERANCE
        torch.testing.assert_close(ours["weights"][name] / scale, expected / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("processes", "name"), [(2, "share"), (4, "share"), (2, "budget"), (2, "stream"), (2, "dropped")]
)
def test_several_processes_end_as_one_with_the_same_global_batch(ended, processes, name):
    """The same groups after every period, widths and weights; no ranking is so close that 1e-7 would tip it."""
    results, _ = ended
    check_same(results[processes, name], results[1, name])
    assert len(results[1, name]["groups"]) == run_variants.PERIODS


def test_two_nodes_end_as_one_process(ended, tmp_path):
    """Two launchers, each with a process of its own, which find each other at an address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    changes = {"use_cpu": True, "num_processes": 2, "mixed_precision": "no", "main_process_port": port}
    settings = yaml.safe_load(NODES_CONFIG.read_text()) | changes | {"main_process_ip": "127.0.0.1"}
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump(settings))
    start = [sys.executable, "-m", ACCELERATE[0], "--config_file", tmp_path / "nodes.yaml", "--machine_rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([*start, str(rank), PROGRAM, tmp_path, "share"], env=environment) for rank in (0, 1)]
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    result = torch.load(tmp_path / "share.pt", weights_only=False)
    assert result["processes"] == 2
    check_same(result, ended[0][1, "share"])


@pytest.mark.parametrize("name", ["nan", "overflow"])
def test_a_step_that_breaks_on_one_of_two_processes_is_a_step_of_none(ended, name):
    """In every stage both skip it, as one process does whose batch holds the same image; the targets hold at the end.

    NaN reaches QASSO, which takes no step; an overflow is stopped before by the gradient scaler.
    """
    ours, theirs = ended[0][2, name], ended[0][1, name]
    assert ours["broken_stages"] == set(Stage)
    assert ours["steps"] == theirs["steps"] == run_variants.STEPS - len(run_variants.BROKEN_STEPS)
    halved = run_variants.SCALE / 2 ** len(run_variants.BROKEN_STEPS)
    assert ours["scale"] == theirs["scale"] == (halved if name == "overflow" else None)
    check_same(ours, theirs)


@pytest.mark.parametrize("name", ["compiled", "checkpointed"])
def test_compiled_or_with_checkpointing_two_processes_end_as_one_without(ended, name):
    ours = ended[0][2, name]
    assert ours["compiled"] == (name == "compiled")
    check_same(ours, ended[0][1, "share"])


@pytest.mark.usefixtures("own_compiler_settings")
@pytest.mark.parametrize("name", ["compiled", "checkpointed", "reentrant"])
def test_compiled_or_with_checkpointing_a_run_ends_the_same(ended, name, tmp_path):
    ours = run_variants.train(name, tmp_path)
    assert ours["compiled"] == (name == "compiled")
    check_same(ours, ended[0][1, "share"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_resumes_on_another_number_of_processes(ended, processes):
    """From a checkpoint inside a pruning period, of two processes and of one."""
    results, _ = ended
    assert len(results[processes, "share-resumed"]["groups"]) < run_variants.PERIODS
    check_same(results[processes, "share-resumed"], results[1, "share"])


def test_processes_with_uneven_batches_in_bfloat16_agree_and_save_one_small_model(ended):
    """Where batches are filled up, one process has others: here the program itself compares the processes."""
    results, folders = ended
    assert len(results[2, "uneven"]["groups"]) == run_variants.PERIODS
    model = AutoModelForImageClassification.from_pretrained(folders[2] / "small")
    assert model.config.quantization_config.quant_method == "geta"
