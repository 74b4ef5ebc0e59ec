"""The law of a search space: a masked model equals the pruned one, and that one as saved and loaded."""

from __future__ import annotations

import copy
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from hf_geta import build_qadg
from hf_geta.graph.qadg import QADG

SHARE, TOLERANCE, EXACT, MOVED = 0.4, 1e-4, 1e-7, 1e-3
CONSTANT = 1e30  # numbers beyond it, infinite ones too, are masks that a forward wrote


@dataclass
class Record:
    """What came of one model. `reason` is empty where the law holds; `stage` says how far the model came."""

    model_class: str
    model_type: str
    task: str
    stage: str = "build"
    reason: str = ""
    parameters: int = 0
    inputs: list[str] = field(default_factory=list)
    build_seconds: float = 0.0
    seconds: float = 0.0
    axes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    share: float = 0.0
    frozen: dict[str, int] = field(default_factory=dict)
    moved: float = 0.0
    pruned_error: float = 0.0
    loaded_error: float = 0.0

    @property
    def built(self) -> bool:
        return self.stage not in ("build", "inputs", "unsaveable")

    @property
    def captured(self) -> bool:
        return self.built and self.stage != "capture"

    @property
    def counts(self) -> bool:
        """Whether something could be removed, and removing it moved the output; else the law says nothing."""
        return self.captured and self.stage not in ("no axes", "unmoved")

    @property
    def lawful(self) -> bool:
        return self.stage == "done"


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> None:
    """Weights that nothing cancels: every layer counts, every output is finite."""
    torch.manual_seed(seed)
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    convolutions = {id(one.weight) for one in model.modules() if isinstance(one, _ConvNd)}
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() and parameter.requires_grad):  # fixed sinusoids are never saved
            continue
        noise, word = torch.randn_like(parameter), name.rsplit(".", 1)[-1].lower()
        if "a_log" in word or word.startswith("dt_"):
            parameter.add_(0.1 * noise)
        elif id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif sum(size > 1 for size in parameter.shape) > 1:
            fan_in = math.prod(parameter.shape[1:]) if id(parameter) in convolutions else parameter.shape[-1]
            parameter.copy_(noise * min(0.5, 1.2 * max(1, fan_in) ** -0.5))
        elif "bias" in word:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(1 + 0.15 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))


def float_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All float tensors of an output, by their names; caches are not looked into."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from float_tensors(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for key, value in enumerate(output):
            yield from float_tensors(value, f"{name}.{key}")


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # some forwards draw numbers, such as the masks of masked autoencoders
    return dict(float_tensors(model(**copy.deepcopy(dict(inputs)))))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two outputs, each tensor on its own scale; infinite where they do not compare."""
    if one.keys() != other.keys():
        return float("inf")
    worst = 0.0
    for name, left in one.items():
        right = other[name]
        if left.shape != right.shape or not torch.equal(left.abs() < CONSTANT, right.abs() < CONSTANT):
            return float("inf")
        finite = left.abs() < CONSTANT
        if finite.any():
            left, right = left[finite].double(), right[finite].double()
            worst = max(worst, float((left - right).abs().max() / left.abs().max().clamp_min(1e-3)))
    return worst


def exact_distance(one: nn.Module, other: nn.Module, inputs: Mapping[str, Any]) -> float:
    """The distance of two models in double precision: of unstable functions only more digits tell what is wrong."""
    precise = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    try:
        return distance(*(outputs(copy.deepcopy(model).double(), precise) for model in (one, other)))
    except RuntimeError:  # a forward that insists on single precision
        return float("inf")


def some_groups(qadg: QADG, seed: int) -> dict[str, list[int]]:
    """Random groups of every axis, 40 % of each and at least one."""
    draw = random.Random(seed)
    return {
        axis.name: sorted(draw.sample(range(axis.size), max(1, int(SHARE * axis.size))))
        for axis in qadg.axes
        if axis.size > 1
    }


def check_law(model: PreTrainedModel, inputs: Mapping[str, Any], record: Record, seed: int = 0) -> Record:
    """Build the QADG of `model` and hold it to the law; the record says what came of it."""
    randomize_(model, seed)
    record.parameters = sum(parameter.numel() for parameter in model.parameters())
    record.stage = "inputs"
    dense = outputs(model, inputs)
    if any(tensor.isnan().any() for tensor in dense.values()) or not dense:
        raise ValueError("the dense model's outputs are not finite")
    if distance(dense, outputs(model, inputs)) > 1e-6:
        raise ValueError("the dense model does not repeat its own outputs")
    record.stage = "capture"
    start = time.perf_counter()
    qadg = build_qadg(model, inputs)
    record.build_seconds = time.perf_counter() - start
    describe(record, qadg, model)
    record.stage = "no axes"
    removed = some_groups(qadg, seed)
    if not removed:
        raise ValueError("no prunable axis: " + qadg.explain_frozen())
    record.stage = "mask"
    masked_model = copy.deepcopy(model)
    qadg.zero_(masked_model, removed)
    masked = outputs(masked_model, inputs)
    record.stage = "prune"
    small: Any = qadg.prune(model, removed)
    record.stage = "run pruned"
    pruned = outputs(small, inputs)
    record.pruned_error = distance(masked, pruned)
    if not record.pruned_error <= TOLERANCE and exact_distance(masked_model, small, inputs) > EXACT:
        record.stage = "wrong"
        raise ValueError(f"pruned and masked differ by {record.pruned_error:.1e}")
    record.stage = "run otherwise"
    check_other_uses(masked_model, small, inputs)
    record.moved = distance(dense, masked)
    try:
        check_loading(small, inputs, pruned, record)
    except Exception:
        if not survives_saving(model, inputs, dense):  # then it is not pruning that fails
            record.stage = "unsaveable"
        raise
    if not record.moved > MOVED:
        record.stage = "unmoved"
        raise ValueError(f"removing moved the outputs by {record.moved:.1e} only")
    record.stage = "done"
    return record


def check_other_uses(masked_model: PreTrainedModel, small: Any, inputs: Mapping[str, Any]) -> None:
    """Padded batches and eager attention, which no trace has seen: equal wherever the masked model runs so."""
    mask, padded = inputs.get("attention_mask"), dict(inputs)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > 1:
        padded["attention_mask"] = mask.clone()
        padded["attention_mask"][0, -max(1, mask.shape[1] // 3) :] = 0
    for implementation in ("sdpa", "eager"):
        try:
            masked = copy.deepcopy(masked_model)
            masked.set_attn_implementation(implementation)
            expected = outputs(masked, padded)
        except Exception:  # it has no such attention, or takes no padding
            continue
        pruned = copy.deepcopy(small)
        pruned.set_attn_implementation(implementation)
        if (
            not distance(expected, outputs(pruned, padded)) <= TOLERANCE
            and exact_distance(masked, pruned, padded) > EXACT
        ):
            raise ValueError(f"pruned and masked differ on a padded batch, with {implementation} attention")


def check_loading(small: Any, inputs: Mapping[str, Any], pruned: Mapping[str, Tensor], record: Record) -> None:
    """Save the pruned model, load it, and compare."""
    record.stage = "save"
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        record.stage = "load"
        loaded = type(small).from_pretrained(folder).eval()
    record.stage = "run loaded"
    record.loaded_error = distance(pruned, outputs(loaded, inputs))
    if not record.loaded_error <= TOLERANCE and exact_distance(small, loaded, inputs) > EXACT:
        record.stage = "loaded wrong"
        raise ValueError(f"pruned and loaded differ by {record.loaded_error:.1e}")


def survives_saving(model: PreTrainedModel, inputs: Mapping[str, Any], dense: Mapping[str, Tensor]) -> bool:
    """Whether the uncompressed model is the same after saving and loading, as transformers does it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded: Any = type(model).from_pretrained(folder).eval()
            return distance(dense, outputs(loaded, inputs)) <= TOLERANCE
        except Exception:
            return False


def describe(record: Record, qadg: QADG, model: nn.Module) -> None:
    record.axes = dict(Counter(axis.kind for axis in qadg.axes))
    for axis in qadg.axes:
        record.sizes.setdefault(axis.kind, []).append(axis.size)
    covered = 0
    tensors = dict(model.named_parameters())
    owned: dict[str, dict[int, Tensor]] = {}
    for axis in qadg.axes:
        for member in axis.members:
            if member.tensor in tensors:
                shape = tensors[member.tensor].shape
                mask = owned.setdefault(member.tensor, {}).setdefault(
                    member.dim, torch.zeros(shape[member.dim], dtype=torch.bool)
                )
                mask[member.indices.flatten()] = True
    for name, dims in owned.items():
        free = 1
        for mask in dims.values():
            free *= int((~mask).sum())
        for dim, size in enumerate(tensors[name].shape):
            free *= 1 if dim in dims else size
        covered += tensors[name].numel() - free
    record.share = covered / max(1, record.parameters)
    for frozen in qadg.frozen:
        why = f"{frozen.reason}{' by ' + frozen.operator if frozen.operator else ''}"
        record.frozen[why] = record.frozen.get(why, 0) + len(frozen.dimensions)
