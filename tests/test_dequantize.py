"""`dequantize`: a compressed model becomes an ordinary one of its pruned shapes."""

import json
import logging

import pytest
import torch
import transformers
from safetensors import safe_open

from hf_geta import GETAConfig, GETAQuantizationConfig, create_optimizer, finalize_model, prepare_model
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.manifest import read_manifest
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.quantization.swap import quantize_modules_
from tests.test_hf_quantizer import FAMILIES, IDS, Twin, TwinConfig, build, load, logits, pack_, prune_, same_files

FLOAT = GETAQuantizationConfig(dequantize=True)
PRUNABLE = [family for family, values in FAMILIES.items() if values[4]]


def load_float(model, path, **options):
    """As float, by either of the two ways; what they give is the same, and nothing is warned of."""
    loaded = load(model, path, quantization_config=FLOAT, **options)
    later = type(model).from_pretrained(path, **options).dequantize()
    torch.testing.assert_close(loaded.state_dict(), later.state_dict(), rtol=0, atol=0)
    return loaded


def is_plain(model):
    packed = any(isinstance(module, PackedLayer) for module in model.modules())
    return not packed and not model.is_quantized and not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("family", PRUNABLE)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_dequantized_model_is_an_ordinary_one_with_the_weights_that_the_codes_stand_for(
    family, granularity, tmp_path
):
    model, inputs = build(family)
    prune_(model, family)
    pack_(model, granularity).save_pretrained(tmp_path / "packed")
    loaded = load_float(model, tmp_path / "packed")
    assert is_plain(loaded)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    manifest = read_manifest(loaded)
    assert not manifest.layers
    dense = build(family)[0].state_dict()
    assert dict(manifest.shapes) == {
        name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items() if tensor.shape != dense[name].shape
    }
    loaded.save_pretrained(tmp_path / "float")
    again = load(loaded, tmp_path / "float")
    torch.testing.assert_close(again.state_dict(), loaded.state_dict(), rtol=0, atol=0)
    again.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "float", tmp_path / "again")


@pytest.mark.parametrize("family", ["vit", "dinov2 with joined mlp"])
def test_without_pruning_what_is_left_is_a_checkpoint_that_needs_no_hf_geta(family, tmp_path):
    model, inputs = build(family)
    pack_(model, "channel").save_pretrained(tmp_path / "packed")
    loaded = load_float(model, tmp_path / "packed")
    loaded.save_pretrained(tmp_path / "float")
    build(family)[0].save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    names = [set(safe_open(tmp_path / kind / "model.safetensors", "pt").keys()) for kind in ("dense", "float")]
    assert names[0] == names[1]
    assert torch.equal(logits(load(model, tmp_path / "float"), inputs), logits(model, inputs))


def test_weights_get_the_dtype_that_the_model_has_or_is_asked_for(tmp_path):
    model, _ = build("t5")  # its `wo` stays in float32
    pack_(model).save_pretrained(tmp_path)
    loaded = load_float(model, tmp_path, dtype=torch.float16)
    feed_forward = loaded.encoder.block[0].layer[1].DenseReluDense
    assert (feed_forward.wi.weight.dtype, feed_forward.wo.weight.dtype) == (torch.float16, torch.float32)
    asked = type(model).from_pretrained(tmp_path).dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.bfloat16}


def test_layers_that_shared_packed_codes_share_one_parameter_again(tmp_path):
    model = Twin(TwinConfig(tie_word_embeddings=True)).eval()
    quantize_modules_(model, GETAConfig(weight_bits=(4, 4), modules_to_not_convert=()))
    pack_model_(model).save_pretrained(tmp_path / "packed")
    loaded = load_float(model, tmp_path / "packed")
    assert loaded.second.weight is loaded.first.weight
    loaded.save_pretrained(tmp_path / "float")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["first.bias", "first.weight", "second.bias"]
    again = load(loaded, tmp_path / "float")
    assert again.second.weight is again.first.weight


def test_an_offloaded_model_is_not_dequantized_and_says_so(tmp_path):
    model, inputs = build("llama")
    pack_(model).save_pretrained(tmp_path / "saved")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    loaded = type(model).from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"model\.layers\.1\..*norm\.weight is offloaded"):
        loaded.dequantize()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", ["bert", "llama, tied", "gpt2"])
def test_a_compressed_model_can_be_compressed_further(family, tmp_path):
    model, inputs = build(family)
    prune_(model, family)
    pack_(model).save_pretrained(tmp_path / "first")
    loaded = load_float(model, tmp_path / "first")
    first = sum(parameter.numel() for parameter in loaded.parameters())
    steps = 20
    config = GETAConfig(group_sparsity=0.3, weight_bits=[2, 4], activation_bits=[8, 8], pruning_periods=2,
                        projection_steps=7)  # fmt: skip
    prepare_model(loaded, config, inputs)
    optimizer = create_optimizer(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-3), total_steps=steps)
    for _ in range(steps):
        loaded(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small = finalize_model(loaded.eval())
    small.save_pretrained(tmp_path / "second")
    again = load(model, tmp_path / "second")
    assert torch.equal(logits(again, inputs), logits(small, inputs))
    assert {layer.bits for layer in read_manifest(again).layers.values()} <= {2, 3, 4}
    assert sum(parameter.numel() for parameter in again.dequantize().parameters()) < first


def test_who_wants_to_train_a_packed_model_is_told_how(tmp_path, caplog):
    model, _ = build("vit")
    pack_(model).save_pretrained(tmp_path)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError):  # transformers' own words
        transformers.Trainer(load(model, tmp_path), arguments)
    assert "GETAQuantizationConfig(dequantize=True)" in caplog.text
    transformers.Trainer(load_float(model, tmp_path), arguments)
    with pytest.raises(ValueError, match=r"or from model\.dequantize\(\)"):
        prepare_model(model, GETAConfig(), IDS)


def test_how_to_load_is_true_or_false_and_no_part_of_the_format():
    with pytest.raises(ValueError, match="dequantize='yes': write True or False"):
        GETAQuantizationConfig(dequantize="yes")
    assert "dequantize" not in FLOAT.to_dict()


VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@pytest.mark.skipif(VERSION < (5, 23), reason="5.17 allows no mismatches in quantized models: the head is refused")
@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_for_other_labels_is_new_where_mismatches_are_allowed_and_else_refused(labels, tmp_path):
    model, inputs = build("bert", num_labels=3)
    prune_(model, "bert")
    pack_(model).save_pretrained(tmp_path / "packed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "packed", num_labels=labels)
    loaded = type(model).from_pretrained(tmp_path / "packed", num_labels=labels, ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert torch.equal(loaded.bert(**inputs).pooler_output, model.bert(**inputs).pooler_output)
    assert logits(loaded, inputs).shape == (2, labels)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(loaded, tmp_path / "again"), inputs), logits(loaded, inputs))


@pytest.mark.skipif(VERSION < (5, 23), reason="5.17 allows no mismatches in quantized models: the head is refused")
@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_without_a_bias_is_new_too(labels, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**FAMILIES["llama"][2], num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    quantize_modules_(model, GETAConfig(weight_bits=(4, 4), modules_to_not_convert=()))
    pack_model_(model).save_pretrained(tmp_path)
    assert "score" in read_manifest(model).layers
    loaded = type(model).from_pretrained(tmp_path, num_labels=labels, ignore_mismatched_sizes=True)
    assert logits(loaded, IDS).shape == (2, labels)
    assert torch.equal(loaded.model(**IDS).last_hidden_state, model.model(**IDS).last_hidden_state)


def test_a_part_that_another_class_of_model_does_without_is_left_out(tmp_path):
    model, inputs = build("bert")
    pack_(model).save_pretrained(tmp_path)
    other = transformers.BertForTokenClassification.from_pretrained(tmp_path)  # it has no pooler
    with torch.no_grad():
        assert torch.equal(other.bert(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)
