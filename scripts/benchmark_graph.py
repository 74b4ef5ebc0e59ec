#!/usr/bin/env python
"""Seconds and memory that `build_qadg` takes on models of the sizes that people use, each in a process of its own.

    OMP_NUM_THREADS=1 python scripts/benchmark.py graph [--models vit-base llama-70b] [--output outputs/graph.json]

Models are built from their configs: those of 100 M parameters with random weights, the Llamas on the meta device. The
process's first call pays for torch's tracing machinery, so a tiny model goes first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_training import resident_peak_bytes
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import build_qadg

Made = tuple[nn.Module, dict[str, torch.Tensor]]
LLAMAS = {
    "llama-8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "llama-70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}


def make_vit() -> Made:
    return ViTForImageClassification(ViTConfig()), {"pixel_values": torch.randn(1, 3, 224, 224)}


def make_bert() -> Made:
    return BertForSequenceClassification(BertConfig()), {"input_ids": torch.ones(2, 16, dtype=torch.long)}


def make_llama(**values: int) -> Made:
    config = LlamaConfig(**values, num_key_value_heads=8, vocab_size=128256)  # type: ignore[arg-type]
    with torch.device("meta"):
        return LlamaForCausalLM(config), {"input_ids": torch.ones(2, 16, dtype=torch.long)}


MODELS: dict[str, Callable[[], Made]] = {
    "vit-base": make_vit,
    "bert-base": make_bert,
    **{name: lambda name=name: make_llama(**LLAMAS[name]) for name in LLAMAS},  # type: ignore[misc]
}


def measure(name: str) -> dict[str, Any]:
    """One model: seconds, axes, parameters, and the bytes that the process held at most above those before."""
    tiny = make_llama(hidden_size=16, num_hidden_layers=1, num_attention_heads=8, intermediate_size=8)
    build_qadg(*tiny)
    model, inputs = MODELS[name]()
    before, start = resident_peak_bytes(), time.perf_counter()
    qadg = build_qadg(model, inputs)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "axes": len(qadg.axes),
        "seconds": time.perf_counter() - start,
        "bytes": resident_peak_bytes() - before,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which; all by default")
    parser.add_argument("--output", type=Path, default=Path("outputs/graph.json"), help="where the figures go")
    arguments = parser.parse_args(argv)
    figures = []
    print("| model | parameters | axes | seconds | memory |\n| --- | ---: | ---: | ---: | ---: |")
    for name in arguments.models:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            one = pool.apply(measure, (name,))
        figures.append(one)
        size, memory = f"{one['parameters'] / 1e9:.2f} B", f"{one['bytes'] / 1e9:.2f} GB"
        print(f"| {name} | {size} | {one['axes']} | {one['seconds']:.1f} | {memory} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
