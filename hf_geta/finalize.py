"""The end of a run: removed groups are cut out of a copy, widths are rounded, weights become integers."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_geta.checkpoint.gather import InPieces
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.graph.capture import forget_wrappers_
from hf_geta.graph.qadg import Removed
from hf_geta.graph.tracing import named_tensors
from hf_geta.measure import compression_report
from hf_geta.optim.finite import refuse_not_finite
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.optim.widths import WidthTable
from hf_geta.preparation import forget_preparation_, preparation_of
from hf_geta.quantization.layers import quantized_layers
from hf_geta.report.publish import publish_with_card_
from hf_geta.sharding import Shards, whole

logger = logging.getLogger(__name__)


@torch.no_grad()
def finalize_model(model: PreTrainedModel, is_main_process: bool = True) -> PreTrainedModel:
    """The small model: removed groups cut out, weights as packed integer codes; `model` is left alone.

    A run with `weight_bits=None` ends in an ordinary float model of fewer groups.

    A group counts as removed when all its members are exactly zero. Widths of a run that stopped before its
    cool-down go to the nearest allowed ones.

    Args:
        is_main_process: whether this process will save the small model. Of a model in pieces every process makes the
            call, and holds one whole weight at a time; those that write True get the small model on the CPU, the others
            on the meta device.

    Returns:
        A copy with physically smaller, packed layers and the manifest in its config; `save_pretrained` it and load
        it with `from_pretrained` anywhere that imports hf_geta. `push_to_hub` publishes it with its card and report.

    Raises:
        ValueError: if `model` is not prepared.
        FloatingPointError: if it holds NaN or inf.
    """
    preparation = preparation_of(model)
    refuse_not_finite(model)
    removed = preparation.qadg.zero_groups(model)
    count = sum(len(groups) for groups in removed.values())
    if count < (preparation.groups_to_remove or 0):
        logger.warning("the run ended early: %d of %d groups are removed.", count, preparation.groups_to_remove)
    with rounded_widths(model) as have_moved:
        if have_moved:
            logger.warning("the run ended before its cool-down: widths are rounded now, without further training.")
        in_pieces = Shards(model.parameters()).are_several
        small = _cut_in_pieces(model, removed, is_main_process) if in_pieces else _cut(model, removed)
    publish_with_card_(small, compression_report(model))
    return small if is_main_process else small.to("meta")


def _cut(model: PreTrainedModel, removed: Removed) -> Any:
    """A copy without the groups, packed if the run quantizes."""
    preparation = preparation_of(model)
    small: Any = preparation.qadg.prune(model, removed)
    forget_preparation_(small)
    if preparation.config.weight_bits is not None:
        pack_model_(small)
    return small


def _cut_in_pieces(model: PreTrainedModel, removed: Removed, here: bool) -> Any:
    """As `_cut`, of a model that lies in pieces: gathered, cut, packed and put on the CPU tensor by tensor."""
    preparation = preparation_of(model)
    pieces = InPieces(model, here)
    small: Any = pieces.copy
    forget_wrappers_(small)
    if preparation.qadg.can_be_cut:
        pieces.cut(preparation.qadg.kept(small, removed))
        preparation.qadg.prune_and_describe_(small, removed)
    forget_preparation_(small)
    if preparation.config.weight_bits is not None:
        pack_model_(small, pieces.read, pieces.keep)
    pieces.fill_()
    return small


@contextlib.contextmanager
def rounded_widths(model: nn.Module) -> Iterator[bool]:
    """Meanwhile a prepared model has the widths that `finalize_model` gives it; yields whether they are others.

    Its layers then have copies of their quantizers: what trains is left alone. Of a model in pieces every process calls
    it.
    """
    layers = list(quantized_layers(model).values())
    own = [(layer.weight_quantizer, layer.input_quantizer) for layer in layers]
    try:
        for layer, copies in zip(layers, copy.deepcopy(own), strict=True):
            layer.weight_quantizer, layer.input_quantizer = copies
        yield bool(layers) and _round_widths_(model)
    finally:
        for layer, quantizers in zip(layers, own, strict=True):
            layer.weight_quantizer, layer.input_quantizer = quantizers


@torch.no_grad()
def _round_widths_(model: nn.Module) -> bool:
    """Whole, allowed widths and blocks that can be packed, as they are after a cool-down; whether a width has moved."""
    preparation = preparation_of(model)
    numbered = NumberedQuantizers.of(quantized_layers(model), preparation.readers)
    table = WidthTable(numbered.quantizers)
    bits, final = table.bits(), numbered.nearest_bits(preparation.config)
    kept = _kept_inputs(model)
    for quantizer, weight, width in zip(table.quantizers, numbered.weights, final.tolist(), strict=True):
        if quantizer.blocks is None or weight is None or quantizer.blocks.can_be_packed(width, kept.get(weight)):
            continue
        quantizer.move_clips_(whole(weight), width, width, kept.get(weight))
    table.project_(final, final)
    return bool((bits - final).abs().max() > 1e-3)


def _kept_inputs(model: nn.Module) -> dict[Tensor, Tensor]:
    """Weight with blocks -> which of its inputs are left, (in,) bool, where some will be cut out."""
    qadg, tensors = preparation_of(model).qadg, named_tensors(model)
    kept = qadg.kept(model, qadg.zero_groups(model)) if qadg.can_be_cut else {}
    of_weights = {tensors[name]: dims for name, dims in kept.items()}  # whichever name a tied one has there
    flags = {}
    for layer in quantized_layers(model).values():
        blocks = layer.weight_quantizer.blocks
        if blocks is not None and (indices := of_weights.get(layer.weight, {}).get(blocks.dim)) is not None:
            flags[layer.weight] = torch.zeros_like(blocks.block_of, dtype=torch.bool)
            flags[layer.weight][indices] = True
    return flags
