"""The whole story in three calls, for people with a training loop of their own.

    model = prepare_model(model, config, inputs)              # quantized layers, pruning groups
    optimizer = create_optimizer(model, AdamW(model.parameters(), lr=1e-3), total_steps=1000)
    ...                                                       # any loop: backward(), optimizer.step()
    small = finalize_model(model)                             # pruned, rounded, packed
    small.save_pretrained("out")

`GETATrainer` is these calls at the right places of `transformers.Trainer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_geta import __version__
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.config import WIDTHS, GETAConfig
from hf_geta.graph.build import build_qadg
from hf_geta.graph.layerwise import layerwise
from hf_geta.graph.qadg import QADG, Axis
from hf_geta.graph.search_space import quantizer_tensors
from hf_geta.graph.tracing import float_tensors
from hf_geta.graph.uniform import Family, make_uniform
from hf_geta.optim.budget import Budget
from hf_geta.optim.cost_terms import bops_budget, size_budget
from hf_geta.optim.qasso import QASSO
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable, nearest_allowed
from hf_geta.quantization.calibration import calibrate_, share_input_quantizers_
from hf_geta.quantization.layers import quantize_modules_, quantized_layers, restore_modules_
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.report.cost import Cost, measure_cost
from hf_geta.report.metadata import hub_id
from hf_geta.report.publish import publish_with_card_

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What `prepare_model` learned about a model; kept as its attribute `geta`."""

    config: GETAConfig
    qadg: QADG
    families: tuple[Family, ...] | None = None  # with `config.uniform`


def prepare_model(
    model: PreTrainedModel, config: GETAConfig, inputs: Inputs, calibration_batches: Sequence[Inputs] | None = None
) -> PreTrainedModel:
    """Make `model` trainable by QASSO, in place: quantized layers, calibrated ranges, pruning groups.

    With `config.weight_bits=None` the layers stay in float and only the groups are found.

    Args:
        model: a float model; its parameters stay the same objects, so optimizers and ties survive.
        config: the targets.
        inputs: one batch as the forward takes it, without labels; the graph is captured on it.
        calibration_batches: real batches that set the activation ranges; `inputs` alone if not given.

    Returns:
        The same model, with `model.geta`.

    Raises:
        ValueError: no layer to quantize, no axis to prune, a batch that the model does not take, NaN or inf in the
            activations; each says where and what to do.
    """
    if is_prepared(model):
        raise ValueError("this model is prepared already: train it, or start from a fresh one.")
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError(
            "this model is compressed already, its weights are integers: start from the float model, or from "
            "model.dequantize()."
        )
    batches = list(calibration_batches or [inputs])
    for name, value in itertools.chain.from_iterable(batch.items() for batch in (inputs, *batches)):
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise ValueError(f"{name} holds NaN: check the data and its preprocessing.")
    # tried on the weights, so that a wrong graph never costs a training run
    preparation = find_groups(model, config, inputs, verify=True)
    if config.weight_bits is not None:
        with contextlib.ExitStack() as undo:
            undo.callback(restore_modules_, model)  # refused: the model as it came, for other data may do
            quantize_modules_(model, config)
            _calibrate(model, config, batches)
            undo.pop_all()
    model.geta = preparation  # type: ignore[assignment]
    return model


def find_groups(model: PreTrainedModel, config: GETAConfig, inputs: Inputs, verify: bool | None = None) -> Preparation:
    """What `prepare_model` learns: the pruning groups that a run with `config` chooses from.

    Args:
        verify: try them on the model's weights, as in `build_qadg`.

    Raises:
        ValueError: if there are none, and the run is to prune.
    """
    qadg = build_qadg(model, inputs, verify=verify, optional=config.optional_axes)
    families = None
    if config.uniform:
        qadg, families = make_uniform(qadg, model)
    if "qadg" in config.without:
        qadg = layerwise(qadg, model)
    if config.prunes and not qadg.axes:
        raise ValueError(f"no prunable axis found in {type(model).__name__}. {qadg.explain_frozen()}")
    return Preparation(config, qadg, families)


def _calibrate(model: PreTrainedModel, config: GETAConfig, batches: Sequence[Inputs]) -> None:
    try:
        if config.share_inputs:
            share_input_quantizers_(model, batches[0])
        calibrate_(model, batches, config.initial_bits)
    except (LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(model).__name__} does not take a calibration batch: {error!r}.") from error


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_model` has been here."""
    return isinstance(getattr(model, "geta", None), Preparation)


def create_optimizer(model: nn.Module, base: torch.optim.Optimizer, total_steps: int) -> QASSO:
    """QASSO around `base` for a prepared model and a run of `total_steps` optimizer steps.

    An axis with a frozen parameter (`requires_grad=False`) stays whole, with all axes that go with it: its groups are
    not counted, and nothing writes to it.

    Raises:
        ValueError: if `model` is not prepared, nothing prunable trains, or the stages do not fit `total_steps`.
    """
    preparation = preparation_of(model)
    parameters = _prunable_parameters(model)
    axes = [
        axis
        for axis in preparation.qadg.axes
        if all(parameters[member.tensor].requires_grad for member in axis.members if member.tensor in parameters)
    ]
    families = preparation.families
    if families is not None:
        training = {axis.name for axis in axes}
        families = tuple(family for family in families if training.issuperset(family.axes))
        named = {name for family in families for name in family.axes}
        axes = [axis for axis in axes if axis.name in named]
    if preparation.config.prunes and not axes:
        raise ValueError(
            "every prunable axis holds a frozen parameter (requires_grad=False): let some of them train, or write "
            "group_sparsity=0."
        )
    space = PruningSpace(axes, parameters, families)
    quantizers = NumberedQuantizers.of(quantized_layers(model))
    budget = _budget(model, axes, quantizers)
    return QASSO(base, preparation.config, total_steps, space, quantizers, budget)


def _budget(model: nn.Module, axes: Sequence[Axis], quantizers: NumberedQuantizers) -> Budget | None:
    """The cost model of the config's budget over `axes`; None without a budget."""
    config, qadg = preparation_of(model).config, preparation_of(model).qadg
    if config.target_bops is not None:
        shapes = {name: tuple(p.shape) for name, p in _prunable_parameters(model).items()}
        return bops_budget(
            config.target_bops, qadg.operations, axes, shapes, quantizers.weight_rows, quantizers.input_rows
        )
    if config.target_size_bytes is not None:
        return file_budget(model, axes, quantizers, config.target_size_bytes)
    return None


def file_budget(
    model: nn.Module, axes: Sequence[Axis], quantizers: NumberedQuantizers, target_bytes: float = math.inf
) -> Budget:
    """The bytes of the weight file that a prepared model ends in, as a function of removed groups and widths."""
    tensors = {**_prunable_parameters(model, remove_duplicate=True), **_saved_buffers(model)}
    channel_dims = {
        f"{name}.weight": layer.channel_dim
        for name, layer in quantized_layers(model).items()
        if layer.weight_quantizer.log_channel_scale is not None
    }
    return size_budget(target_bytes, tensors, axes, quantizers.weight_rows, channel_dims)


@torch.no_grad()
def finalize_model(model: PreTrainedModel) -> PreTrainedModel:
    """The small model: removed groups cut out, weights as packed integer codes; `model` is left alone.

    A run with `weight_bits=None` ends in an ordinary float model of fewer groups.

    A group counts as removed when all its members are exactly zero. Widths of a run that stopped before its
    cool-down go to the nearest allowed ones.

    Returns:
        A copy with physically smaller, packed layers and the manifest in its config; `save_pretrained` it and load
        it with `from_pretrained` anywhere that imports hf_geta. `push_to_hub` publishes it with its card and report.

    Raises:
        ValueError: if `model` is not prepared.
    """
    preparation = preparation_of(model)
    small: Any = preparation.qadg.prune(model, preparation.qadg.zero_groups(model))
    del small.geta
    if preparation.config.weight_bits is not None:
        _round_widths_(small, preparation.config)
        pack_model_(small)
    publish_with_card_(small, compression_report(model))
    return small


def compression_report(model: PreTrainedModel) -> dict[str, Any]:
    """What the card of the finalized model can say of a prepared one: plain values, as `render_card` takes them.

    Raises:
        ValueError: if `model` is not prepared.
    """
    preparation, cost = preparation_of(model), measure_compression(model, finalized=True)
    removed = preparation.qadg.zero_groups(model)
    axes = preparation.qadg.axes
    versions = {"hf_geta": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}
    return {
        "architecture": type(model).__name__,
        "base_model": hub_id(model.config._name_or_path),
        "compressed": cost.summary(),
        "operations": cost.rows(),
        "axes": [
            {"name": a.name, "kind": a.kind, "kept": a.size - len(removed.get(a.name, ())), "groups": a.size}
            for a in axes
        ],
        "geta": preparation.config.to_dict(),
        "versions": versions,
    }


@torch.no_grad()
def measure_compression(model: nn.Module, finalized: bool = False) -> Cost:
    """What a prepared model costs beside the dense one: BOPs, parameters, widths, group sparsity.

    Args:
        finalized: with the allowed widths that `finalize_model` gives it, instead of those that it has now.

    Raises:
        ValueError: if `model` is not prepared.
    """
    config, qadg = preparation_of(model).config, preparation_of(model).qadg
    allowed = {name: config.allowed_bits(name) if finalized else None for name in WIDTHS}
    return cost_at(model, qadg.zero_groups(model), lambda quantizer: _bits(quantizer, allowed))


def cost_at(model: nn.Module, removed: Mapping[str, Sequence[int]], bits_of: Callable[[Quantizer], float]) -> Cost:
    """What a prepared model costs without the groups in `removed` (axis name -> indices).

    Args:
        bits_of: width of a quantizer.
    """
    qadg = preparation_of(model).qadg
    dense = {name: p.numel() for name, p in _prunable_parameters(model, remove_duplicate=True).items()}
    measured = {operation.weight for operation in qadg.operations}
    weight_bits, input_bits = {}, {}
    for name, layer in quantized_layers(model).items():
        weight_bits[f"{name}.weight"] = bits_of(layer.weight_quantizer)
        if layer.input_quantizer is not None and layer.input_quantizer.enabled:
            input_bits[f"{name}.weight"] = bits_of(layer.input_quantizer)
    return measure_cost(
        qadg.operations,
        dense,
        _kept_numel(model, qadg, removed, dense),
        {name: bits for name, bits in weight_bits.items() if name in dense},
        {name: bits for name, bits in input_bits.items() if name in measured},
        {axis.name: axis.size for axis in qadg.axes},
        {axis.name: axis.size - len(removed.get(axis.name, ())) for axis in qadg.axes},
    )


def _bits(quantizer: Quantizer, allowed: Mapping[str, Sequence[int] | None]) -> float:
    """The width; with a set, the one that `_round_widths_` makes of it."""
    return round(float(nearest_allowed(quantizer.bits, allowed[quantizer.widths])), 4)


def _kept_numel(
    model: nn.Module, qadg: QADG, removed: Mapping[str, Sequence[int]], dense: Mapping[str, int]
) -> dict[str, int]:
    """Elements of every parameter in `dense` once the groups in `removed` are gone."""
    gone: dict[tuple[str, int], set[int]] = {}
    for axis in qadg.axes:
        indices = list(removed.get(axis.name, ()))
        for member in axis.members if indices else ():
            gone.setdefault((member.tensor, member.dim), set()).update(member.indices[indices].reshape(-1).tolist())
    kept = dict(dense)
    for name in dense:
        shape = list(model.get_parameter(name).shape)
        for dim in range(len(shape)):
            shape[dim] -= len(gone.get((name, dim), ()))
        kept[name] = math.prod(shape)
    return kept


@torch.no_grad()
def output_difference(model: nn.Module, small: nn.Module, inputs: Inputs) -> float:
    """||small(x) - model(x)|| / ||model(x)|| over all floating outputs, both in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    outputs = [list(float_tensors(m.eval()(**inputs)).values()) for m in (model, small)]
    for module, training in modes:
        module.training = training
    difference = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(*outputs, strict=True))
    norm = sum(float(a.float().square().sum()) for a in outputs[0])
    return (difference / max(norm, torch.finfo(torch.float32).tiny)) ** 0.5


@contextlib.contextmanager
def float_inputs(model: nn.Module) -> Iterator[None]:
    """Meanwhile no layer of a prepared or packed model rounds its input.

    A rounding that flips, for a sum was taken in another order, flips others behind it: where inputs have outliers, two
    models that compute the same function differ by as much as rounding changes the function.
    """
    quantizers = {layer.input_quantizer for layer in quantized_layers(model).values() if layer.input_quantizer}
    enabled = [(quantizer, quantizer.enabled) for quantizer in quantizers]
    manifests = [(layer, layer.manifest) for layer in model.modules() if isinstance(layer, PackedLayer)]
    try:
        for quantizer, _ in enabled:
            quantizer.enabled = False
        for layer, manifest in manifests:
            layer.manifest = dataclasses.replace(manifest, activation_bits=None)
        yield
    finally:
        for quantizer, was in enabled:
            quantizer.enabled = was
        for layer, manifest in manifests:
            layer.manifest = manifest


def preparation_of(model: nn.Module) -> Preparation:
    """What `prepare_model` learned; ValueError if it has not been here."""
    if not is_prepared(model):
        raise ValueError("this model is not prepared: call prepare_model(model, config, inputs) first.")
    return model.geta  # type: ignore[return-value]


def _prunable_parameters(model: nn.Module, remove_duplicate: bool = False) -> dict[str, nn.Parameter]:
    """Every parameter that is not a quantizer's, by each of its names (or by its first)."""
    owned = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {name: p for name, p in named if id(p) not in owned}


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a weight file will hold: persistent, and not a quantizer's."""
    names = set(model.state_dict()) - set(quantizer_tensors(model))
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


@torch.no_grad()
def _round_widths_(model: nn.Module, config: GETAConfig) -> None:
    table = WidthTable(NumberedQuantizers.of(quantized_layers(model)).quantizers)
    bits = table.bits()
    allowed = [config.allowed_bits(quantizer.widths) for quantizer in table.quantizers]
    final = torch.stack([nearest_allowed(width, widths) for width, widths in zip(bits, allowed, strict=True)])
    if (bits - final).abs().max() > 1e-3:
        logger.warning("the run ended before its cool-down: widths are rounded now, without further training.")
    table.project_(final, final)
