import json
import math
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_geta.checkpoint.manifest import LayerManifest, Manifest, fit_manifest, read_manifest, write_manifest_
from hf_geta.checkpoint.swap import replace_with_packed_

SELF = "bert.encoder.layer.0.attention.self"
QUERY = f"{SELF}.query"


@pytest.fixture
def model():
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    with torch.device("meta"):
        return BertForSequenceClassification(config)


OF_BLOCKS = {"granularity": "block", "step_size": None}


def _layer(**changes):
    return {"bits": 4, "shape": [4, 8], "granularity": "tensor", "step_size": 0.5, **changes}


def test_a_manifest_survives_json_and_is_these_values():
    tenth = torch.tensor(0.1).item()  # the float32 nearest to 0.1
    manifest = Manifest(
        shapes={"b": (2,), "a": (3, 4)},
        attributes={"layer.heads": 2},
        layers={
            "z": LayerManifest(4, (3, 4), step_size=tenth),
            "y": LayerManifest(
                4, (3, 4), "channel", activation_bits=8, activation_signed=True, activation_step_size=0.25
            ),
            "x": LayerManifest(4, (3, 4), "channel", shared_with="y"),
        },
    )
    values = manifest.to_dict()
    assert values == {
        "quant_method": "geta",
        "format_version": 1,
        "shapes": {"a": [3, 4], "b": [2]},
        "attributes": {"layer.heads": 2},
        "layers": {
            "x": {"bits": 4, "shape": [3, 4], "granularity": "channel", "shared_with": "y"},
            "y": {
                "bits": 4,
                "shape": [3, 4],
                "granularity": "channel",
                "activation_bits": 8,
                "activation_signed": True,
                "activation_step_size": 0.25,
            },
            "z": {"bits": 4, "shape": [3, 4], "granularity": "tensor", "step_size": 0.10000000149011612},
        },
    }
    assert list(values["shapes"]) == ["a", "b"]
    assert list(values["layers"]) == ["x", "y", "z"]
    assert Manifest.from_dict(json.loads(json.dumps(values))) == manifest


def test_only_what_has_blocks_is_of_version_2_and_of_another_size_of_version_3():
    manifest = Manifest(layers={"z": LayerManifest(4, (3, 40), "block"), "y": LayerManifest(4, (3, 4), "channel")})
    values = manifest.to_dict()
    assert values["format_version"] == 2
    assert values["layers"]["z"] == {"bits": 4, "shape": [3, 40], "granularity": "block"}
    assert Manifest.from_dict(json.loads(json.dumps(values))) == manifest
    assert manifest.layers["z"].block_shape == (3, 2)
    assert LayerManifest(4, (40, 3), "block", channel_dim=1).block_shape == (2, 3)
    small = LayerManifest(4, (3, 40), "block", block_size=16)
    manifest = Manifest(layers={**manifest.layers, "x": small})
    values = manifest.to_dict()
    assert values["format_version"] == 3
    assert values["layers"]["x"] == {"bits": 4, "shape": [3, 40], "granularity": "block", "block_size": 16}
    assert Manifest.from_dict(json.loads(json.dumps(values))) == manifest
    assert small.block_shape == (3, 3)


def test_a_key_with_the_value_null_is_one_that_is_left_out():
    entry = _layer(**OF_BLOCKS, block_size=None, shared_with=None)
    values = {"format_version": 2, "layers": {"a": entry, "b": _layer(**OF_BLOCKS, shared_with="a")}}
    layers = Manifest.from_dict(values).layers
    assert layers["a"] == LayerManifest(4, (4, 8), "block")
    assert layers["a"].block_shape == (4, 1)


def test_a_step_size_may_be_written_as_a_whole_number():
    layer = Manifest.from_dict({"layers": {"a": _layer(step_size=10**30)}}).layers["a"]
    assert isinstance(layer.step_size, float)
    assert layer.step_size == 1e30


def test_a_model_without_a_manifest_reads_as_not_compressed(model):
    assert read_manifest(model) == Manifest()
    manifest = Manifest(shapes={"classifier.bias": (1,)})
    write_manifest_(model, manifest)
    assert read_manifest(model) == manifest


def test_a_model_of_another_quantization_method_is_refused(model):
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match="quantized by 'awq' already"):
        read_manifest(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"format_version": 4},
            "format_version=4: this hf_geta reads versions 1 to 3; .* pip install --upgrade hf_geta",
        ),
        ({"format_version": "1"}, "format_version='1': "),
        ({"format_version": True}, "format_version=True: "),
        ({"blocks": {}}, "quantization_config has no blocks; its keys are attributes, format_version, layers"),
        ({"shapes": {"a": [0, 3]}}, r"a has shape \[0, 3\]: a shape is a list of whole numbers, 1 or more"),
        ({"shapes": {"a": [2.0]}}, "a has shape"),
        ({"shapes": {"a": "23"}}, "a has shape '23'"),
        ({"shapes": {"a": None}}, "a has shape None"),
        ({"attributes": {"a.heads": 0}}, "attributes: a.heads = 0: attributes are whole numbers, 1 or more"),
        ({"attributes": {"a.heads": True}}, "attributes: a.heads = True"),
        ({"attributes": {"a.heads": "2"}}, "attributes: a.heads = '2'"),
        ({"layers": {"a": _layer(bits=1)}}, "layers: a has bits=1: widths are whole, 2 to 16 bits"),
        ({"layers": {"a": _layer(bits=17)}}, "layers: a has bits=17"),
        ({"layers": {"a": _layer(bits=4.5)}}, "layers: a has bits=4.5"),
        ({"layers": {"a": {"shape": [1]}}}, "layers: a has bits=None"),
        ({"layers": {"a": {"bits": 4}}}, r"a\.weight has shape None"),
        ({"layers": {"a": _layer(activation_bits=32)}}, "layers: a has activation_bits=32"),
        ({"layers": {"a": _layer(activation_bits=8)}}, "layers: a has activation_bits=8 and activation_signed=None"),
        (
            {"layers": {"a": _layer(activation_bits=8, activation_signed=True)}},
            "layers: a has activation_step_size=None: a step size is a finite, positive float32 number",
        ),
        (
            {"layers": {"a": _layer(activation_bits=8, activation_signed=True, activation_step_size=-0.5)}},
            "layers: a has activation_step_size=-0.5: a step size is",
        ),
        (
            {"layers": {"a": _layer(activation_step_size=0.5)}},
            "layers: a has activation_step_size=0.5, which only a layer with activation_bits has",
        ),
        *(
            (
                {"layers": {"a": _layer(step_size=value)}},
                f"layers: a has step_size={re.escape(repr(value))}: a step size",
            )
            for value in (None, 0, 0.0, -1.0, math.inf, math.nan, 1e39, 1e-60, True, "0.5")
        ),
        ({"layers": {"a": _layer(step_size=[0.5])}}, r"layers: a has step_size=\[0.5\]: a step size is"),
        (
            {"layers": {"a": _layer(granularity="channel")}},
            "layers: a has step_size=0.5, which only a layer with a weight of its own with granularity 'tensor' has",
        ),
        (
            {"layers": {"a": _layer(shared_with="b"), "b": _layer()}},
            "layers: a has step_size=0.5, which only a layer with a weight of its own",
        ),
        ({"shapes": []}, r"quantization_config: shapes is \[\]: it is an object of named entries"),
        ({"layers": None}, "quantization_config: layers is None"),
        ({"layers": {"a": 4}}, "layers: a is 4: a layer is an object with some of the keys activation_bits"),
        ({"layers": {"a": _layer(channel_dim=1)}}, "layers: a has channel_dim=1: it is 1 or more, of channels"),
        ({"layers": {"a": _layer(activation_signed=True)}}, "has activation_bits=None and activation_signed=True"),
        ({"layers": {"a": _layer(granularity=["tensor"])}}, r"has granularity=\['tensor'\]: it is one of"),
        (
            {"layers": {"a": _layer(shared_with=["b"], step_size=None)}},
            r"a is shared_with \['b'\], which holds no such",
        ),
        (
            {"layers": {"a": _layer(shared_with="a", step_size=None)}},
            "a is shared_with 'a', which holds no such weight",
        ),
        (
            {"layers": {"a": _layer(shared_with="b", step_size=None), "b": _layer(bits=5)}},
            "layers: a is shared_with 'b', which holds no such weight",
        ),
        ({"shapes": {"a": list(range(10**6))}}, r"a has shape \[0, 1, 2, 3, 4, 5, \.\.\.\]"),
        (
            {"layers": {"a": _layer(granularity="block", step_size=None)}},
            "layers: a has granularity='block', which format_version 1 has not",
        ),
        (
            {"format_version": 2, "layers": {"a": _layer(granularity="block", step_size=None, shape=[4, 8, 1])}},
            r"a has granularity='block', which matrices have, and shape \[4, 8, 1\]",
        ),
        (
            {"format_version": 2, "layers": {"a": _layer(granularity="block", step_size=None, channel_dim=2)}},
            "a has granularity='block', which matrices have",
        ),
        (
            {"format_version": 2, "layers": {"a": _layer(granularity="block", step_size=None, block_size=16)}},
            "layers: a has block_size=16, which format_version 2 has not",
        ),
        (
            {"format_version": 3, "layers": {"a": _layer(granularity="block", step_size=None, block_size=24)}},
            r"layers: a has block_size=24: it is one of \(16, 32, 64, 128\), of blocks only",
        ),
        *(
            ({"format_version": 3, "layers": {"a": _layer(block_size=size, **others)}}, "layers: a has block_size=")
            for size, others in ((16, {}), *((odd, OF_BLOCKS) for odd in (True, 16.0, "16", [16], 10**40)))
        ),
        (
            {
                "format_version": 3,
                "layers": {"a": _layer(**OF_BLOCKS, block_size=16), "b": _layer(**OF_BLOCKS, shared_with="a")},
            },
            "layers: b is shared_with 'a', which holds no such weight",
        ),
        ({"layers": {"a": _layer(granularity="row")}}, "layers: a has granularity='row': it is one of"),
        ({"layers": {"a": _layer(zero_point=3)}}, "layers: a has no zero_point; its keys are"),
        (
            {"layers": {"a": _layer(shared_with="b", step_size=None)}},
            "layers: a is shared_with 'b', which holds no such weight",
        ),
        (
            {"layers": {"a": _layer(shared_with="b", step_size=None), "b": _layer(shape=[4, 9])}},
            "layers: a is shared_with 'b', which holds no such weight",
        ),
        (
            {
                "layers": {
                    "a": _layer(shared_with="b", step_size=None),
                    "b": _layer(shared_with="c", step_size=None),
                    "c": _layer(),
                }
            },
            "which holds no such weight",
        ),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_and_says_why(values, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shapes": {"bert.pooler.dense.wight": [8]}}, "shapes: BertForSequenceClassification has no 'bert.pool"),
        ({"shapes": {"classifier.bias": [3]}}, r"classifier.bias has shape \[3\] .* does not fit into the \[2\]"),
        ({"shapes": {"classifier.bias": [1, 1]}}, "does not fit"),
        ({"shapes": {"bert.embeddings.position_ids": [1, 4]}}, "has no 'bert.embeddings.position_ids'"),  # in no file
        *(
            ({"attributes": {path: 1}}, f"attributes: .* has no {re.escape(repr(path))}")
            for path in (
                "__class__",
                "_version",
                "training",
                "forward",
                "num_parameters",
                "../bert",
                "config.__class__",
                "config.auto_map",
                "config.num_labels",  # a property that writes a table as long as its value
                "bert.encoder.layer.0.__dict__",
                "bert.encoder.layer.0.attention.self.num_attention_heads.real",
            )
        ),
        ({"attributes": {f"{SELF}.num_attention_heads": 10**12}}, "is more than any tensor of the model has elements"),
        (
            {"layers": {QUERY: _layer(), QUERY.removeprefix("bert."): _layer()}},
            f"is {QUERY}, which has an entry already",
        ),
        ({"layers": {QUERY: _layer()}, "shapes": {f"{QUERY}.weight": [4, 8]}}, f"layers: {QUERY} is .* twice"),
        ({"layers": {QUERY: _layer(shape=[10**9, 10**9])}}, r"shape \[1000000000, 1000000000\] .* does not fit into"),
        ({"attributes": {"bert.encoder.heads": 1}}, "attributes: .* has no 'bert.encoder.heads'"),
        ({"attributes": {"bert.config.hidden_act": 1}}, "attributes: .* has no 'bert.config.hidden_act'"),
        ({"layers": {"bert.encoder.layer.1": _layer()}}, "layers: .* has no 'bert.encoder.layer.1': the checkpoint"),
        ({"layers": {"bert.encoder": _layer()}}, "layers: bert.encoder is a BertEncoder, which has no weight to pack"),
        ({"layers": {QUERY: _layer(shape=[16, 8])}}, r"query.weight has shape \[16, 8\] .* fit into the \[8, 8\]"),
        ({"layers": {QUERY: _layer(shape=[32])}}, r"query.weight has shape \[32\]"),
    ],
)
def test_a_manifest_that_does_not_fit_the_model_is_refused_and_says_where(model, values, message):
    with pytest.raises(ValueError, match=message):
        fit_manifest(Manifest.from_dict(values), model)


def test_a_manifest_finds_its_names_with_and_without_a_head(model):
    head = Manifest(
        shapes={f"{QUERY}.bias": (4,), "classifier.bias": (1,)},
        attributes={"bert.encoder.layer.0.attention.self.num_attention_heads": 1},
        layers={QUERY: LayerManifest(4, (4, 8), step_size=0.5)},
    )
    assert fit_manifest(head, model) == head
    model.bert.config.architectures = ["BertForSequenceClassification"]  # as saved
    base = fit_manifest(head, model.bert)
    assert set(base.shapes) == {"encoder.layer.0.attention.self.query.bias"}
    assert set(base.attributes) == {"encoder.layer.0.attention.self.num_attention_heads"}
    assert set(base.layers) == {"encoder.layer.0.attention.self.query"}
    with_prefix = fit_manifest(base, model)
    assert set(with_prefix.layers) == {QUERY}


def test_only_another_class_of_model_may_lack_a_head(model):
    model.config.architectures = ["BertForQuestionAnswering"]
    other_head = Manifest(shapes={"qa_outputs.bias": (1,)})
    assert fit_manifest(other_head, model).shapes == {}
    model.config.architectures = ["BertForSequenceClassification"]
    with pytest.raises(ValueError, match="has no 'qa_outputs"):
        fit_manifest(other_head, model)
    assert isinstance(model.bert, BertModel)


@pytest.mark.parametrize(
    ("module", "shape"), [(torch.nn.Embedding(4, 40), (4, 40)), (torch.nn.Conv2d(40, 4, 1), (4, 40, 1, 1))]
)
def test_what_is_no_linear_layer_has_no_blocks(module, shape):
    with pytest.raises(ValueError, match=f"0 has granularity='block'; a {type(module).__name__} has no blocks"):
        replace_with_packed_(torch.nn.Sequential(module), {"0": LayerManifest(4, shape, "block")})
