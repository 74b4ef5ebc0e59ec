"""The search space that somebody would write by hand: every layer's rows by themselves, consumers ignored.

For ablation tables only (GETA, Sec. 6, without QADG). Its groups can be set to zero, but not cut out: what reads a row
still expects it, and what is added to it (a shift of a norm) still comes through.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_geta.graph.qadg import QADG, Axis, Member
from hf_geta.graph.tracing import OUTPUT

LAYERS = (nn.Linear, nn.Conv2d, Conv1D)


def layerwise(qadg: QADG, model: nn.Module) -> QADG:
    """`qadg` with an axis of rows for every linear layer and convolution, but those that make the model's outputs.

    Args:
        qadg: the dependency graph of `model`; its operations are kept, whole where they hold no weight.
    """
    outputs = {dimension for frozen in qadg.frozen if frozen.reason == OUTPUT for dimension in frozen.dimensions}
    axes = []
    for name in dict.fromkeys(operation.weight for operation in qadg.operations if operation.weight):
        layer = model.get_submodule(name.rpartition(".")[0])
        dim = 1 if isinstance(layer, Conv1D) else 0
        if not isinstance(layer, LAYERS) or f"{name}[{dim}]" in outputs:
            continue
        rows = torch.arange(layer.weight.shape[dim]).view(-1, 1)
        members = [Member(name, dim, rows)]
        if layer.bias is not None:
            members.append(Member(name.removesuffix("weight") + "bias", 0, rows))
        axes.append(Axis(name.removesuffix(".weight") + ".rows", "row", len(rows), tuple(members)))
    operations = tuple(dataclasses.replace(operation, axes=()) for operation in qadg.operations)
    return dataclasses.replace(qadg, axes=tuple(axes), operations=operations, equations=(), can_be_cut=False)
