"""`hf-geta export --format onnx`: what onnxruntime computes, and what lies in the file."""

import sys

import onnx
import pytest
import torch

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.checkpoint.models import load_model
from hf_geta.checkpoint.packing import packed_bytes
from hf_geta.export import onnx as onnx_format
from hf_geta.export.formats import export_checkpoint
from hf_geta.export.onnx import open_session
from hf_geta.export.plain import packed_weights
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.quantization.layers import quantized_layers
from tests.export.families import make_model
from tests.quantization.random_blocks import draw_multipliers_

# granularity, inputs of a block, width of the inputs
CASES = {
    "vit": ("channel", 32, 8),
    "bert": ("tensor", 32, 4),
    "resnet": ("channel", 32, None),
    "llama": ("tensor", 32, None),
    "llama with blocks": ("block", 32, None),
    "gpt2 with blocks": ("block", 16, 8),
}
CHANGES = {"llama with blocks": {"hidden_size": 72}}  # of the family's config: several blocks, the last not full


def compressed(family, folder, **values):
    """A checkpoint with some groups of every axis gone and weights of 2 to 9 bits."""
    model = make_model(family.partition(" ")[0], **CHANGES.get(family, {}))
    prepare_model(model, GETAConfig(weight_bits=(2, 9), **values), example_inputs(model))
    model.geta.qadg.zero_(model, {axis.name: [0] for axis in model.geta.qadg.axes})
    for i, layer in enumerate(quantized_layers(model).values()):
        layer.weight_quantizer.set_bits_(2 + i % 8)
        draw_multipliers_(layer, 2 + i % 8)
    finalize_model(model).save_pretrained(folder)


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A family's checkpoint and the folder that it was exported to."""
    granularity, block_size, bits = CASES[request.param]
    source = tmp_path_factory.mktemp(request.param)
    widths = None if bits is None else (bits, bits)
    values = {"granularity": granularity, "weight_block_size": block_size, "activation_bits": widths}
    compressed(request.param, source, **values)
    export_checkpoint(source, source / "onnx", "onnx")
    return load_model(source).eval(), source / "onnx" / "model.onnx", bits


def test_onnxruntime_computes_what_the_checkpoint_does_for_any_batch_and_length(exported):
    model, file, _ = exported
    session = open_session(file)
    for batch, length in ((1, 5), (4, 21)):
        inputs = example_inputs(model, batch, length)
        if "attention_mask" in inputs:
            inputs["attention_mask"][0, 3:] = 0
        with torch.no_grad():
            expected = model(**inputs).logits
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        assert logits.shape == expected.shape
        distance = (torch.from_numpy(logits) - expected).norm() / expected.norm()
        assert distance <= 1e-4  # sums in another order; in models this small hardly a rounded input is on the edge


def test_weights_lie_in_the_file_as_integers_of_their_width(exported):
    model, file, bits = exported
    graph = onnx.load(file).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    kinds = set()
    for name, layer in packed_weights(model).items():
        weight = initializers[name]
        width = next(width for width in (4, 8, 16) if layer.manifest.bits <= width)
        assert len(weight.raw_data) == packed_bytes(layer.weight.numel(), width)
        kinds.add(onnx.TensorProto.DataType.Name(weight.data_type))
    assert {"INT4", "INT8"} <= kinds <= {"INT4", "INT8", "INT16"}
    assert any(node.op_type == "QuantizeLinear" for node in graph.node) == (bits is not None)


def test_the_file_tells_nothing_of_the_machine_that_it_was_made_on(exported):
    content = exported[1].read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content


def test_the_config_beside_the_file_is_an_ordinary_one(exported):
    config = type(exported[0].config).from_pretrained(exported[1].parent)
    assert not hasattr(config, "quantization_config")


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    compressed("resnet", tmp_path / "source")
    spell = onnx_format.spell_in_qdq_

    def misspell(model):
        spell(model)
        model.classifier[1].get_buffer("step_size").mul_(1.01)

    monkeypatch.setattr(onnx_format, "spell_in_qdq_", misspell)
    with pytest.raises(ValueError, match="nothing is written: in onnxruntime the outputs differ"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime is not installed: pip install 'hf-geta\[onnx\]'"):
        onnx_format.write_onnx(make_model("vit"), tmp_path)
