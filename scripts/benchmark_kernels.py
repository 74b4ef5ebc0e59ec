#!/usr/bin/env python
"""Which of torch's kernels multiplies a layer of 4-bit weights fastest, and how exactly?

    OMP_NUM_THREADS=1 python scripts/benchmark.py kernels [--outputs 2048] [--inputs 768] [--rows 1 4 32] [--rounds 5]

Inputs are integers of 8 bits; weights are integers of 4 bits times one of 1 to 16 for each block of 32, as in a layer
with blocks, or by themselves. The table has the time of each kernel over that of a float32 product, the median over
rounds in which the kernels take turns, and the largest error of its outputs over the largest output.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from benchmark_inference import seconds
from torch import Tensor

from hf_geta.checkpoint.integer import packed_product
from hf_geta.checkpoint.packing import pack_codes, unpack_narrow

BLOCK = 32  # inputs that share a scale
FLOAT, HALF, INT8 = "float32", "bfloat16", "int8 x int8"
UNPACKED, PACKED = "4 bits, unpacked, int8 x int8", "4 bits, packed, int8 x int8"
BLOCKS = "4 bits, packed, blocks, int8 x int8"
INT4, INT4_FLOAT, WEIGHT_INT8 = "int4, bfloat16", "int4, float32", "int8 weight, bfloat16"


def kernels(codes: Tensor, weight: Tensor, multipliers: Tensor) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Kernel -> (what it makes of the numbers, the exact product of what it takes).

    Args:
        codes: (rows, inputs) int8.
        weight: (outputs, inputs) int8, from -7 to 7.
        multipliers: (outputs, blocks) int8, from 1 to 16, times which the weights of a block are taken.
    """
    ops = torch.ops.aten
    whole = weight * multipliers.repeat_interleave(BLOCK, 1)
    int4 = ops._convert_weight_to_int4pack_for_cpu(weight.int() + 8, 1)
    scales = torch.stack([multipliers.t().float(), torch.zeros(multipliers.t().shape)], -1).contiguous()
    half, ones = codes.bfloat16(), torch.ones(len(weight), dtype=torch.bfloat16)
    exact, without_blocks = (codes.double() @ factor.double().t() for factor in (whole, weight))
    packed = pack_codes(weight, 4).view(len(weight), -1)
    unpacked = functools.partial(unpack_narrow, packed.flatten(), 4, weight.numel())
    calls: dict[str, Callable[[], Tensor]] = {
        FLOAT: functools.partial(torch.mm, codes.float(), whole.float().t()),
        HALF: functools.partial(torch.mm, half, whole.bfloat16().t()),
        INT8: functools.partial(torch._int_mm, codes, whole.t()),
        UNPACKED: lambda: torch._int_mm(codes, unpacked().view(weight.shape).t()),
        PACKED: lambda: packed_product(codes, packed, 4, None, 1.0, None),
        BLOCKS: lambda: packed_product(codes, packed, 4, multipliers, 1.0, None),
        INT4: functools.partial(ops._weight_int4pack_mm_for_cpu, half, int4, BLOCK, scales.bfloat16()),
        INT4_FLOAT: functools.partial(ops._weight_int4pack_mm_for_cpu, codes.float(), int4, BLOCK, scales),
        WEIGHT_INT8: functools.partial(ops._weight_int8pack_mm, half, whole, ones),
    }
    return {name: (call, without_blocks if name in (UNPACKED, PACKED) else exact) for name, call in calls.items()}


@torch.inference_mode()
def measure(outputs: int, inputs: int, rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Kernel -> (time over that of float32, largest error over the largest output)."""
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    weight = torch.randint(-7, 8, (outputs, inputs), dtype=torch.int8)
    multipliers = torch.randint(1, 17, (outputs, inputs // BLOCK), dtype=torch.int8)
    calls = kernels(codes, weight, multipliers)
    turns = [{name: seconds(call, 0.01) for name, (call, _) in calls.items()} for _ in range(rounds)]
    figures = {}
    for name, (call, exact) in calls.items():
        error = (call().double() - exact).abs().max() / exact.abs().max()
        figures[name] = statistics.median(turn[name] / turn[FLOAT] for turn in turns), error.item()
    return figures


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, tuple[float, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=768, help="a multiple of 32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    figures = {rows: measure(arguments.outputs, arguments.inputs, rows, arguments.rounds) for rows in arguments.rows}
    print("| rows | " + " | ".join(map(str, figures)) + " | largest error |\n|---|" + "---:|" * (len(figures) + 1))
    for name in next(iter(figures.values())):
        times = " | ".join(f"{by_kernel[name][0]:.2f}" for by_kernel in figures.values())
        print(f"| {name} | {times} | {max(by_kernel[name][1] for by_kernel in figures.values()):.1e} |")
    return figures


if __name__ == "__main__":
    main()
