"""The plain model behind a compressed one: an ordinary config that builds its shapes, and weights in float."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.manifest import read_manifest
from hf_geta.checkpoint.models import first_line
from hf_geta.checkpoint.packed_weight import SCALES
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.graph.fields import ConfigFields, Dim, agrees_with, format_path
from hf_geta.graph.tracing import named_tensors
from hf_geta.measure import output_difference
from hf_geta.quantization.experts import join_experts_, stacked_layers

# Both models multiply the same numbers; what differs is the order of sums, and less than the dtype's own rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
ROUNDED_INPUTS = 1e-2  # where a last digit may become a whole step of a layer's input

logger = logging.getLogger(__name__)


@torch.no_grad()
def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model of the same class and function that an ordinary config builds, all in float.

    Its inputs to linear layers are not rounded, whatever `model` does.

    Raises:
        ValueError: where no config builds a model of these shapes: layers of different sizes, or sizes that the
            family's config has no field for.
    """
    fields = ConfigFields(model)
    tensors = {name: layer.manifest.shape for name, layer in packed_weights(model).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()} | tensors
    wanted: dict[Dim, int] = {}
    for name, dense in fields.shapes.items():
        wanted |= {(name, dim): kept for dim, (kept, full) in enumerate(zip(shapes[name], dense)) if kept != full}
    try:
        changes = fields.solve(wanted, partial(agrees_with, attributes=read_manifest(model).attributes))
    except ValueError as error:
        raise ValueError(
            f"a plain {type(model).__name__} cannot hold this model: {error} Train it with uniform=True, which keeps "
            "to what the config can state."
        ) from error
    if changes:
        logger.info("%s", ", ".join(f"{format_path(path)} = {value}" for path, value in changes.items()))
    plain = fields.build(changes)
    assert plain is not None  # `solve` has built it
    join_experts_(plain)
    plain.load_state_dict(float_tensors(model), assign=True)
    plain.tie_weights()
    if plain.can_generate():
        plain.generation_config = model.generation_config
    return plain.eval()


def packed_weights(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Weight name -> its packed layer, by every name that it has."""
    named = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight": module for name, module in named if isinstance(module, PackedLayer)}


def float_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the float model: packed weights decoded."""
    packed = packed_weights(model)
    scales = {f"{name.removesuffix('weight')}{scale}" for name in packed for scale in SCALES}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in scales}
    stacked = {f"{name}.weight": name for name in stacked_layers(model)}
    decoded = {name: layer.weight.detach() for name, layer in packed.items()}
    return {stacked.get(name, name): decoded.get(name, tensor) for name, tensor in tensors.items()}


def leave_inputs_in_float_(model: PreTrainedModel, weights: Iterable[str]) -> None:
    """Let the layers of these weights round no input any more, and say so."""
    packed = packed_weights(model)
    rounding = [packed[name] for name in weights if packed[name].manifest.activation_bits is not None]
    for layer in rounding:
        layer.manifest = dataclasses.replace(layer.manifest, activation_bits=None)
    if rounding:
        logger.warning(
            "%d layers of the compressed model round their input in a way that this format has no room for: its "
            "outputs are those of the compressed model with these inputs in float.",
            len(rounding),
        )


def check_outputs(model: PreTrainedModel, folder: Path, rounds_inputs: bool = False) -> None:
    """Load what was written, and compare it with `model` on example inputs, where the model's form is known.

    Args:
        rounds_inputs: whether layers of both round their input.

    Raises:
        ValueError: if the outputs differ by more than rounding.
    """
    try:
        inputs = example_inputs(model)
    except ValueError as error:
        logger.warning("the outputs were not compared: %s", first_line(error))
        return
    difference = output_difference(model, type(model).from_pretrained(folder, dtype=model.dtype), inputs)
    tolerance = max(TOLERANCE.get(model.dtype, 0), ROUNDED_INPUTS if rounds_inputs else 0)
    if not difference <= tolerance:
        raise ValueError(
            f"the exported {type(model).__name__} computes something else than the compressed one (relative difference "
            f"{difference:.2g}). Nothing was written; please report the architecture."
        )
