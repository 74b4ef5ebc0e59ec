#!/usr/bin/env python
"""What compression costs while it trains: GETATrainer over plain Trainer on the same model, as ratios.

    python scripts/benchmark.py training [--rounds 3] [--steps_per_stage 12] [--output outputs/training.json]
    python scripts/benchmark.py training --model MODEL [--batch_size 4] [--length 256] [--bf16 true]

A ViT of width 192 and depth 6 on 64 patches, batch 64; or any causal language model, a folder or a name on the Hub,
with the `geta` section of configs/smollm2-wikitext-w4a8-s20.yaml, in float32 or, with `--bf16 true`, autocast to
bfloat16. Plain and compressed runs take turns in one process, and every ratio is the median over the rounds of (median
step of a stage / median plain step of the same round), so that a busy machine slows both sides. Peak memory is that of
fresh processes, above what the imports take. Images are random numbers and texts random tokens: time does not depend
on what they show (calibration finds other wide inputs than on real texts, which cost what the others do).
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
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, GETATrainer, build_qadg

SKIPPED_STEPS = 2  # of every stage: caches fill, kernels compile
PLAIN = "plain"
VARIANTS = {
    "weights": GETAConfig(weight_bits=[4, 8]),
    "weights+activations": GETAConfig(weight_bits=[4, 8], activation_bits=[4, 8]),
    "budget": GETAConfig(weight_bits=[2, 8], activation_bits=[2, 8], target_bops=0.01),
}
DECODER = "smollm2-wikitext-w4a8-s20"  # the config that language models are compressed by
IMAGES, TEXTS = 64, 4  # in a batch


@dataclasses.dataclass
class BenchmarkArguments:
    """What is measured, and how much."""

    model: str | None = dataclasses.field(
        default=None, metadata={"help": "A causal language model instead of the ViT: a folder or a name on the Hub."}
    )
    rounds: int = dataclasses.field(default=3, metadata={"help": "Times that every variant runs."})
    steps_per_stage: int = dataclasses.field(default=12, metadata={"help": "Optimizer steps of each stage."})
    batch_size: int = dataclasses.field(
        default=0, metadata={"help": f"Images (by default {IMAGES}) or texts (by default {TEXTS}) in a batch."}
    )
    length: int = dataclasses.field(default=256, metadata={"help": "Tokens of a text."})
    bf16: bool = dataclasses.field(default=False, metadata={"help": "Compute in bfloat16, by autocast."})
    width: int = dataclasses.field(default=192, metadata={"help": "Hidden size of the ViT."})
    depth: int = dataclasses.field(default=6, metadata={"help": "Layers of the ViT."})
    output: str = dataclasses.field(default="outputs/training.json", metadata={"help": "Where the figures go."})

    def __post_init__(self) -> None:
        self.batch_size = self.batch_size or (TEXTS if self.model else IMAGES)

    def variants(self) -> dict[str, GETAConfig]:
        """The configs that are compared with plain training."""
        if self.model is None:
            return VARIANTS
        return {DECODER: GETAConfig.from_file(Path(__file__).parent.parent / "configs" / f"{DECODER}.yaml")}


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


def make_model(arguments: BenchmarkArguments) -> PreTrainedModel:
    torch.manual_seed(0)
    if arguments.model is not None:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
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


def make_dataset(arguments: BenchmarkArguments, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Four batches of what the model reads."""
    generator, size = torch.Generator().manual_seed(0), 4 * arguments.batch_size
    if arguments.model is None:
        images = torch.randn(size, 3, 32, 32, generator=generator)
        return [{"pixel_values": image, "labels": i % 10} for i, image in enumerate(images)]
    texts = torch.randint(model.config.vocab_size, (size, arguments.length), generator=generator)
    return [{"input_ids": text, "labels": text} for text in texts]


def run(arguments: BenchmarkArguments, variant: str) -> StepTimer:
    """Train once; `variant` is "plain" or a key of `arguments.variants()`."""
    model = make_model(arguments)
    steps = arguments.steps_per_stage
    stages: dict[str, Any] = {"warmup_steps": steps, "projection_steps": steps, "joint_steps": steps}
    # Two periods in a stage: the first step of each looks for new clips, which takes long and is rare in a real run.
    periods: dict[str, Any] = {"bit_reduction": 6, "pruning_periods": 2}
    geta_config = None
    if variant != PLAIN:
        geta_config = dataclasses.replace(arguments.variants()[variant], **stages, **periods)
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GETATrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=2 * steps if variant == PLAIN else 4 * steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=1e-3,
                bf16=arguments.bf16,
                use_cpu=not torch.cuda.is_available(),  # for bf16 it has to be said
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            geta_config=geta_config,
            train_dataset=make_dataset(arguments, model),
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
    batch = make_dataset(arguments, model)[: arguments.batch_size]
    inputs = {model.main_input_name: torch.stack([example[model.main_input_name] for example in batch])}
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
    variants = list(arguments.variants())
    names = [PLAIN, *variants]
    first = dataclasses.replace(arguments, steps_per_stage=min(8, arguments.steps_per_stage))
    run(first, PLAIN)  # the process's first run is the slow one
    rounds = [{name: run(arguments, name) for name in names} for _ in range(arguments.rounds)]
    memory = {name: peak_bytes(arguments, name) for name in names}
    plain = statistics.median(_median(timers[PLAIN].steps[PLAIN]) for timers in rounds)
    plain_optimizer = statistics.median(_median(timers[PLAIN].optimizer_steps[PLAIN]) for timers in rounds)
    return {
        "settings": dataclasses.asdict(arguments)
        | {"threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.cuda.is_available()},
        "plain_step_ms": 1000 * plain,
        "plain_optimizer_step_ms": 1000 * plain_optimizer,
        "step_ratio": {name: step_ratios(rounds, name, "steps") for name in variants},
        "optimizer_step_ratio": {name: step_ratios(rounds, name, "optimizer_steps") for name in variants},
        "peak_memory_ratio": {name: memory[name] / memory[PLAIN] for name in variants},
        "plain_peak_bytes": memory[PLAIN],
        "qadg_seconds": qadg_seconds(arguments),
    }


def table(figures: dict[str, Any]) -> str:
    """Ratios to plain training as a Markdown table, one row for each stage."""
    variants = list(figures["step_ratio"])
    rows = [("over plain Trainer", variants), ("---", ["---:"] * len(variants))]
    for key, label in (("step_ratio", "step"), ("optimizer_step_ratio", "optimizer step")):
        for stage in figures[key][variants[0]]:
            rows.append((f"{label}, {stage}", [f"{figures[key][variant][stage]:.2f}x" for variant in variants]))
    rows.append(("peak memory", [f"{figures['peak_memory_ratio'][variant]:.2f}x" for variant in variants]))
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
