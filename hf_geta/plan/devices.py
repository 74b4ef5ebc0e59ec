"""What each device holds while it trains, and what it sends to the others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_geta.checkpoint.models import first_line
from hf_geta.config_checks import MAX_BITS
from hf_geta.graph.capture import TRACING_ERRORS
from hf_geta.optim.forgetting import FORGOTTEN_SUMS
from hf_geta.optim.qasso import QASSO
from hf_geta.optim.redundant import CHUNK_ENTRIES
from hf_geta.optim.share import Share
from hf_geta.plan.memory import OptimizerMemory, PassMemory, measure_optimizer, measure_pass, tensor_bytes
from hf_geta.plan.run import Run
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.outliers import OUTLIER_BYTES
from hf_geta.quantization.quantizers import Quantizer

# What is held of every redundant entry: its index, and in a step its value; of those of a chunk so many numbers more.
INDEX_BYTES, VALUE_BYTES, CHUNK_VECTORS = 4, 4, 12

CLIP_BYTES = 12  # of an input at a width: its clip, and two errors there
SUM_BYTES = 4

Measured = TypeVar("Measured", OptimizerMemory, PassMemory)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device; None where this machine cannot tell, with the reason in `unknown`.

    Attributes:
        weights: parameters (those of quantizers, too) and buffers.
        buckets: DDP's copy of the gradients.
        optimizer: the base optimizer's state.
        search_space: QASSO's own: which group owns what, scores, flags.
        redundant: the indices of a pruning period's redundant entries.
        activations: what a forward leaves for the backward.
        optimizer_step: what an optimizer step of the joint stage holds beside all that stays.
        peak: the most at once.
    """

    weights: int
    gradients: int
    buckets: int
    optimizer: int | None
    search_space: int
    redundant: int
    activations: int | None
    optimizer_step: int | None
    peak: int | None
    unknown: str = ""


@dataclasses.dataclass(frozen=True)
class Communication:
    """Bytes that a process sends and receives: under DDP, and in pieces (FSDP2) what is not the engine's.

    Attributes:
        gradients: all-reduced in each step without compression.
        quantizer_gradients: in addition, those of the quantizers.
        buffers: broadcast in each forward: what calibration saw, and blocks. None with `ddp_broadcast_buffers=False`.
        decision: broadcast at the start of each pruning period, in `decision_messages`.
        final_widths: broadcast once, at the start of the cool-down.
        calibration: all-reduced once, before the first step.
        scores: in pieces, all-reduced in each step of the projection and joint stage, and the first of the cool-down;
            `mix` sends 4 bytes a group once more when a period begins, and `magnitude` then alone: here 0.
        forgotten: in pieces, all-reduced in each step of the joint stage, at most.
        moved_weights: in pieces, all-gathered at most whenever bounds of widths move, one weight at a time.
    """

    gradients: int
    quantizer_gradients: int
    buffers: int
    decision: int
    decision_messages: int
    final_widths: int
    calibration: int
    scores: int
    forgotten: int
    moved_weights: int


def plan_memory(run: Run, qasso: QASSO, inputs: Mapping[str, Tensor], processes: int, forgotten: float) -> Memory:
    """The memory of a run whose skeleton is prepared.

    Args:
        forgotten: entries of parameters that are redundant at a time.
    """
    model, args = run.model, run.args
    trained = [p for p in model.parameters() if p.requires_grad]
    accumulates = args.gradient_accumulation_steps > 1
    base, no_state = _tried(lambda: measure_optimizer(*Trainer.get_optimizer_cls_and_kwargs(args, model), trained))
    one_pass, no_pass = _tried(lambda: measure_pass(model, inputs, run.precision, run.checkpointing, accumulates))

    gradients = tensor_bytes(trained)
    memory = Memory(
        weights=tensor_bytes([*model.parameters(), *model.buffers()]),
        gradients=gradients,
        buckets=gradients if processes > 1 else 0,
        optimizer=base.state if base else None,
        search_space=_search_space_bytes(qasso),
        redundant=round(forgotten * INDEX_BYTES),
        activations=one_pass.activations if one_pass else None,
        optimizer_step=None,
        peak=None,
        unknown="; ".join(filter(None, [no_state, no_pass])),
    )
    if base is None or one_pass is None:
        return memory
    forgetting = round(VALUE_BYTES * (forgotten + CHUNK_VECTORS * min(forgotten, CHUNK_ENTRIES)))
    step = max(base.temporary, _observation_bytes(qasso), forgetting)
    passing = one_pass.peak + (gradients if accumulates else 0)
    stays = memory.weights + memory.buckets + base.state + memory.search_space + memory.redundant
    return dataclasses.replace(memory, optimizer_step=step, peak=stays + max(passing, gradients + step))


def _tried(measure: Callable[[], Measured]) -> tuple[Measured | None, str]:
    """(what is measured, "") or (None, why it cannot be): an optimizer that is not installed, a forward that reads."""
    try:
        return measure(), ""
    except (*TRACING_ERRORS, ImportError, NotImplementedError) as error:
        return None, first_line(error)


def _search_space_bytes(qasso: QASSO) -> int:
    own: list[Tensor] = [grouped.group_ids for grouped in qasso.space.dims]
    own += [value for value in vars(qasso.targets).values() if isinstance(value, Tensor)]
    return tensor_bytes([*own, qasso.removed, qasso.redundant])


def _observation_bytes(qasso: QASSO) -> int:
    """x g of the largest parameter that groups own, in float32, with copies of both where they are not."""
    largest = max(qasso.space.parameters, key=nn.Parameter.numel, default=None)
    return 0 if largest is None else largest.numel() * 4 * (1 if largest.dtype == torch.float32 else 3)


def plan_communication(model: nn.Module, qasso: QASSO, gradients: int) -> Communication:
    """What a prepared model with its optimizer sends, beside the `gradients` of the float model."""
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    layers = [layer for layer in quantized_layers(model).values() if not isinstance(layer, nn.Embedding)]
    inputs = {id(layer.input_quantizer) for layer in layers if layer.input_quantizer}
    weighed = {id(layer.weight_quantizer): layer for layer in layers}.values()  # each has one power of its inputs
    powers = (layer.spread_over_weight(torch.empty(layer.input_features, device="meta")) for layer in weighed)
    blocks = (buffer for quantizer in quantizers if quantizer.blocks for buffer in quantizer.blocks.buffers())
    histogram = MagnitudeHistogram(torch.device("meta"))
    prices = qasso.targets.ceilings is not None
    widths = len(qasso.widths.quantizers)  # a byte each, as each group's flag
    return Communication(
        gradients=gradients,
        quantizer_gradients=tensor_bytes(p for quantizer in quantizers for p in quantizer.parameters()),
        buffers=len(inputs) * CLIP_BYTES * (MAX_BITS + 1) + tensor_bytes(itertools.chain(powers, blocks)),
        decision=qasso.space.num_groups + widths * prices,
        decision_messages=1 + prices,
        final_widths=widths,
        calibration=sum(
            4 * layer.input_features
            + tensor_bytes([histogram.counts, histogram.extremes])
            + OUTLIER_BYTES * (layer.input_quantizer is not None)
            for layer in layers
        ),
        # one sum is of what no group owns
        scores=SUM_BYTES * (qasso.space.num_groups + 1) * qasso.config.prunes * _observes(qasso),
        forgotten=SUM_BYTES * FORGOTTEN_SUMS * len(qasso.space.parameters) * qasso.config.prunes,
        moved_weights=tensor_bytes(weight for weight in qasso.weights if weight is not None),
    )


def _observes(qasso: QASSO) -> bool:
    """Whether gradients rank the groups, and not weights alone."""
    return not isinstance(qasso.targets, Share) or bool(qasso.targets.observed)
