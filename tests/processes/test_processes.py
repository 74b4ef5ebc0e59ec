"""Runs as they happen to users: killed, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAM = HERE / "run_digits.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments):
    command = [sys.executable, PROGRAM, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout.split()[-1]


def is_whole(checkpoint):
    """Whether the file that Trainer writes last is there to its end; a kill may leave it empty."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def kill_after_checkpoint(step, targets, output_dir):
    """Start a run and kill it, as an out-of-memory killer would, some steps after checkpoint `step`."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, targets, output_dir],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 300
    while not is_whole(output_dir / f"checkpoint-{step}"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("targets", ["share", "budget"])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(targets, tmp_path):
    """Killed in the joint stage, at whatever instruction the signal arrives."""
    uninterrupted = run(targets, tmp_path / "whole")
    kill_after_checkpoint(30, targets, tmp_path / "killed")
    whole = [path for path in (tmp_path / "killed").glob("checkpoint-*") if is_whole(path)]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]))
    assert int(last.name.split("-")[1]) < 60
    assert run(targets, tmp_path / "resumed", last) == uninterrupted
