"""GETATrainer under accelerate's FSDP2 ends as it does in one process, resumes anywhere, and saves what all can load.

Real launches of `run_fsdp.py`, compared with runs of a single process, which is this one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_geta.checkpoint.resumable import damage, last_whole_checkpoint
from hf_geta.resuming import UNFINISHED
from tests.processes import run_fsdp

PROGRAM = Path(run_fsdp.__file__)
FSDP_CONFIG = PROGRAM.parents[2] / "configs" / "accelerate" / "fsdp2.yaml"
ACCELERATE = ("accelerate.commands.launch", "--config_file", FSDP_CONFIG)
ACCELERATE += ("--num_processes", "2", "--mixed_precision", "no")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "4")
CHECKPOINT = f"checkpoint-{run_fsdp.RESUMED_STEP}"
AUTO = {"vit": AutoModelForImageClassification, "llama": AutoModelForCausalLM}
TOLERANCE = 1e-6  # of float64 weights and float32 quantizers after 30 steps; one group that differs is 1e-2


def launch(launcher, folder, *names):
    command = [sys.executable, "-m", *launcher, PROGRAM, folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if any("!" in str(name) for name in names):
        assert "SIGKILL" in done.stderr, done.stderr[-8000:]
    else:
        assert done.returncode == 0, done.stderr[-8000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Processes -> the folder with what their runs ended with.

    Two go on from their own checkpoints, of the Llama from those of a run that was killed; four from those of two.
    """
    folders = {processes: tmp_path_factory.mktemp(f"of-{processes}") for processes in (1, 2, 4)}
    for name in AUTO:
        torch.save(run_fsdp.train(name, folders[1]), folders[1] / f"{name}.pt")
    vit, llama, killed = (
        folder / CHECKPOINT
        for folder in (
            folders[2] / "vit-checkpoints",
            folders[2] / "llama-checkpoints",
            folders[2] / "killed" / "llama-checkpoints",
        )
    )
    launch(ACCELERATE, folders[2] / "killed", "llama!optimizer")
    launch(ACCELERATE, folders[2], *AUTO, f"vit@{vit}", f"llama@{killed}", "bfloat16")
    launch(TORCHRUN, folders[4], f"vit@{vit}", f"llama@{llama}")
    return folders


def ended(folders, processes, name):
    result = torch.load(folders[processes] / f"{name}.pt", weights_only=False)
    assert (result["processes"], result["in_pieces"]) == (processes, processes > 1)
    return result


def check_same(ours, theirs, tolerance=TOLERANCE):
    periods = len(ours["groups"])  # of a resumed run, the later ones
    assert 0 < periods <= len(theirs["groups"])
    assert ours["groups"] == theirs["groups"][-periods:]
    assert sum(ours["groups"][-1]) > 0
    torch.testing.assert_close(ours["widths"], theirs["widths"], rtol=0, atol=tolerance)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, expected in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], expected, rtol=0, atol=tolerance, msg=name)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=tolerance)
    torch.testing.assert_close(ours["predictions"], theirs["predictions"], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", AUTO)
def test_in_pieces_a_run_ends_as_in_one_process(folders, name):
    """Groups after every period, weights, widths, and what it logged: the norm by which gradients were clipped, too."""
    ours, theirs = ended(folders, 2, name), ended(folders, 1, name)
    check_same(ours, theirs)
    assert len(ours["groups"]) == run_fsdp.PERIODS
    assert len(ours["logs"]) == len(theirs["logs"]) > 5
    for log, expected in zip(ours["logs"], theirs["logs"], strict=True):
        assert log == pytest.approx(expected, rel=1e-5)
        assert log.get("grad_norm", 1) > run_fsdp.CLIPPED["max_grad_norm"]


@pytest.mark.parametrize("name", AUTO)
def test_what_it_saves_is_what_one_process_saves(folders, name):
    ours, theirs = folders[2] / name, folders[1] / name
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    (values, form), (expected, its_form) = (
        tree_flatten(json.loads((folder / "config.json").read_text())) for folder in (ours, theirs)
    )
    assert form == its_form
    assert values == [pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for value in expected]
    reports = [json.loads((folder / "geta_report.json").read_text()) for folder in (ours, theirs)]
    assert reports[0]["architecture"] == reports[1]["architecture"] in (ours / "config.json").read_text()
    assert reports[0]["compressed"] == pytest.approx(reports[1]["compressed"])
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(tensors[key], value, rtol=0, atol=TOLERANCE, msg=key)
    model = AUTO[name].from_pretrained(ours)
    assert model.config.quantization_config.quant_method == "geta"


@pytest.mark.parametrize("name", AUTO)
def test_resumed_inside_a_pruning_period_it_ends_as_the_uninterrupted_run_bit_for_bit(folders, name):
    check_same(ended(folders, 2, f"{name}-resumed"), ended(folders, 2, name), tolerance=0)


def test_what_a_killed_process_left_of_a_checkpoint_is_no_checkpoint(folders):
    """It was killed before its part was whole, and the other one waited for it."""
    run = folders[2] / "killed" / "llama-checkpoints"
    assert sorted(path.name for path in run.iterdir()) == sorted([UNFINISHED, CHECKPOINT])
    assert last_whole_checkpoint(run) == str(run / CHECKPOINT)


@pytest.mark.parametrize("name", AUTO)
def test_it_resumes_on_another_number_of_processes(folders, name):
    check_same(ended(folders, 4, f"{name}-resumed"), ended(folders, 2, name))


def test_in_bfloat16_with_checkpointing_it_learns_and_saves_a_model_that_generates(folders):
    """Processes that part from each other are told by the program itself."""
    result = ended(folders, 2, "bfloat16")
    losses = [log["loss"] for log in result["logs"]]
    assert losses[-1] < losses[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(folders[2] / "bfloat16")
    assert model.generate(torch.tensor([[72, 101]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_while_it_trains_it_pushes_pieces_as_a_checkpoint_and_in_the_cool_down_the_small_model(folders):
    """Every process finalizes; the first sends."""
    small, checkpoint = [], ["model_piece_0_of_2.safetensors", "model_piece_1_of_2.safetensors"]
    for names in ended(folders, 2, "bfloat16")["pushed"]:
        if names[0].startswith("last-checkpoint/"):
            assert {f"last-checkpoint/{name}" for name in checkpoint} <= set(names)
        else:
            small.append(names)
    assert len(small) == 3  # of steps 28 and 30, which are in the cool-down, and of the end
    assert all({"README.md", "config.json", "geta_report.json", "model.safetensors"} <= set(names) for names in small)


@pytest.mark.parametrize("file", ["model_piece_1_of_2.safetensors", "optimizer_piece_0_of_2.safetensors"])
def test_a_checkpoint_with_a_damaged_piece_is_told_and_passed_over(folders, file, tmp_path):
    run = folders[2] / "llama-checkpoints"
    for step in (13, 26):
        assert damage(run / f"checkpoint-{step}") == ""
        shutil.copytree(run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-26" / file
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{file} is cut short or damaged" in damage(path.parent)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-13")
    path.unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        run_fsdp.new_trainer("llama", tmp_path).train(resume_from_checkpoint=str(path.parent))


def test_a_run_of_the_other_kind_is_refused(folders, tmp_path):
    checkpoint = folders[2] / "llama-checkpoints" / CHECKPOINT
    with pytest.raises(ValueError, match=r"is of a run in pieces: resume it under FSDP2 .*fsdp2\.yaml"):
        run_fsdp.new_trainer("llama", tmp_path).train(resume_from_checkpoint=str(checkpoint))
