"""What happens to long runs of GETATrainer: disks fill up, batches hold NaN, folders are used twice."""

import contextlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer

from hf_geta import GETATrainer
from hf_geta.resuming import UNFINISHED
from tests.test_trainer import STEPS, different_tensors, make_trainer

EVERY_FIVE = {"save_strategy": "steps", "save_steps": 5}


class FullDisk(GETATrainer):
    """While the checkpoint of step 20 is written the system takes no file beyond a size, as on a full disk."""

    largest = 0

    def _save_checkpoint(self, model, trial):
        with self.full_disk() if self.state.global_step == 20 else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    @contextlib.contextmanager
    def full_disk(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        printed = [os.dup(stream) for stream in (1, 2)]  # to files, perhaps, that are larger already
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, hard))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            for stream, kept in zip((1, 2), printed, strict=True):
                os.dup2(kept, stream)
                os.close(kept)
            os.close(nowhere)


@pytest.mark.parametrize("cut_short", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_costs_no_more_than_the_checkpoint_that_it_cuts_short(cut_short, tmp_path):
    whole = make_trainer(tmp_path / "whole", **EVERY_FIVE)
    whole.train()
    folder = tmp_path / "full"
    trainer = make_trainer(folder, cls=FullDisk, save_total_limit=1, **EVERY_FIVE)
    trainer.largest = (tmp_path / "whole" / "checkpoint-20" / cut_short).stat().st_size - 1
    with pytest.raises(OSError, match=r"checkpoint-20 could not be written .* last whole .*checkpoint-15;"):
        trainer.train()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-15"]
    resumed = make_trainer(folder, **EVERY_FIVE)
    resumed.train(resume_from_checkpoint=True)
    assert different_tensors(resumed.model, whole.model) == []


class BrokenBatches(GETATrainer):
    """Some batches hold a NaN."""

    broken = ()

    def training_step(self, model, inputs, *arguments):
        if self.state.global_step in self.broken:
            inputs["pixel_values"] = inputs["pixel_values"].clone()
            inputs["pixel_values"][0, 0, 3, 3] = torch.nan
        return super().training_step(model, inputs, *arguments)


@pytest.mark.parametrize("clipping", [1.0, 0.0])
def test_a_run_with_broken_batches_tells_of_them_and_keeps_its_promises(clipping, tmp_path):
    trainer = make_trainer(tmp_path, cls=BrokenBatches, max_grad_norm=clipping, **EVERY_FIVE)
    trainer.broken = {2, 9, 14, 15, 30}  # in every stage
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps", 0) for entry in logs] == [1, 1, 2, 4, 4, 4, 4, 5, 5, 5]
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove
    assert trainer.qasso.step_count == STEPS - 5
    trainer.save_model(str(tmp_path / "small"))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["layers"]


def test_a_run_that_broke_stops_and_names_where_to_go_on(tmp_path):
    trainer = make_trainer(tmp_path, cls=BrokenBatches, **EVERY_FIVE)
    trainer.broken = range(12, STEPS)
    with pytest.raises(FloatingPointError, match=r"20 optimizer steps in a row .* last whole checkpoint is .*-30;"):
        trainer.train()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.qasso.removed.sum() == resumed.qasso.groups_to_remove


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_statistics_that_took_nan_stop_the_run_before_a_checkpoint_keeps_them(logging_steps, tmp_path):
    """A batch norm takes NaN from a forward pass, whatever becomes of the step."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    changes = {"logging_steps": logging_steps, **EVERY_FIVE}
    trainer = make_trainer(tmp_path, cls=BrokenBatches, model=model, **changes)
    trainer.broken = {11}
    with pytest.raises(FloatingPointError, match=r"running_mean.* last whole checkpoint is .*checkpoint-10;"):
        trainer.train()
    assert trainer.state.global_step == (12 if logging_steps == 1 else 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_checkpoints_of_an_earlier_run_in_the_folder_are_replaced_whole(tmp_path):
    make_trainer(tmp_path, **EVERY_FIVE).train()
    (tmp_path / "checkpoint-10" / "of the earlier run").write_text("")
    (tmp_path / UNFINISHED / "checkpoint-10").mkdir(parents=True)  # it was killed while it saved
    again = make_trainer(tmp_path, seed=4, **EVERY_FIVE)
    again.train()
    assert not (tmp_path / "checkpoint-10" / "of the earlier run").exists()
    assert not (tmp_path / UNFINISHED).exists()
    resumed = make_trainer(tmp_path, seed=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert different_tensors(resumed.model, again.model) == []


@pytest.mark.parametrize("output_dir", ["", "out", "./out", "out//of/"])
def test_the_best_checkpoint_is_where_the_state_says(tmp_path, monkeypatch, output_dir):
    """Only the cool-down competes; the last checkpoint and the best are kept."""
    monkeypatch.chdir(tmp_path)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_total_limit": 1}
    trainer = make_trainer(output_dir or tmp_path, metric_for_best_model="loss", **best, **EVERY_FIVE)
    trainer.train()
    path = trainer.state.best_model_checkpoint
    assert Path(path).resolve().parent == (tmp_path / output_dir).resolve()
    assert Path(path).is_dir()
    state = json.loads((Path(path) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == path
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove


def test_without_a_config_checkpoints_are_those_of_trainer(tmp_path):
    contents = []
    for cls in (GETATrainer, Trainer):
        folder = tmp_path / cls.__name__
        trainer = make_trainer(folder, config=None, cls=cls, save_total_limit=2, **EVERY_FIVE)
        trainer.train()
        contents.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
    assert contents[0] == contents[1]
    assert len(contents[0]) > 10
