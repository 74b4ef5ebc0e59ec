#!/usr/bin/env python
"""What compression costs while it trains: GETATrainer over plain Trainer on the same model, as ratios.

    python scripts/benchmark.py training [--rounds 3] [--steps_per_stage 12] [--output outputs/training.json]

A ViT of width 192 and depth 6 on 64 patches, batch 64. Plain and compressed runs take turns in one process, and every
ratio is the median over the rounds of (median step of a stage / median plain step of the same round), so that a busy
machine slows both sides. Peak memory is that of fresh processes, above what the imports take. Batches are random
numbers: time does not depend on what they show.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer, build_qadg

SKIPPED_STEPS = 2  # of every stage: caches fill, kernels compile
PLAIN = "plain"
VARIANTS: dict[str, dict[str, Any]] = {
    "weights": {"weight_bits": [4, 8]},
    "weights+activations": {"weight_bits": [4, 8], "activation_bits": [4, 8]},
    "budget": {"weight_bits": [2, 8], "activation_bits": [2, 8], "target_bops": 0.01},
}


@dataclasses.dataclass
class BenchmarkArguments:
    """How much is measured."""

    rounds: int = dataclasses.field(default=3, metadata={"help": "Times that every variant runs."})
    steps_per_stage: int = dataclasses.field(default=12, metadata={"help": "Optimizer steps of each stage."})
    batch_size: int = dataclasses.field(default=64, metadata={"help": "Images in a batch."})
    width: int = dataclasses.field(default=192, metadata={"help": "Hidden size of the ViT."})
    depth: int = dataclasses.field(default=6, metadata={"help": "Layers of the ViT."})
    output: str = dataclasses.field(default="outputs/training.json", metadata={"help": "Where the figures go."})


class StepTimer(TrainerCallback):
    """Seconds of every step (forward to optimizer), and of its optimizer step alone, by stage."""

    def __init__(self) -> None:
        self.trainer: GETATrainer | None = None
        self.steps: dict[str, list[float]] = {}
        self.optimizer_steps: dict[str, list[float]] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = _now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_begin = _now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_seconds = _now() - self._optimizer_begin

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = _now() - self._begin
        assert self.trainer is not None
        stage = PLAIN if self.trainer.qasso is None else self.trainer.stage.label
        self.steps.setdefault(stage, []).append(seconds)
        self.optimizer_steps.setdefault(stage, []).append(self._optimizer_seconds)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_model(arguments: BenchmarkArguments) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=arguments.width,
            num_hidden_layers=arguments.depth,
            num_attention_heads=arguments.width // 64 or 1,
            intermediate_size=4 * arguments.width,
            image_size=32,
            patch_size=4,
            id2label={i: str(i) for i in range(10)},
        )
    )


def run(arguments: BenchmarkArguments, variant: str) -> StepTimer:
    """Train once; `variant` is "plain" or a key of VARIANTS."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * arguments.batch_size, 3, 32, 32, generator=generator)
    dataset = [{"pixel_values": image, "labels": i % 10} for i, image in enumerate(images)]
    steps = arguments.steps_per_stage
    stages: dict[str, Any] = {"warmup_steps": steps, "projection_steps": steps, "joint_steps": steps}
    geta_config = None if variant == PLAIN else GETAConfig(**VARIANTS[variant], **stages, pruning_periods=2)
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GETATrainer(
            model=make_model(arguments),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=2 * steps if variant == PLAIN else 4 * steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=1e-3,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            geta_config=geta_config,
            train_dataset=dataset,
            callbacks=[timer],
        )
        timer.trainer = trainer
        trainer.train()
    return timer


def step_ratios(rounds: Sequence[dict[str, StepTimer]], variant: str, attribute: str) -> dict[str, float]:
    """Stage -> median over rounds of (median seconds of the stage / median plain seconds); "run": by default shares."""
    ratios: dict[str, float] = {}
    for stage in getattr(rounds[0][variant], attribute):
        values = [
            _median(getattr(timers[variant], attribute)[stage]) / _median(getattr(timers[PLAIN], attribute)[PLAIN])
            for timers in rounds
        ]
        ratios[stage] = statistics.median(values)
    config = GETAConfig()
    shares = [config.warmup_steps, config.projection_steps, config.joint_steps]
    shares.append(1 - sum(shares))
    ratios["run"] = sum(share * ratio for share, ratio in zip(shares, ratios.values(), strict=True))
    return ratios


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[SKIPPED_STEPS:])


def qadg_seconds(arguments: BenchmarkArguments) -> float:
    model, times = make_model(arguments), []
    inputs = {"pixel_values": torch.randn(arguments.batch_size, 3, 32, 32)}
    for _ in range(3):
        start = time.perf_counter()
        build_qadg(model, inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(arguments: BenchmarkArguments, variant: str) -> int:
    """Peak memory of one run in a process of its own: on the accelerator, or else resident."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes_here, (arguments, variant))


def _peak_bytes_here(arguments: BenchmarkArguments, variant: str) -> int:
    before = resident_peak_bytes()
    run(arguments, variant)
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak_bytes() - before


def resident_peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss counts the parent's memory too on Linux
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    """All figures as plain values."""
    names = [PLAIN, *VARIANTS]
    run(dataclasses.replace(arguments, steps_per_stage=8), PLAIN)  # the process's first run is the slow one
    rounds = [{name: run(arguments, name) for name in names} for _ in range(arguments.rounds)]
    memory = {name: peak_bytes(arguments, name) for name in names}
    plain = statistics.median(_median(timers[PLAIN].steps[PLAIN]) for timers in rounds)
    plain_optimizer = statistics.median(_median(timers[PLAIN].optimizer_steps[PLAIN]) for timers in rounds)
    return {
        "settings": dataclasses.asdict(arguments)
        | {"threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.cuda.is_available()},
        "plain_step_ms": 1000 * plain,
        "plain_optimizer_step_ms": 1000 * plain_optimizer,
        "step_ratio": {name: step_ratios(rounds, name, "steps") for name in VARIANTS},
        "optimizer_step_ratio": {name: step_ratios(rounds, name, "optimizer_steps") for name in VARIANTS},
        "peak_memory_ratio": {name: memory[name] / memory[PLAIN] for name in VARIANTS},
        "plain_peak_bytes": memory[PLAIN],
        "qadg_seconds": qadg_seconds(arguments),
    }


def table(figures: dict[str, Any]) -> str:
    """Ratios to plain training as a Markdown table, one row for each stage."""
    rows = [("over plain Trainer", list(VARIANTS)), ("---", ["---:"] * len(VARIANTS))]
    for key, label in (("step_ratio", "step"), ("optimizer_step_ratio", "optimizer step")):
        for stage in figures[key]["weights"]:
            rows.append((f"{label}, {stage}", [f"{figures[key][variant][stage]:.2f}x" for variant in VARIANTS]))
    rows.append(("peak memory", [f"{figures['peak_memory_ratio'][variant]:.2f}x" for variant in VARIANTS]))
    lines = [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    plain, optimizer = figures["plain_step_ms"], figures["plain_optimizer_step_ms"]
    times = f"plain step {plain:.1f} ms, its optimizer step {optimizer:.1f} ms"
    return "\n".join([*lines, "", f"{times}; graph built in {figures['qadg_seconds']:.2f} s"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(BenchmarkArguments)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    figures = benchmark(arguments)
    write_figures(figures, arguments.output)
    print(table(figures))
    return figures


def write_figures(figures: dict[str, Any], path: str) -> None:
    """The figures as JSON, in a folder that is made where there is none."""
    output = Path(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
