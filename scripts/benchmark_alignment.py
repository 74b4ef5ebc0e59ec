#!/usr/bin/env python
"""What a kept size costs that hardware does not like: is `group_divisible` worth it when the model runs?

    OMP_NUM_THREADS=1 python scripts/benchmark.py alignment [--rows 197] [--rounds 20] [--sizes 752 760 764 767 768]

An MLP of width 384 keeps so many hidden units, in float32, in bfloat16 and packed (4 bits, inputs of 8). The table has
the time of each size over that of the last one, by the units: 1.00 is no loss, 1.10 says that a unit costs 10 % more.
The sizes take turns, and every figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from benchmark_inference import seconds
from torch import nn

from hf_geta import GETAConfig, set_backend_
from hf_geta.checkpoint.pack import pack_layer
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_

WIDTH = 384
KINDS = ("float32", "bfloat16", "packed, auto")


def mlps(hidden: int) -> dict[str, nn.Module]:
    """The same two layers in three ways."""
    dense = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH))
    quantized = copy.deepcopy(dense)
    quantize_modules_(quantized, GETAConfig(weight_bits=[4, 4], activation_bits=[8, 8]))
    for layer in quantized_layers(quantized).values():
        layer.weight_quantizer.set_bits_(4)
        assert layer.input_quantizer is not None
        layer.input_quantizer.set_range_(3.0, 8)
    packed = nn.Sequential(*map(pack_layer, quantized_layers(quantized).values()))
    set_backend_(packed, "auto")
    return dict(zip(KINDS, (dense, copy.deepcopy(dense).to(torch.bfloat16), packed), strict=True))


@torch.inference_mode()
def measure(sizes: Sequence[int], rows: int, rounds: int) -> dict[str, dict[int, float]]:
    """Kind -> size -> time of a unit over that at the last size."""
    calls: dict[str, dict[int, Callable[[], object]]] = {kind: {} for kind in KINDS}
    for size in sizes:
        for kind, mlp in mlps(size).items():
            x = torch.randn(rows, WIDTH, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
            calls[kind][size] = functools.partial(mlp, x)
    figures = {}
    for kind, by_size in calls.items():
        turns = [{size: seconds(call, 0.01) / size for size, call in by_size.items()} for _ in range(rounds)]
        figures[kind] = {size: statistics.median(turn[size] / turn[sizes[-1]] for turn in turns) for size in sizes}
    return figures


def main(argv: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=197)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[752, 760, 764, 767, 768])
    arguments = parser.parse_args(argv)
    figures = measure(arguments.sizes, arguments.rows, arguments.rounds)
    print("| hidden units | " + " | ".join(map(str, arguments.sizes)) + " |\n|---|" + "---:|" * len(arguments.sizes))
    for kind, by_size in figures.items():
        print(f"| {kind} | " + " | ".join(f"{ratio:.2f}" for ratio in by_size.values()) + " |")
    return figures


if __name__ == "__main__":
    main()
