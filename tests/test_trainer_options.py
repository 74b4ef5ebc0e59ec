"""Options of Trainer that stop, restart or repeat a run, and the stages of a run with compression."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import EarlyStoppingCallback, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer
from hf_geta.optim.schedule import Stage
from tests.test_trainer import CONFIG, STEPS, arguments, different_tensors, digits, make_trainer, tiny_vit

BUDGET = GETAConfig(target_bops=0.01, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=4)
EVALUATE = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}


class SmallDevice(GETATrainer):
    """Has no memory for more than five images at a time, and at one step of the first run for none."""

    breaks_at, tried = 0, ()

    def training_step(self, model, inputs, *rest):
        size, step = len(inputs["pixel_values"]), self.state.global_step
        if size not in self.tried:
            self.tried = (*self.tried, size)
        if step == self.breaks_at and (size > 5 or (step and len(self.tried) == 1)):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, *rest)


@pytest.mark.parametrize("config", [CONFIG, BUDGET], ids=["share", "budget"])
@pytest.mark.parametrize("breaks_at", [0, 10], ids=["first step", "joint stage"])
def test_auto_find_batch_size_plans_the_run_anew(breaks_at, config, tmp_path):
    """With smaller batches an epoch has more steps: the stages, and what is removed, are those of the run that ends."""
    changes = {"max_steps": -1, "num_train_epochs": 1, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path, config, cls=SmallDevice, **changes)
    trainer.breaks_at = breaks_at
    trainer.train()
    assert trainer.tried[0] == 8
    assert trainer.tried[1] < 8
    assert trainer.state.global_step == trainer.state.max_steps > 200 // 8
    assert trainer.qasso.step_count == trainer.qasso.schedule.total_steps == trainer.state.max_steps
    assert trainer.stage is Stage.COOLDOWN
    qadg = trainer.model.geta.qadg
    assert sum(map(len, qadg.zero_groups(trainer.model).values())) == trainer.qasso.groups_to_remove > 0
    trainer.save_model(str(tmp_path / "small"))


class LargeViT(ViTForImageClassification):
    """Its device has memory for the numbers of five images; a trace has none."""

    def forward(self, pixel_values=None, labels=None, **options):
        if len(pixel_values) > 5 and not (torch.compiler.is_compiling() or isinstance(pixel_values, FakeTensor)):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(pixel_values, labels=labels, **options)


def large_vit():
    model = tiny_vit()
    model.__class__ = LargeViT
    return model


@pytest.mark.parametrize(
    ("config", "model", "teacher"),
    [
        (CONFIG, large_vit, None),
        (GETAConfig(weight_bits=None, pruning_periods=4), large_vit, None),
        (CONFIG, tiny_vit, large_vit),
    ],
    ids=["quantized", "only pruned", "with a teacher"],
)
def test_auto_find_batch_size_finds_what_all_that_comes_before_training_has_memory_for(
    config, model, teacher, tmp_path, caplog
):
    def trainer():
        return GETATrainer(
            model=model(),
            args=arguments(tmp_path, auto_find_batch_size=True, save_strategy="steps", save_steps=20),
            geta_config=config,
            teacher_model=teacher and teacher(),
            train_dataset=digits()[:200],
        )

    first = trainer()
    first.train()
    assert first._train_batch_size == 5
    assert first.qasso.removed.sum() == first.qasso.groups_to_remove
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert different_tensors(resumed.model, first.model) == []
    assert "could not be tried" not in caplog.text
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):  # in its own words
        make_trainer(tmp_path, config, model=large_vit()).train()


@pytest.mark.parametrize("config", [CONFIG, BUDGET], ids=["share", "budget"])
def test_a_run_that_had_ended_may_train_on(config, tmp_path, caplog):
    """Its groups and widths stay what they are: the cool-down is longer."""
    ended = make_trainer(tmp_path, config, save_strategy="steps", save_steps=STEPS)
    ended.train()
    longer = make_trainer(tmp_path, config, max_steps=2 * STEPS)
    longer.train(resume_from_checkpoint=True)
    assert longer.qasso.step_count == longer.qasso.schedule.total_steps == 2 * STEPS
    assert torch.equal(longer.qasso.removed, ended.qasso.removed)
    assert torch.equal(longer.qasso.final_bits, ended.qasso.final_bits)
    stages = [entry["stage"] for entry in longer.state.log_history if "loss" in entry and entry["step"] > STEPS]
    assert stages == [Stage.COOLDOWN] * 10
    assert f"the cool-down: from step {STEPS * 6 // 10} to {2 * STEPS}" in caplog.text


def test_a_run_that_is_cut_shorter_than_its_pruning_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=80, save_strategy="steps", save_steps=30).train()
    shorter = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="step 30 of 80 planned .* miss its targets with 40: .* begins at step 48"):
        shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert shorter.qasso.step_count == 0


def test_each_trial_of_a_search_compresses_a_fresh_model(tmp_path):
    trainer = GETATrainer(
        model_init=lambda trial: tiny_vit(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=STEPS, save_strategy="steps"),
        geta_config=CONFIG,
        train_dataset=digits()[:200],
        eval_dataset=digits()[200:],
    )
    seen = []

    def objective(metrics):
        seen.append((trainer.model, int(trainer.qasso.removed.sum()), trainer.qasso.step_count))
        return metrics["eval_loss"]

    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True)},
        compute_objective=objective,
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    assert [what[1:] for what in seen] == [(trainer.qasso.groups_to_remove, STEPS)] * 2
    assert seen[0][0] is not seen[1][0]
    folder = tmp_path / f"run-{best.run_id}" / f"checkpoint-{STEPS}"
    assert json.loads((folder / "trainer_state.json").read_text())["trial_params"] == best.hyperparameters


def test_early_stopping_waits_for_models_that_meet_the_targets(tmp_path):
    """A loss that never falls stops the run, but not before its cool-down: till then nothing competes."""
    stopping = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.0}
    callbacks = [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **stopping, **EVALUATE)
    trainer.train()
    cooldown = int(STEPS * 0.6)
    assert cooldown < trainer.state.global_step < STEPS
    assert trainer.state.best_global_step > cooldown
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove
    trainer.save_model(str(tmp_path / "small"))


def test_a_run_may_begin_with_an_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_on_start=True, **EVALUATE)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first["step"] == 0
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove
