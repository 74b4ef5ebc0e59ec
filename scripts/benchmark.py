#!/usr/bin/env python
"""What compression costs while a model trains and gains while it runs: all timings, mostly as ratios within one run.

    python scripts/benchmark.py training      a training step over one of plain Trainer, by stage, of a ViT or a decoder
    python scripts/benchmark.py inference     latency, memory and load time of packed models over the dense one
    python scripts/benchmark.py kernels       torch's kernels for layers of 4-bit weights
    python scripts/benchmark.py alignment     sizes that are multiples of 8, 16 or 32, and others
    python scripts/benchmark.py graph         the search for what can be pruned, up to 70 B parameters

Each is a file of its own, benchmark_TOPIC.py, which says what it measures; flags after the topic are its own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

TOPICS = ("training", "inference", "kernels", "alignment", "graph")


def main(argv: Sequence[str] | None = None) -> Any:
    """Measure the topic that comes first; what its `main` returns."""
    topic, *flags = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if topic in ("-h", "--help"):
        print(__doc__)
        return None
    if topic not in TOPICS:
        raise SystemExit(f"benchmark.py: there is no topic {topic}; write one of {', '.join(TOPICS)}.")
    return importlib.import_module(f"benchmark_{topic}").main(flags)


if __name__ == "__main__":
    main()
