"""The whole story in three calls, for people with a training loop of their own; the third is in finalize.py.

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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_geta.agreement import agree_on_, agreed_object
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.manifest import read_manifest
from hf_geta.config import GETAConfig
from hf_geta.graph.build import build_qadg
from hf_geta.graph.layerwise import layerwise
from hf_geta.graph.qadg import Axis
from hf_geta.graph.search_space import quantizer_tensors
from hf_geta.graph.uniform import make_uniform
from hf_geta.optim.budget import Budget
from hf_geta.optim.cost_terms import bops_budget, size_budget
from hf_geta.optim.qasso import QASSO
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.optim.space import PruningSpace
from hf_geta.preparation import (
    Preparation,
    is_prepared,
    preparation_of,
    prunable_parameters,
    warn_when_saved_,
)
from hf_geta.quantization.calibration import calibrate_, find_readers, share_input_quantizers_
from hf_geta.quantization.experts import split_experts_
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.outliers import widen_outliers_
from hf_geta.quantization.swap import quantize_modules_, restore_modules_, settled
from hf_geta.sharding import is_cut

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Any]


def prepare_model(
    model: PreTrainedModel, config: GETAConfig, inputs: Inputs, calibration_batches: Sequence[Inputs] | None = None
) -> PreTrainedModel:
    """Make `model` trainable by QASSO, in place: quantized layers, calibrated ranges, pruning groups.

    With `config.weight_bits=None` the layers stay in float and only the groups are found. Under torch.distributed every
    process calls it, with batches of its own: all go on from rank 0's weights and groups, and one calibration.

    Args:
        model: a float model; its parameters stay the same objects, so optimizers and ties survive.
        config: the targets.
        inputs: one batch as the forward takes it, without labels; the graph is captured on it.
        calibration_batches: real batches that set the activation ranges; `inputs` alone if not given.

    Returns:
        The same model, with `model.geta`.

    Raises:
        ValueError: a model that could not be saved compressed, no layer to quantize, no axis to prune, a batch that the
            model does not take, NaN or inf in the activations; each says where and what to do.
        RuntimeError: torch's own, if there is no memory for a batch.
    """
    refuse_unfit(model)
    if is_prepared(model):
        raise ValueError("this model is prepared already: train it, or start from a fresh one.")
    config = settled(config, model)
    batches = list(calibration_batches or [inputs])
    if others := [batch for batch in (inputs, *batches) if not isinstance(batch, Mapping)]:
        raise ValueError(
            f"a {type(others[0]).__name__} is no batch as the forward takes it: write "
            f"{{{model.main_input_name!r}: ...}}, all that it takes by name, without labels."
        )
    for name, value in itertools.chain.from_iterable(batch.items() for batch in (inputs, *batches)):
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise ValueError(f"{name} holds NaN: check the data and its preprocessing.")
    agree_on_(itertools.chain(model.parameters(), model.buffers()))
    with contextlib.ExitStack() as undo:
        undo.callback(restore_modules_, model)  # refused: the model as it came, for other data may do
        # tried on the weights, so that a wrong graph never costs a training run
        preparation = agreed_object(find_groups(model, config, inputs, verify=True))
        if config.weight_bits is not None:
            quantize_modules_(model, config, preparation.qadg.bypassed)
            _check_float_parameters(model)
            preparation = dataclasses.replace(preparation, readers=_calibrate(model, config, batches))
        undo.pop_all()
    model.geta = preparation  # type: ignore[assignment]
    warn_when_saved_(model)
    return model


def refuse_unfit(model: nn.Module) -> None:
    """ValueError for what could be trained, perhaps, but not be saved as a compressed model."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no PreTrainedModel, and cannot be saved as one: pass the model inside; merge "
            "adapters first (model.merge_and_unload())."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"this {type(model).__name__} has adapters beside its weights: merge them first "
            "(peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()), or delete them."
        )
    refuse_compressed(model)
    if not is_prepared(model) and any(map(is_cut, model.parameters())):
        raise ValueError(
            f"this {type(model).__name__} lies in pieces already: prepare the whole model, and cut it then by torch's "
            "fully_shard (FSDP2, HSDP). Tensor parallelism (parallelize_module, tp_plan) is not supported."
        )
    read_manifest(model)  # refuses that of another method


def refuse_compressed(model: nn.Module) -> None:
    """ValueError for a model with packed layers, which no optimizer can train."""
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError(
            "this model is compressed already, its weights are integers: start from the float model, or from "
            "model.dequantize(). Trainer takes no packed model, not even to evaluate it: call the model in a loop."
        )


def find_groups(model: PreTrainedModel, config: GETAConfig, inputs: Inputs, verify: bool | None = None) -> Preparation:
    """What `prepare_model` learns: the pruning groups that a run with `config` chooses from.

    Stacked experts that will be quantized become layers first.

    Args:
        verify: try them on the model's weights, as in `build_qadg`.

    Raises:
        ValueError: if there are none, and the run is to prune.
    """
    make_layers_of_experts_(model, config)
    qadg = build_qadg(model, inputs, verify=verify, optional=config.optional_axes)
    families = None
    if config.uniform:
        qadg, families = make_uniform(qadg, model)
    if "qadg" in config.without:
        qadg = layerwise(qadg, model)
    if config.prunes and not qadg.axes:
        way_out = "uniform=False, or group_sparsity=0" if config.uniform else "group_sparsity=0"
        raise ValueError(
            f"no prunable axis found in {type(model).__name__}: write {way_out}, to only quantize. "
            f"{qadg.explain_frozen()}"
        )
    return Preparation(config, qadg, families)


def _check_float_parameters(model: PreTrainedModel) -> None:
    """A model is on the device and of the dtype of its first float parameter; packed weights are none (OLMo's)."""
    layers = quantized_layers(model)
    packed = {id(layer.weight) for layer in layers.values()}
    if all(id(parameter) in packed for parameter in prunable_parameters(model).values()):
        raise ValueError(
            f"every parameter of {type(model).__name__} would be packed, and transformers can neither save nor run a "
            f"model without one in float: write modules_to_not_convert=[{list(layers)[-1]!r}], or no "
            "quantize_embeddings."
        )


def make_layers_of_experts_(model: nn.Module, config: GETAConfig) -> None:
    """Make layers of the stacked experts that a run with `config` quantizes; a second call changes nothing."""
    if config.weight_bits is not None:
        split_experts_(model, config.modules_to_not_convert or ())


def _calibrate(model: PreTrainedModel, config: GETAConfig, batches: Sequence[Inputs]) -> tuple[tuple[str, ...], ...]:
    """Set the quantizers; with `share_inputs`, the layers that read one tensor."""
    try:
        readers = agreed_object(find_readers(model, batches[0])) if config.share_inputs else ()
        if config.activation_bits is not None:
            share_input_quantizers_(model, readers)
        calibrate_(model, batches, config.initial_bits)
        if (widths := config.allowed_bits("activation_bits")) is not None:
            widen_outliers_(model, batches, widths[-1], config.outlier_activation_bits)
    except (LookupError, RuntimeError, TypeError, AttributeError) as error:
        if should_reduce_batch_size(error):  # a smaller batch would do: find_executable_batch_size tries one
            raise
        raise ValueError(f"{type(model).__name__} does not take a calibration batch: {error!r}.") from error
    return readers


def create_optimizer(model: nn.Module, base: torch.optim.Optimizer, total_steps: int) -> QASSO:
    """QASSO around `base` for a prepared model and a run of `total_steps` optimizer steps.

    An axis with a parameter that does not train (`requires_grad=False`, or in no group of `base`) stays whole, with all
    axes that go with it: its groups are not counted, and nothing writes to it.

    Raises:
        ValueError: if `model` is not prepared, nothing prunable trains, or the stages do not fit `total_steps`.
    """
    preparation = preparation_of(model)
    parameters = prunable_parameters(model)
    optimized = {id(p) for group in base.param_groups for p in group["params"]}
    training = {name for name, p in parameters.items() if p.requires_grad and id(p) in optimized}
    axes = [
        axis
        for axis in preparation.qadg.axes
        if all(member.tensor in training for member in axis.members if member.tensor in parameters)
    ]
    families = preparation.families
    if families is not None:
        names = {axis.name for axis in axes}
        families = tuple(family for family in families if names.issuperset(family.axes))
        named = {name for family in families for name in family.axes}
        axes = [axis for axis in axes if axis.name in named]
    if preparation.config.prunes and not axes:
        raise ValueError(
            "every prunable axis holds a parameter that does not train (requires_grad=False, or not in the optimizer): "
            "let some of them train, or write group_sparsity=0."
        )
    if preparation.config.prunes and len(axes) < len(preparation.qadg.axes):
        every, counted = (sum(axis.size for axis in among) for among in (preparation.qadg.axes, axes))
        logger.warning(
            "%d of %d prunable axes hold a parameter that does not train and stay whole: only the groups of the others "
            "count and may go, %d of %d.",
            len(preparation.qadg.axes) - len(axes),
            len(preparation.qadg.axes),
            counted,
            every,
        )
    space = PruningSpace(axes, parameters, families)
    quantizers = NumberedQuantizers.of(quantized_layers(model), preparation.readers)
    budget = _budget(model, axes, quantizers)
    optimizer = QASSO(base, preparation.config, total_steps, space, quantizers, budget)
    if budget is None:
        model.geta = dataclasses.replace(preparation, groups_to_remove=optimizer.groups_to_remove)  # type: ignore[assignment]
    return optimizer


def _budget(model: nn.Module, axes: Sequence[Axis], quantizers: NumberedQuantizers) -> Budget | None:
    """The cost model of the config's budget over `axes`; None without a budget."""
    config, qadg = preparation_of(model).config, preparation_of(model).qadg
    if config.target_bops is not None:
        shapes = {name: tuple(p.shape) for name, p in prunable_parameters(model).items()}
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
    tensors = {**prunable_parameters(model, remove_duplicate=True), **_saved_buffers(model)}
    channel_dims = {
        f"{name}.weight": layer.channel_dim
        for name, layer in quantized_layers(model).items()
        if layer.weight_quantizer.log_channel_scale is not None
    }
    block_sizes = {
        f"{name}.weight": layer.weight_quantizer.blocks.size
        for name, layer in quantized_layers(model).items()
        if layer.weight_quantizer.blocks is not None
    }
    return size_budget(target_bytes, tensors, axes, quantizers.weight_rows, channel_dims, block_sizes)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a weight file will hold: persistent, and not a quantizer's."""
    names = set(model.state_dict()) - set(quantizer_tensors(model))
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
