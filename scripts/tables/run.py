"""One run of a table: the stages of a method, each by GETATrainer, and the figures of the model loaded from disk."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from runs import head_optimizer, weight_bytes
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_geta import GETAConfig, GETATrainer
from hf_geta.checkpoint.directory import replace_text
from hf_geta.optim.schedule import Stage
from hf_geta.quantization.layers import quantized_layers
from hf_geta.report import load_report
from hf_geta.report.figures import DENSE
from tables.data import local_folders
from tables.identity import hardware, identity
from tables.plan import Run
from tables.tasks import Task, load_task

LOGS_PER_STAGE = 20
BITS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where a table keeps its things."""

    table: Path
    data_dir: str | None  # the user's, with a folder for each data set

    def result(self, name: str) -> Path:
        return self.table / "runs" / f"{name}.json"

    def load(self, name: str) -> dict[str, Any]:
        """The result of a finished run."""
        return json.loads(self.result(name).read_text(encoding="utf-8"))

    def model(self, name: str) -> Path:
        return self.table / "models" / name

    def prepared(self, experiment: str, quick: bool) -> Path:
        return self.table / "data" / f"{'quick-' if quick else ''}{experiment}.pt"


def finished(run: Run, folders: Folders, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings, code, versions and data; None where there is none.

    Args:
        done: results of the runs that it needs; it must have come after these.
    """
    path = folders.result(run.name)
    if not path.exists() or (run.keeps_model and not folders.model(run.name).exists()):
        return None
    if not set(run.needs) <= set(done):
        return None
    result = folders.load(run.name)
    same = {"settings": run.settings, "after": _times(done, run), **_identity(run, folders)}
    return result if all(result.get(key) == value for key, value in same.items()) else None


def _identity(run: Run, folders: Folders) -> dict[str, Any]:
    return identity(local_folders(run.settings["data"], run.settings["model"], folders.data_dir))


def _times(done: Mapping[str, Mapping[str, Any]], run: Run) -> dict[str, str]:
    """When each run that this one needs was finished: one that was repeated left another model or other figures."""
    return {other: done[other]["finished"] for other in run.needs}


def execute(run: Run, folders: Folders, quick: bool) -> dict[str, Any]:
    """Train, measure, and write the result as JSON."""
    started = time.perf_counter()
    decided_by = {"after": _times({other: folders.load(other) for other in run.needs}, run), **_identity(run, folders)}
    task = load_task(run.settings, folders.data_dir, folders.prepared(run.settings["experiment"], quick))
    path = folders.result(run.name)
    with tempfile.TemporaryDirectory() as temporary:
        figures = train_and_measure(run, folders, task, Path(temporary))
        if run.keeps_model:
            path.unlink(missing_ok=True)  # an older result is not that of the model that is written now
            shutil.rmtree(folders.model(run.name), ignore_errors=True)
            shutil.copytree(Path(temporary) / "model", folders.model(run.name))
    result = {
        "name": run.name,
        **{key: run.settings[key] for key in ("experiment", "method", "budget", "seed")},
        "figures": figures,
        "total_seconds": time.perf_counter() - started,
        "finished": datetime.datetime.now().isoformat(timespec="milliseconds"),
        "hardware": hardware(),
        **decided_by,
        "settings": run.settings,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=1) + "\n")
    return result


def train_and_measure(run: Run, folders: Folders, task: Task, work: Path) -> dict[str, Any]:
    """The figures of the run's last model, saved in `work`/model, relative to the model that it began with."""
    settings, folder = run.settings, work / "model"
    set_seed(settings["seed"])
    model = task.load_model()
    dense_groups_left, relative_bops, seconds, widths = 1.0, 1.0, 0.0, WidthCheck()
    stages, steps = settings["stages"], _total_steps(settings["training"], len(task.train))
    for number, fields in enumerate(stages):
        if number:
            model = task.auto_class.from_pretrained(folder)
        config = _stage_config(fields, _given_sparsity(settings, folders), relative_bops)
        share = (steps * (number + 1)) // len(stages) - (steps * number) // len(stages)
        trainer = _trainer(model, config, run, folders, task, share, work)
        widths.trainer = trainer
        trainer.add_callback(widths)
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds += time.perf_counter() - begin
        shutil.rmtree(folder, ignore_errors=True)
        trainer.save_model(str(folder))
        report = DENSE | load_report(folder).get("compressed", {})
        relative_bops *= report["relative_bops"]
        dense_groups_left *= 1 - report["group_sparsity"]
    device = trainer.args.device
    small = task.auto_class.from_pretrained(folder).to(device).eval()
    return {
        **task.score(small),
        "relative_bops": relative_bops,
        "group_sparsity": 1 - dense_groups_left,
        "mean_weight_bits": report["mean_weight_bits"],
        "mean_activation_bits": report["mean_activation_bits"],
        "parameters": report.get("parameters", sum(parameter.numel() for parameter in small.parameters())),
        "file_bytes": weight_bytes(folder),
        "widths_checked": widths.checked,
        "widths_outside": widths.outside,
        "seconds": seconds,
        "steps": steps,
        "batch_size": _batch_size(settings["training"]),
        f"train_{task.examples}": len(task.train),
        f"eval_{task.examples}": task.evaluation_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _total_steps(training: dict[str, Any], examples: int) -> int:
    if "max_steps" in training:
        return training["max_steps"]
    batches = math.ceil(examples / training["per_device_train_batch_size"])
    return math.ceil(training["num_train_epochs"] * math.ceil(batches / _accumulated(training)))


def _batch_size(training: dict[str, Any]) -> int:
    """Examples of one optimizer step."""
    return training["per_device_train_batch_size"] * _accumulated(training)


def _accumulated(training: dict[str, Any]) -> int:
    return training.get("gradient_accumulation_steps", 1)


def _given_sparsity(settings: dict[str, Any], folders: Folders) -> float | None:
    """The share of groups that the run named by `group_sparsity_of` removed."""
    name = settings["needs"].get("group_sparsity_of")
    if name is None:
        return None
    return folders.load(name)["figures"]["group_sparsity"]


def _stage_config(
    fields: dict[str, Any] | None, group_sparsity: float | None, relative_bops: float
) -> GETAConfig | None:
    """The stage's config; None where it compresses nothing.

    Args:
        group_sparsity: for a stage that prunes and says not how far.
        relative_bops: of the model that the stage begins with: a budget is a share of the dense model's.
    """
    if fields is None:
        return None
    fields = dict(fields)
    if group_sparsity is not None and fields.get("group_sparsity") is None:
        fields["group_sparsity"] = round(group_sparsity, 6)
    if fields.get("weight_bits", True) is None and fields.get("group_sparsity") == 0:
        return None
    if (budget := fields.get("target_bops")) is not None:
        if budget >= relative_bops:
            raise ValueError(f"target_bops={budget}: the stage before has reached {relative_bops:.4f} already.")
        fields["target_bops"] = budget / relative_bops
    return GETAConfig.from_dict(fields)


def _trainer(
    model: PreTrainedModel,
    config: GETAConfig | None,
    run: Run,
    folders: Folders,
    task: Task,
    steps: int,
    work: Path,
) -> GETATrainer:
    """The same trainer for every row; only `config` (and a teacher) differ."""
    settings = run.settings
    options = {k: v for k, v in settings["training"].items() if k not in ("num_train_epochs", "max_steps")}
    args = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        seed=settings["seed"],
        logging_steps=max(1, steps // LOGS_PER_STAGE),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )
    more: dict[str, Any] = {}
    if teacher := settings["needs"].get("teacher"):
        more["teacher_model"] = task.auto_class.from_pretrained(folders.model(teacher))
    return GETATrainer(
        model=model,
        args=args,
        geta_config=config,
        train_dataset=task.train,
        data_collator=task.collator,
        optimizers=(head_optimizer(model, args, settings["model"].get("head_learning_rate")), None),
        **more,
    )


class WidthCheck(TrainerCallback):
    """Counts the widths outside their final bounds, at every logged step from the joint stage on.

    Args set by the owner: `trainer`, whose model is looked at.
    """

    def __init__(self) -> None:
        self.trainer: GETATrainer | None = None
        self.checked = self.outside = 0

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer is None or trainer.geta_config is None or "loss" not in (logs or {}):
            return
        if trainer.qasso is None or trainer.stage < Stage.JOINT:
            return
        layers = quantized_layers(trainer.model).values()
        quantizers = {q for layer in layers for q in (layer.weight_quantizer, layer.input_quantizer)}  # some are shared
        for quantizer in quantizers:
            if quantizer is not None and quantizer.enabled:
                lower, upper = bounds(getattr(trainer.geta_config, quantizer.widths))
                self.checked += 1
                self.outside += not lower - BITS_TOLERANCE <= quantizer.bits.item() <= upper + BITS_TOLERANCE


def bounds(widths: int | Sequence[int]) -> tuple[int, int]:
    """The least and the largest width that a field of GETAConfig asks for, whatever a row goes without."""
    widths = (widths,) if isinstance(widths, int) else widths
    return min(widths), max(widths)
