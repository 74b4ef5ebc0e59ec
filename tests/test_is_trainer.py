"""GETATrainer without a config is Trainer: the same numbers, events, logs and files, whatever a user asks of Trainer.

And with a config that removes nothing and rounds to 16 bits it is Trainer within a tolerance.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_geta import GETAConfig, GETATrainer

TIMES = ("runtime", "per_second", "memory")
EVERY_FOUR = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
BEST = EVERY_FOUR | {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 2}
# As keyword arguments of TrainingArguments, or of the trainer where the name begins with an underscore.
HABITS = {
    "defaults": {},
    "sgd, cosine": {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 3},
    "adafactor, clipped": {"optim": "adafactor", "max_grad_norm": 0.1, "weight_decay": 0.1},
    "reduced on a plateau": EVERY_FOUR | {"lr_scheduler_type": "reduce_lr_on_plateau"},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
    "uneven last batches": {"per_device_train_batch_size": 7, "per_device_eval_batch_size": 5},
    "best of the checkpoints": BEST,
    "by epochs": {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1},
    "evaluated before it starts": EVERY_FOUR | {"eval_on_start": True},
    "bfloat16": {"bf16": True},
    "checkpoints without optimizer": {"save_strategy": "steps", "save_steps": 4, "save_only_model": True},
    "smooth labels": {"label_smoothing_factor": 0.1},
    "metrics batch by batch": EVERY_FOUR | {"batch_eval_metrics": True, "_compute_metrics": "batched"},
    "metrics": EVERY_FOUR | {"_compute_metrics": "whole", "include_for_metrics": ["inputs", "loss"]},
    "no PreTrainedModel": EVERY_FOUR | {"_model": "plain"},
    "model_init": {"_model": "model_init"},
    "a loss of one's own": {"_compute_loss_func": True},
    "an optimizer and a scheduler of one's own": {"_optimizers": True},
    "a stream": {"_train_dataset": "stream"},
    "several evaluation sets": EVERY_FOUR | {"_eval_dataset": "several"},
    "too large batches": {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 6,
        "_callbacks": "out of memory",
    },
    "stopped early": BEST | {"_callbacks": "early"},
    "stopped by a callback": {"_callbacks": "stop"},
}


class TwoLayersConfig(PreTrainedConfig):
    model_type = "two_layers"

    def __init__(self, hidden_size=12, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size


class TwoLayers(PreTrainedModel):
    """Three classes of points in the plane; its dropout and its noise draw from all three random streams."""

    config_class = TwoLayersConfig
    base_model_prefix = "layers"
    main_input_name = "points"

    def __init__(self, config):
        super().__init__(config)
        self.first, self.last = nn.Linear(2, config.hidden_size), nn.Linear(config.hidden_size, 3)
        self.noise = 0.01
        self.post_init()

    def forward(self, points, labels=None):
        hidden = nn.functional.dropout(self.first(points).relu(), 0.1, self.training)
        if self.training and self.noise:
            hidden = hidden + self.noise * (np.random.rand() + random.random())
        logits = self.last(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = two_layers()

    def forward(self, points, labels=None):
        return self.inner(points, labels)


class Events(TrainerCallback):
    """Every event, with the step and what the control asked for."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, **kwargs):
            asked = (control.should_save, control.should_evaluate, control.should_log, control.should_training_stop)
            self.seen.append((name, state.global_step, asked, sorted(kwargs)))

        return note


class Stream(IterableDataset):
    def __iter__(self):
        yield from points(40)


class OutOfMemory(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.train_batch_size > 5:
            raise RuntimeError("CUDA out of memory.")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 7


def two_layers():
    torch.manual_seed(5)
    return TwoLayers(TwoLayersConfig())


def points(count, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    where = np.array([[0, 1], [1, -1], [-1, -1]])[labels] + 0.3 * draw.standard_normal((count, 2))
    return [{"points": p, "labels": int(n)} for p, n in zip(where.astype(np.float32), labels, strict=True)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def batched_accuracy():
    seen = []

    def metric(prediction, compute_result):
        seen.append(float((prediction.predictions.argmax(-1) == prediction.label_ids).float().mean()))
        return {"accuracy": sum(seen) / len(seen)} if compute_result else {}

    return metric


def mean_square(outputs, labels, num_items_in_batch=None):
    return (outputs["logits"] - nn.functional.one_hot(labels, 3)).square().mean()


def make(cls, folder, habit, **options):
    """A trainer of `cls` with a habit of `HABITS`, and its record of events."""
    values = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "num_train_epochs": 2,
        "seed": 3,
    } | {name: value for name, value in habit.items() if not name.startswith("_")}
    asked = {name: value for name, value in habit.items() if name.startswith("_")}
    events = Events()
    kinds = {"out of memory": [OutOfMemory()], "early": [EarlyStoppingCallback(1, 10.0)], "stop": [Stop()]}
    options |= {
        "args": TrainingArguments(output_dir=str(folder), **values),
        "train_dataset": Stream() if "_train_dataset" in asked else points(40),
        "eval_dataset": {"one": points(17, 1), "two": points(9, 2)} if "_eval_dataset" in asked else points(17, 1),
        "callbacks": [events, *kinds.get(asked.get("_callbacks"), [])],
    }
    if asked.get("_model") == "model_init":
        options["model_init"] = two_layers
    else:
        options["model"] = Plain() if asked.get("_model") == "plain" else two_layers()
    if metric := asked.get("_compute_metrics"):
        options["compute_metrics"] = batched_accuracy() if metric == "batched" else accuracy
    if "_compute_loss_func" in asked:
        options["compute_loss_func"] = mean_square
    if "_optimizers" in asked:
        optimizer = torch.optim.RMSprop(options["model"].parameters(), lr=0.01)
        options["optimizers"] = (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    return cls(**options), events


def timeless(value):
    """Without the figures that a clock gave, and without the folder's name."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(part in str(k) for part in TIMES)}
    if isinstance(value, list | tuple):
        return [timeless(v) for v in value]
    return Path(value).name if isinstance(value, str) else value


def contents(folder):
    """Every file under a folder, as values that compare; torch's files by what is in them."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix == ".json":
            value = timeless(json.loads(path.read_bytes()))
        elif path.suffix in (".pt", ".pth", ".bin"):
            value = torch.load(path, weights_only=False)
            value = value.to_dict() if isinstance(value, TrainingArguments) else value
            value = repr(timeless(value))
        else:
            value = path.read_bytes()
        found[str(path.relative_to(folder))] = value
    return found


def same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("habit", HABITS)
def test_without_a_config_it_is_trainer(habit, tmp_path):
    """Events with their controls, logs, weights, metrics, predictions, and every file of every checkpoint."""
    runs = []
    for cls in (Trainer, GETATrainer):
        torch.set_printoptions(precision=12, threshold=10**6)
        trainer, events = make(cls, tmp_path / cls.__name__ / "out", HABITS[habit])
        output = trainer.train()
        trainer.save_model()
        trainer.save_state()
        figures = {"train": output.metrics, "loss": output.training_loss, "evaluate": trainer.evaluate()}
        predicted = trainer.predict(points(11, 4))
        runs.append((trainer, events, timeless(figures), predicted))
    torch.set_printoptions(profile="default")
    (plain, events, figures, predicted), (ours, our_events, our_figures, our_predicted) = runs
    assert our_events.seen == events.seen
    assert len(events.seen) > 20
    assert our_figures == figures
    assert timeless(ours.state.log_history) == timeless(plain.state.log_history)
    assert same_bits(ours.model, plain.model)
    assert np.array_equal(our_predicted.predictions, predicted.predictions)
    files = contents(tmp_path / "Trainer")
    assert "out/model.safetensors" in files
    assert contents(tmp_path / "GETATrainer") == files


@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_of_one_is_resumed_by_the_other(shards, tmp_path):
    """Bit for bit like the run that was never interrupted, from shards too."""
    habit = EVERY_FOUR | {"gradient_accumulation_steps": 2, "logging_steps": 4}
    whole, _ = make(Trainer, tmp_path / "Trainer", habit)
    whole.train()
    ours, _ = make(GETATrainer, tmp_path / "GETATrainer", habit)
    ours.train()
    for saved, cls in (("Trainer", GETATrainer), ("GETATrainer", Trainer), ("GETATrainer", GETATrainer)):
        checkpoint = tmp_path / saved / "checkpoint-8"
        if shards:
            split_into_shards(checkpoint)
        resumed, _ = make(cls, tmp_path / "resumed", habit)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same_bits(resumed.model, whole.model)
        assert timeless(resumed.state.log_history[:-1]) == timeless(whole.state.log_history[:-1])


def split_into_shards(folder):
    if not (folder / "model.safetensors").exists():
        return
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"model-{number:05d}-of-{len(tensors):05d}.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("given", [True, "checkpoint-99"])
def test_a_checkpoint_that_is_not_there_is_refused_in_trainers_words(given, tmp_path):
    said = []
    for cls in (Trainer, GETATrainer):
        trainer, _ = make(cls, tmp_path, {})
        with pytest.raises(Exception, match="alid checkpoint") as refusal:
            trainer.train(resume_from_checkpoint=given if given is True else str(tmp_path / given))
        said.append((type(refusal.value), str(refusal.value)))
    assert said[0] == said[1]


def test_a_subclass_overrides_what_a_subclass_of_trainer_overrides(tmp_path):
    """Loader, optimizer, loss, and a step that counts."""
    weights = []
    for cls in (Trainer, GETATrainer):

        class Mine(cls):
            steps = 0

            def get_train_dataloader(self):
                return DataLoader(self.train_dataset, batch_size=5, collate_fn=self.data_collator)

            def create_optimizer(self, model=None):
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.5)
                return self.optimizer

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                return (2 * loss, outputs) if return_outputs else 2 * loss

            def training_step(self, *args, **kwargs):
                self.steps += 1
                return super().training_step(*args, **kwargs)

        trainer, _ = make(Mine, tmp_path / cls.__name__, {})
        trainer.train()
        assert trainer.steps == 12
        weights.append(trainer.model)
    assert same_bits(*weights)


def test_with_nothing_removed_and_sixteen_bits_it_is_trainer_within_the_rounding(tmp_path):
    """Losses and gradients, not each weight: one that grows beyond its clip waits until the clip has followed."""
    off = GETAConfig(group_sparsity=0, weight_bits=[16, 16])
    habit = EVERY_FOUR | {"optim": "sgd", "max_steps": 24}
    plain, events = make(Trainer, tmp_path / "plain", habit)
    plain.train()
    ours, our_events = make(GETATrainer, tmp_path / "ours", habit, geta_config=off)
    ours.train()
    assert our_events.seen == events.seen
    for log, expected in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert expected.keys() <= log.keys()
        for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            assert log.get(name, 0) == pytest.approx(expected.get(name, 0), rel=2e-3), name
    files = {str(path.relative_to(tmp_path / "plain")) for path in (tmp_path / "plain").rglob("*")}
    assert files <= {str(path.relative_to(tmp_path / "ours")) for path in (tmp_path / "ours").rglob("*")}
