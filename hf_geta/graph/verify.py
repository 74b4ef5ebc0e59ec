"""The law of the search space as a user's own check: pruned computes what masked does, on their model and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_geta.graph.build import build_qadg
from hf_geta.graph.capture import check_inputs
from hf_geta.graph.qadg import QADG
from hf_geta.graph.tracing import named_tensors
from hf_geta.graph.trial import Law, distance, failing


@dataclass(frozen=True)
class Verification:
    """What came of removing groups of all axes at once.

    Attributes:
        removed: how many groups of how many were removed.
        moved: the largest change of an output by masking, as a share of that output's largest entry.
        error: the largest difference of the pruned model's outputs from the masked model's, likewise.
        failures: axis name -> what goes wrong when it shrinks; empty if the law holds.
    """

    removed: tuple[int, int]
    moved: float
    error: float
    failures: Mapping[str, str]

    @property
    def holds(self) -> bool:
        """Whether the pruned model computes what the masked model does, and something else than the dense one."""
        return not self.failures and self.moved > 0

    def __str__(self) -> str:
        groups = f"{self.removed[0]} of {self.removed[1]} groups removed"
        if self.failures:
            return f"{groups}: the law fails for " + "; ".join(f"{name}: {why}" for name, why in self.failures.items())
        words = f"{groups}: masking moves the outputs by {self.moved:.1e}, pruning differs from it by {self.error:.1e}"
        return words if self.moved else f"{words}; no group has an effect, so nothing is shown"


@torch.no_grad()
def verify_qadg(
    model: nn.Module, inputs: Mapping[str, Any], qadg: QADG | None = None, share: float = 0.4, seed: int = 0
) -> Verification:
    """Remove random groups of every axis from copies of the model, by masking and by pruning, and compare the outputs.

    Runs in eval mode and float32; the model is left untouched.

    Args:
        model: with weights (not on the meta device), or quantized.
        inputs: one batch, as `model(**inputs)` takes it; another than the one the QADG was built with shows more.
        qadg: of this model, from `build_qadg`; if not given, the one that these inputs give.
        share: of the groups of each axis to remove; at least one goes and one stays.
        seed: of the choice of groups.

    Raises:
        ValueError: for a model on the meta device, which computes nothing, for one that does not repeat itself, and
            for inputs that the forward has no names for.
    """
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        raise ValueError(f"{type(model).__name__} is on the meta device: load it with its weights to verify them.")
    check_inputs(model, inputs)
    qadg = build_qadg(model, inputs) if qadg is None else qadg
    law = Law(model, inputs, qadg, share, seed)
    names = [axis.name for axis in qadg.axes]
    masked, pruned = law.masked(names), law.outputs_or_error(names)
    moved, error = distance(law.dense, masked), float("inf")
    if not isinstance(pruned, str):
        error = distance(masked, pruned)
    failures = failing(names, law)
    removed = sum(map(len, law.removed.values()))
    return Verification((removed, sum(axis.size for axis in qadg.axes)), moved, error, failures)
