"""Codes in the blocks of ggml, the tensors of llama.cpp: 32 numbers of a row and their d as float16.

    Q4_0   d, 16 bytes   number = d * (q - 8)    q of 4 bits: codes to 4 bits
    Q5_0   d, 20 bytes   number = d * (q - 16)   q of 5 bits: codes of 5 bits
    Q8_0   d, 32 bytes   number = d * q          q an int8:   codes of 6 to 8 bits

In a byte of Q4_0 and Q5_0 the low half is of the first 16 numbers, the high half of the other 16; Q5_0 has the fifth
bits of all 32 in front. Source: ggml's block_q4_0, block_q5_0 and block_q8_0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
WIDTHS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
HALF_ROUNDING = 2.0**-11  # of float16, relative


def block_type(codes: NDArray[np.int32], step_sizes: NDArray[np.float32], bits: int) -> str | None:
    """The narrowest type that holds codes of this width; None where blocks do not fill rows, or float16 not hold d.

    Args:
        codes: (rows, columns).
        step_sizes: (rows,), or one per block, (rows, columns / 32).
    """
    halves = step_sizes.astype(np.float16).astype(np.float32)
    fits = bool(np.all(np.abs(halves - step_sizes) <= HALF_ROUNDING * step_sizes))
    if codes.shape[1] % BLOCK or not fits:
        return None
    return next((name for name, width in WIDTHS.items() if bits <= width), None)


def to_blocks(codes: NDArray[np.int32], step_sizes: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """The bytes of the rows, uint8 (rows, bytes of a row), for what `block_type` found; arguments as there."""
    rows, columns = codes.shape
    by_block = np.broadcast_to(step_sizes.reshape(rows, -1), (rows, columns // BLOCK))
    scales = np.ascontiguousarray(by_block, dtype="<f2").reshape(-1, 1).view(np.uint8)  # (blocks, 2)
    blocks = codes.reshape(-1, BLOCK)
    if kind == "Q8_0":
        parts = [scales, blocks.astype(np.int8).view(np.uint8)]
    else:
        unsigned = (blocks + (1 << WIDTHS[kind] - 1)).astype(np.uint8)
        low = unsigned & 0xF
        fifth = [np.packbits(unsigned >> 4, axis=1, bitorder="little")] if kind == "Q5_0" else []
        pairs = low[:, : BLOCK // 2] | low[:, BLOCK // 2 :] << 4
        parts = [scales, *fifth, pairs.astype(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(rows, -1)
