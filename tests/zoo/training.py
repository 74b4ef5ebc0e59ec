"""The law of a training: the small model computes what the trained one did, and so does its file."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model, set_backend_
from hf_geta.graph.tracing import float_tensors
from hf_geta.graph.trial import distance, run
from tests.zoo.law import Record, randomize_, survives_saving

STEPS = 40
TRAINED = 1e-2  # of the scale: what compression moves an output by at least


@dataclasses.dataclass(frozen=True)
class Training:
    """A way to train.

    Args:
        base: makes the optimizer that QASSO wraps.
        autocast: whether forward and loss run in bfloat16.
        rounding: how far, of the scale, the small model may be from the trained one.
    """

    config: GETAConfig
    base: Callable[[Iterator[nn.Parameter]], Optimizer]
    autocast: bool
    rounding: float


WEIGHTS = GETAConfig(weight_bits=[4, 4], group_sparsity=0.3, initial_bits=8, pruning_periods=2)
TRAININGS = {
    # Sums are taken in another order. Weights that are rounded after training alone moved Mamba by 3e-2.
    "float": Training(WEIGHTS, lambda parameters: torch.optim.SGD(parameters, lr=1e-4), False, rounding=1e-4),
    # And inputs that lie between two numbers of their grid go the other way.
    "autocast": Training(
        dataclasses.replace(WEIGHTS, activation_bits=[8, 8]),
        lambda parameters: AdamW(parameters, lr=1e-4),
        True,
        rounding=5e-2,
    ),
}


def check_training(
    model: PreTrainedModel, inputs: Mapping[str, Any], record: Record, training: Training = TRAININGS["float"]
) -> Record:
    """Compress `model` in a short run, save and load it; the record says what came of it."""
    randomize_(model)
    record.parameters = sum(parameter.numel() for parameter in model.parameters())
    record.stage = "inputs"
    if hasattr(model.config, "apply_spec_augment"):  # masks of more frames than a tiny input has
        model.config.apply_spec_augment = False
    dense, untrained = run(model, inputs), copy.deepcopy(model)
    _loss(copy.deepcopy(model).train(), inputs, training).backward()  # what does not train dense says nothing here
    record.stage = "capture"
    prepare_model(model, training.config, inputs)
    record.stage = "train"
    optimizer = create_optimizer(model, training.base(model.parameters()), STEPS)
    model.train()
    for _ in range(STEPS):
        _loss(model, inputs, training).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = run(model, inputs)
    record.moved = distance(dense, trained)
    record.stage = "finalize"
    small = finalize_model(model)
    set_backend_(small, "reference")
    record.stage = "run pruned"
    finalized = run(small, inputs)
    record.pruned_error = distance(trained, finalized)
    if not record.pruned_error <= training.rounding:
        record.stage = "wrong"
        raise ValueError(f"trained and finalized differ by {record.pruned_error:.1e}")
    try:
        _check_file(small, inputs, finalized, record)
    except Exception:
        if not survives_saving(untrained, inputs, run(untrained, inputs)):
            record.stage = "unsaveable"
        raise
    if not record.moved > TRAINED:
        record.stage = "unmoved"
        raise ValueError(f"compression moved the outputs by {record.moved:.1e} only")
    record.stage = "done"
    return record


def _loss(model: nn.Module, inputs: Mapping[str, Any], training: Training) -> Tensor:
    """Something that every output is part of."""
    with torch.autocast("cpu", torch.bfloat16, enabled=training.autocast):
        outputs = float_tensors(model(**inputs)).values()
        return sum((y[y.isfinite()].float().square().mean() for y in outputs if y.requires_grad), torch.zeros(()))


def _check_file(small: Any, inputs: Mapping[str, Any], finalized: Mapping[str, Tensor], record: Record) -> None:
    record.stage = "save"
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        record.stage = "load"
        loaded = type(small).from_pretrained(folder)
    set_backend_(loaded, "reference")
    record.stage = "run loaded"
    record.loaded_error = distance(finalized, run(loaded, inputs))
    if math.isnan(record.loaded_error) or record.loaded_error > 0:
        record.stage = "loaded wrong"
        raise ValueError(f"saved and loaded differ by {record.loaded_error:.1e}")
