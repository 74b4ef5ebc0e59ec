#!/usr/bin/env python
"""What compression gains when a model runs: latency, memory, load time and bytes, as ratios to the dense float32 model.

    OMP_NUM_THREADS=1 python scripts/benchmark.py inference [--models vit llama] [--rounds 5] [--batch_size 32]
        [--output outputs/inference.json]

Every model is there dense, in half precision, pruned (half of its groups), and pruned with packed weights of 4 and 8
bits in turn and inputs of 8 bits (the output layer as well), by each backend; and, where torchao is installed (`pip
install --no-deps torchao`, which has to fit the torch that is there), dense with its int8 weights and inputs and its
int4 weights, all without `torch.compile`. Weights and inputs are random numbers: time does not depend on what they say.

In each round all variants take turns, and a ratio is the median over the rounds, so that a busy machine slows all
sides. Memory and load time are those of fresh processes: resident bytes that the loaded model adds once it has
answered one request of batch 1 (activations and the kernels' scratch included), over the bytes of its file; and the
most that it held on the way.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_training import resident_peak_bytes, write_figures
from inference_models import MODELS, VARIANTS, Variant, available, load, save_all, small_model, workloads

Figures = dict[str, Any]


def seconds(call: Callable[[], object], enough: float = 0.2) -> float:
    """The median of as many calls as fit into `enough` seconds, 50 at most; the first fills caches and counts only
    where it takes that long by itself."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < enough and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if times[0] > enough:
            return times[0]
    return statistics.median(times[1:])


@torch.inference_mode()
def latencies(name: str, folder: Path, variants: Sequence[Variant], rounds: int, batch: int) -> Figures:
    """Workload -> variant -> seconds, one for each round; the variants take turns."""
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for variant in variants:
        for workload, call in workloads(name, load(folder, variant), batch).items():
            calls.setdefault(workload, {})[variant.name] = call
            call()  # reads the prompt whose next token is timed
    measured: Figures = {work: {variant.name: [] for variant in variants} for work in calls}
    for _ in range(rounds):
        for workload, by_variant in calls.items():
            for variant_name, call in by_variant.items():
                measured[workload][variant_name].append(seconds(call))
    return measured


def memory(name: str, folder: Path, small: Path, variant: Variant) -> Figures:
    """Load time, bytes of the file and resident bytes, in a process of its own; `small` goes first, for its imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory_here, (name, folder, small, variant))


@torch.inference_mode()
def _memory_here(name: str, folder: Path, small: Path, variant: Variant) -> Figures:
    next(iter(workloads(name, load(small, variant), 1).values()))()
    before, start = resident_bytes(), time.perf_counter()
    model = load(folder, variant)
    load_seconds = time.perf_counter() - start
    next(iter(workloads(name, model, 1).values()))()
    file_bytes = sum(file.stat().st_size for file in (folder / variant.saved).glob("*.safetensors"))
    return {
        "load_seconds": load_seconds,
        "file_bytes": file_bytes,
        "resident_bytes": resident_bytes() - before,
        "peak_bytes": resident_peak_bytes() - before,
    }


def resident_bytes() -> int:
    """What this process holds now, without what it freed (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def benchmark(arguments: argparse.Namespace) -> Figures:
    """All figures as plain values, model by model."""
    variants = [variant for variant in VARIANTS if available(variant)]
    settings = {"threads": torch.get_num_threads(), "torch": torch.__version__, "vnni": torch.cpu._is_vnni_supported()}
    figures: Figures = {"settings": vars(arguments) | settings, "models": {}}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as place:
            folder, small = Path(place, "model"), Path(place, "small")
            save_all(MODELS[name](), folder)
            save_all(small_model(name), small)
            figures["models"][name] = {
                "latency_seconds": latencies(name, folder, variants, arguments.rounds, arguments.batch_size),
                "memory": {variant.name: memory(name, folder, small, variant) for variant in variants},
            }
    return figures


def table(figures: Figures) -> str:
    """One Markdown table for each model, a row for each variant, everything over the dense float32 model."""
    return "\n\n".join(_model_table(name, measured) for name, measured in figures["models"].items())


def _model_table(name: str, measured: Figures) -> str:
    workloads_, memories = measured["latency_seconds"], measured["memory"]
    columns = [*workloads_, "load time", "file", "peak", "resident", "resident / file"]
    lines = [f"| {name} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    dense = VARIANTS[0].name
    for variant, taken in memories.items():
        cells = [f"{_ratio(by_variant[variant], by_variant[dense]):.2f}x" for by_variant in workloads_.values()]
        for key in ("load_seconds", "file_bytes", "peak_bytes", "resident_bytes"):
            # a model of a few kB may fit into pages that the process has already
            cells.append(f"{taken[key] / memories[dense][key]:.2f}x" if memories[dense][key] > 0 else "-")
        cells.append(f"{taken['resident_bytes'] / taken['file_bytes']:.2f}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    times = ", ".join(f"{work} {1000 * min(by_variant[dense]):.1f} ms" for work, by_variant in workloads_.items())
    size = memories[dense]
    lines += ["", f"{dense}: {times}; file {size['file_bytes'] / 1e6:.1f} MB, loaded in {size['load_seconds']:.2f} s"]
    return "\n".join(lines)


def _ratio(times: Sequence[float], dense: Sequence[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(times, dense, strict=True))


def main(argv: Sequence[str] | None = None) -> Figures:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="times that every variant is measured")
    parser.add_argument("--batch_size", type=int, default=32, help="the batch beside that of 1")
    parser.add_argument("--output", default="outputs/inference.json", help="where the figures go")
    arguments = parser.parse_args(argv)
    figures = benchmark(arguments)
    write_figures(figures, arguments.output)
    print(table(figures))
    return figures


if __name__ == "__main__":
    main()
