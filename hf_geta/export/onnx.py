"""`onnx`: one model.onnx with integer weights, beside the model's config, for onnxruntime and its like.

The model is traced by torch's exporter with its packed layers in QDQ (`qdq.py`), any batch, any number of tokens. What
was written is run in onnxruntime before anyone else sees it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_geta.checkpoint.models import first_line
from hf_geta.export.plain import packed_weights
from hf_geta.export.qdq import BITS_OF_INT4, OPSET, spell_in_qdq_
from hf_geta.graph.capture import structural_copy
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.graph.tracing import float_tensors, only_tensors_returned, quiet_torch

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger(__name__)

FILE = "model.onnx"
# By default onnxruntime rounds the float inputs of int4 and int8 weights to 8 bits, on its own account, and on x86
# processors without VNNI saturates sums of two products of bytes.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1", "session.x64quantprecision": "1"}
# Two programs add float32 numbers in different orders. Where inputs are rounded, that moves codes by one and outputs by
# percents: as much as a change of all floats of the model by their own rounding does, which is measured.
TOLERANCE, CHANGE, ALLOWED_CHANGES = 1e-4, 1e-6, 4


def write_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Write model.onnx and config.json: the model in float32, the weights of packed layers as integers.

    Raises:
        ValueError: the extra is not installed, torch cannot trace the model, or onnxruntime computes something else.
    """
    _check_installed()
    if model.dtype != torch.float32:
        logger.warning("what is %s in the checkpoint is float32 in ONNX.", str(model.dtype).removeprefix("torch."))
    twin: Any = nn.Module.float(structural_copy(model)).eval()  # transformers' own refuses to cast quantized models
    for module in twin.modules():
        if hasattr(module, "config") and hasattr(module.config, "use_cache"):
            module.config.use_cache = False
    cases = [_Case(twin, batch=2, length=16), _Case(twin, batch=3, length=11)]
    narrow = {name for name, layer in packed_weights(twin).items() if layer.manifest.bits <= BITS_OF_INT4}
    spell_in_qdq_(twin)
    program = _trace(twin, cases[0])
    _pack_(program.model, narrow)
    program.save(folder / FILE)
    _save_config(model, folder)
    for case in cases:
        _check(folder / FILE, case)


class _Case:
    """Inputs, some of them padding where the model takes a mask, what the model makes of them, and how surely."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self.inputs = example_inputs(model, batch, length)
        if (mask := self.inputs.get("attention_mask")) is not None:
            mask[0, -mask.shape[1] // 3 :] = 0
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.outputs = float_tensors(model(**self.inputs))
            changed = float_tensors(structural_copy(model, _changed)(**self.inputs))
        self.tolerance = max(TOLERANCE, ALLOWED_CHANGES * _difference(changed, self.outputs))


def _changed(tensor: Tensor) -> Tensor:
    return tensor.data * (1 + CHANGE * torch.randn_like(tensor)) if tensor.is_floating_point() else tensor.data


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """||found - expected|| / ||expected|| over all outputs."""
    distance = sum(float((found[name] - one).square().sum()) for name, one in expected.items())
    length = sum(float(one.square().sum()) for one in expected.values())
    return (distance / max(length, torch.finfo(torch.float32).tiny)) ** 0.5


def _trace(model: PreTrainedModel, case: _Case) -> torch.onnx.ONNXProgram:
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    try:
        with quiet_torch(registry.name), warnings.catch_warnings(), torch.no_grad(), only_tensors_returned(model):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (),
                kwargs=case.inputs,
                dynamic_shapes={name: _axes(name, tensor) for name, tensor in case.inputs.items()},
                input_names=list(case.inputs),
                output_names=list(case.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        why = first_line(error.__cause__ or error)
        raise ValueError(f"{type(model).__name__} cannot be traced for ONNX: {why}") from error
    assert program is not None
    return program


def _axes(name: str, tensor: Tensor) -> dict[int, str]:
    """The axes of an input whose size is free: samples, and tokens."""
    tokens = "decoder_sequence" if name.startswith("decoder") else "sequence"
    return {0: "batch"} if tensor.is_floating_point() or tensor.ndim < 2 else {0: "batch", 1: tokens}


def _pack_(model: onnx_ir.Model, narrow: Iterable[str]) -> None:
    """Leave nothing in the file that does not compute: two codes of a narrow weight a byte, no traces of its making.

    The traces are source lines of every node, with the paths of this machine.
    """
    import ml_dtypes
    import onnx_ir.passes.common

    initializers = model.graph.initializers
    for weight in [initializers[name] for name in narrow if name in initializers]:
        assert weight.const_value is not None
        codes = weight.const_value.numpy().astype(ml_dtypes.int4)
        weight.const_value = onnx_ir.Tensor(codes, dtype=onnx_ir.DataType.INT4, name=weight.name)
        weight.dtype = onnx_ir.DataType.INT4
    _add_zero_points_(model.graph)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(model)


def _add_zero_points_(graph: onnx_ir.Graph) -> None:
    """Write the zero points of weights out, though 0 is what ONNX takes: onnxruntime to 1.26 forgets their type.

    Each weight has its own: 1.32 writes them anew, beside the weight, and stops where it finds one a second time.
    """
    import numpy as np
    import onnx_ir

    for node in [node for node in graph if node.op_type == "DequantizeLinear" and len(node.inputs) == 2]:
        weight, step_size = node.inputs
        assert weight is not None
        assert weight.dtype is not None
        assert step_size is not None
        assert step_size.shape is not None
        name = f"{weight.name}.zero_point"
        if name not in graph.initializers:
            numbers = np.zeros(step_size.shape.numpy(), weight.dtype.numpy())
            zeros = onnx_ir.Tensor(numbers, dtype=weight.dtype, name=name)
            graph.register_initializer(onnx_ir.Value(name=name, const_value=zeros))
        node.resize_inputs(3)
        node.replace_input_with(2, graph.initializers[name])


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """The model's config, without the manifest, which is of the checkpoint's tensors."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


def open_session(file: Path) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU that computes what the checkpoint does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for setting, value in EXACT.items():
        options.add_session_config_entry(setting, value)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _check(file: Path, case: _Case) -> None:
    """Run the file on the inputs of a case; ValueError where the outputs are not those of the model."""
    results = open_session(file).run(list(case.outputs), {name: tensor.numpy() for name, tensor in case.inputs.items()})
    difference = _difference(dict(zip(case.outputs, map(torch.from_numpy, results))), case.outputs)
    if not difference <= case.tolerance:
        raise ValueError(
            f"nothing is written: in onnxruntime the outputs differ from the model's by {difference:.2%} (allowed: "
            f"{case.tolerance:.2%}). Please report it, with the model."
        )


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'hf-geta[onnx]'.") from error
