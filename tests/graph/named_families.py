"""Tiny models of the families that people use, and the axes that a reader of their code would expect.

A case is the smallest model that still has all the parts of its family. The sizes expected are in the order of the
model's parameters. Not expected is what has to stay, for the same reasons everywhere:

- what a layer or RMS norm runs over, and what is added to it: the width of most transformers;
- what two activations are summed over: the size of a head, the width of masks and their queries;
- what the model returns, and what only an activation sums over.
"""

from __future__ import annotations

from tests.graph.named_case import Case
from tests.graph.named_language import LANGUAGE_CASES
from tests.graph.named_signals import IMAGE_CASES, SOUND_CASES

CASES: dict[str, Case] = {**LANGUAGE_CASES, **SOUND_CASES, **IMAGE_CASES}
