"""Runs as they happen to users: killed, and gone on with. Every kill is a real SIGKILL of a real process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hf_geta.checkpoint.resumable import whole_checkpoints
from hf_geta.resuming import UNFINISHED
from tests.processes import run_killed

PROGRAM = Path(run_killed.__file__)
CONFIG = PROGRAM.parents[2] / "configs" / "accelerate" / "cpu_2_processes.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCHERS = {1: [], 2: ["-m", "accelerate.commands.launch", "--config_file", CONFIG]}


def command(processes, *arguments):
    return [sys.executable, *LAUNCHERS[processes], PROGRAM, *arguments]


def run(processes, *arguments):
    """The digest of what a run ends with."""
    done = subprocess.run(command(processes, *arguments), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout.split()[-1]


def run_and_die(processes, folder, place):
    done = subprocess.run(command(processes, "share", folder, place), capture_output=True, text=True, env=ENVIRONMENT)
    if processes == 1:
        assert done.returncode == -signal.SIGKILL, done.stderr[-8000:]
    else:  # the launcher ends the others, and tells
        assert done.returncode > 0
        assert "SIGKILL" in done.stderr, done.stderr[-8000:]


def last_step(folder):
    return int(next(whole_checkpoints(folder)).name.removeprefix("checkpoint-"))


def test_killed_in_every_stage_and_in_every_part_of_a_save_a_run_ends_as_if_it_had_not_been(tmp_path):
    """Bit for bit: weights, quantizers, the optimizer's state. Checkpoints lie at every third step, two are kept."""
    uninterrupted = run(1, "share", tmp_path / "whole")
    folder = tmp_path / "killed"
    for place, resumed_at in [
        ("step-4", 3),  # warm-up
        ("weights-9", 6),  # projection
        ("optimizer-18", 15),  # joint
        ("step-23", 21),
        ("rename-30", 27),  # cool-down
        ("step-37", 36),
    ]:
        run_and_die(1, folder, place)
        assert last_step(folder) == resumed_at
        in_a_save = not place.startswith("step")
        assert (folder / UNFINISHED).exists() == in_a_save
        assert len(list(folder.glob("checkpoint-*"))) <= 2
    assert run(1, "share", folder) == uninterrupted
    assert not (folder / UNFINISHED).exists()


def test_one_of_two_processes_is_killed_and_both_go_on_bit_for_bit(tmp_path):
    """In the middle of a step of the joint stage, and before its part of a checkpoint is written."""
    uninterrupted = run(2, "share", tmp_path / "whole")
    run_and_die(2, tmp_path / "killed", "step-20")
    assert last_step(tmp_path / "killed") == 18
    run_and_die(2, tmp_path / "killed", "optimizer-27")
    assert last_step(tmp_path / "killed") == 24
    assert run(2, "share", tmp_path / "killed") == uninterrupted


def test_the_process_that_writes_is_killed_in_every_stage_and_both_go_on_bit_for_bit(tmp_path):
    """In the middle of steps and of its parts of a save, all in one program, which compares how the runs end."""
    done = subprocess.run(
        [sys.executable, PROGRAM.with_name("run_kills.py"), tmp_path], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-8000:]


def test_killed_from_outside_at_whatever_instruction_a_run_ends_the_same(tmp_path):
    """As by an out-of-memory killer, some time after a checkpoint of the joint stage."""
    uninterrupted = run(1, "budget", tmp_path / "whole")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command(1, "budget", folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-18").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 18 <= last_step(folder) < run_killed.STEPS
    assert run(1, "budget", folder) == uninterrupted
