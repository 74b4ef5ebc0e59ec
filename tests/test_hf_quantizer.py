import contextlib
import copy
import filecmp
import importlib
import json
import logging
import math
import shutil
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_geta
from hf_geta import hf_quantizer
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.manifest import Manifest, read_manifest, write_manifest_
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.checkpoint.prune import slice_
from hf_geta.checkpoint.saving import HINT
from hf_geta.compress import prepare_model
from hf_geta.config import GETAConfig
from hf_geta.finalize import finalize_model
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from tests.quantization.random_blocks import draw_multipliers_

IDS = {"input_ids": torch.arange(12).view(2, 6)}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**TEXT, "num_key_value_heads": 1}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}

# family: class, config class, config, inputs, (producer, consumer) of a hidden axis that can be sliced
FAMILIES = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, PIXELS, ("vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2")),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        TEXT,
        IDS,
        ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 8},
        IDS,
        ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        IDS,
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    ),
    "llama, tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": True},
        IDS,
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic"},
        PIXELS,
        None,
    ),
    # Its file joins gate and up (transformers' weight conversions): codes of two widths cannot be joined.
    "dinov2 with joined mlp": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {k: v for k, v in VIT.items() if k != "intermediate_size"} | {"use_swiglu_ffn": True},
        PIXELS,
        None,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, **SPECIAL},
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ),
}


@pytest.fixture(autouse=True)
def _quiet_progress():
    transformers.utils.logging.disable_progress_bar()


def build(family, **changes):
    name, config_name, values, inputs, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**values, **changes})
    return getattr(transformers, name)(config).eval(), inputs


def prune_(model, family):
    """Every second hidden unit of one MLP goes."""
    producer, consumer = FAMILIES[family][4]
    old = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wide = isinstance(model.get_submodule(producer), transformers.pytorch_utils.Conv1D)  # (in, out)
    size = model.get_submodule(producer).weight.shape[1 if wide else 0]
    kept = torch.arange(0, size, 2)
    keep = {f"{producer}.weight": {1 if wide else 0: kept}, f"{consumer}.weight": {0 if wide else 1: kept}}
    if "llama" in family:
        keep[f"{producer.replace('up_proj', 'gate_proj')}.weight"] = {0: kept}
    if f"{producer}.bias" in old:
        keep[f"{producer}.bias"] = {0: kept}
    slice_(model, keep)
    shapes = {name: tuple(model.state_dict()[name].shape) for name in keep}
    assert all(shapes[name] != old[name] for name in keep)
    write_manifest_(model, Manifest(shapes=shapes))


def pack_(model, granularity="tensor", activation_bits=None, **values):
    """Quantized and packed, with widths from 2 to 9 bits over the layers."""
    widths = None if activation_bits is None else (activation_bits, activation_bits)
    values |= {"granularity": granularity, "activation_bits": widths}
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), **values))
    for i, layer in enumerate(quantized_layers(model).values()):
        layer.weight_quantizer.set_bits_(2 + i % 8)
        draw_multipliers_(layer, 2 + i % 8)
        if layer.input_quantizer is not None:
            layer.input_quantizer.set_range_(3.0, activation_bits)
    return pack_model_(model)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@contextlib.contextmanager
def no_warnings():
    """Fails on a Python warning and on anything that transformers logs as one."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def load(model, path, **options):
    """The checkpoint of `model`, with every key in its place and no warning."""
    with no_warnings():
        loaded, info = type(model).from_pretrained(path, output_loading_info=True, **options)
    assert {key: list(value) for key, value in info.items()} == {key: [] for key in info}
    return loaded


def same_files(one, other):
    names = [path.name for path in one.iterdir()]
    return sorted(filecmp.cmpfiles(one, other, names, shallow=False)[0]) == sorted(names)


def check_round_trip(model, inputs, path):
    expected = logits(model, inputs)
    model.save_pretrained(path / "saved")
    loaded = load(model, path / "saved")
    assert torch.equal(logits(loaded, inputs), expected)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    loaded.save_pretrained(path / "again")
    assert same_files(path / "saved", path / "again")
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("granularity", "block_size"), [("tensor", 32), ("channel", 32), ("block", 32), ("block", 16)])
def test_a_loaded_packed_model_is_the_saved_one_bit_for_bit(family, granularity, block_size, tmp_path):
    model, inputs = build(family)
    loaded = check_round_trip(pack_(model, granularity, 8, weight_block_size=block_size), inputs, tmp_path)
    assert any(isinstance(module, PackedLayer) for module in loaded.modules())
    assert read_manifest(loaded) == read_manifest(model)


@pytest.mark.parametrize("family", [family for family, values in FAMILIES.items() if values[4]])
def test_a_loaded_pruned_model_is_the_saved_one_bit_for_bit(family, tmp_path):
    model, inputs = build(family)
    prune_(model, family)
    check_round_trip(model, inputs, tmp_path)


@pytest.mark.parametrize("family", [family for family, values in FAMILIES.items() if values[4]])
def test_a_loaded_pruned_and_packed_model_is_the_saved_one_bit_for_bit(family, tmp_path):
    model, inputs = build(family)
    prune_(model, family)
    loaded = check_round_trip(pack_(model), inputs, tmp_path)
    producer = loaded.get_submodule(FAMILIES[family][4][0])
    assert 12 in producer.weight.shape


def test_a_checkpoint_in_several_files_loads(tmp_path):
    model, inputs = build("vit")
    pack_(model).save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(model, tmp_path), inputs), logits(model, inputs))


class TwinConfig(transformers.PretrainedConfig):
    model_type = "twin"


class Twin(transformers.PreTrainedModel):
    """Two layers tied to one weight."""

    config_class = TwinConfig
    _tied_weights_keys: ClassVar = {"second.weight": "first.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.post_init()

    def forward(self, x):
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.second(self.first(x).relu()))


def test_layers_tied_to_one_weight_load_tied_from_one_tensor(tmp_path):
    model = Twin(TwinConfig(tie_word_embeddings=True)).eval()
    assert model.second.weight is model.first.weight
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), modules_to_not_convert=()))
    model.first.weight_quantizer.set_bits_(3)
    loaded = check_round_trip(pack_model_(model), {"x": torch.randn(2, 8)}, tmp_path)
    assert loaded.second.weight is loaded.first.weight
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["first.bias", "first.weight", "second.bias"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_model_spread_over_places_computes_and_saves_the_same(granularity, tmp_path):
    model, inputs = build("llama, tied")
    pack_(model, granularity, 8).save_pretrained(tmp_path / "saved")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    loaded = type(model).from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload")
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(model, tmp_path / "again"), inputs), logits(model, inputs))
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    damaged = "model.layers.1.mlp.up_proj.step_size"
    assert (damaged in tensors) == (granularity != "tensor")  # else config.json has it
    if damaged in tensors:
        save_file({**tensors, damaged: tensors[damaged] * math.nan}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{damaged} is not finite and positive"):
            type(model).from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("family", ["vit", "llama, tied", "gpt2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_codes_and_scales(family, granularity, dtype, tmp_path):
    model, inputs = build(family)
    pack_(model, granularity, 8).save_pretrained(tmp_path)
    loaded = load(model, tmp_path, dtype=dtype)
    for name, tensor in model.state_dict().items():
        kept = tensor.dtype == torch.uint8 or name.endswith("step_size")
        assert loaded.state_dict()[name].dtype == (tensor.dtype if kept else dtype), name
        assert not kept or torch.equal(loaded.state_dict()[name], tensor)
    assert read_manifest(loaded) == read_manifest(model)
    if "pixel_values" in inputs:
        inputs = {"pixel_values": inputs["pixel_values"].to(dtype)}
    assert torch.equal(logits(loaded, inputs), logits(model.to(dtype), inputs))


def test_a_pruned_model_loads_in_bfloat16_throughout(tmp_path):
    model, _ = build("vit")
    prune_(model, "vit")
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load(model, tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_layers_that_a_model_keeps_in_float32_stay_so(tmp_path):
    model, _ = build("t5")  # `wo` overflows in float16
    pack_(model).save_pretrained(tmp_path)
    loaded = load(model, tmp_path, dtype=torch.float16)
    feed_forward = loaded.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.weight.dtype == torch.float32
    assert feed_forward.wi.weight.dtype == torch.float16


def test_the_file_is_the_kept_weights_at_their_widths_what_stays_float_and_at_most_3_percent(tmp_path):
    """A ViT of 1 M parameters: the smaller the model, the more its names weigh."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 512}
    images = {"patch_size": 4, "image_size": 28, "num_channels": 1, "num_labels": 10}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))
    assert 0.9e6 < model.num_parameters() < 1.1e6
    config = GETAConfig(group_sparsity=0.4, weight_bits=[4, 4], activation_bits=[6, 6])
    prepare_model(model, config, {"pixel_values": torch.randn(2, 1, 28, 28)})
    axes = model.geta.qadg.axes
    model.geta.qadg.zero_(model, {axis.name: range(round(0.4 * axis.size)) for axis in axes})
    small = finalize_model(model)
    small.save_pretrained(tmp_path)
    layers = read_manifest(small).layers.values()
    assert {(layer.bits, layer.activation_bits) for layer in layers} == {(4, 6)}
    code_bytes = sum(layer.bits * torch.Size(layer.shape).numel() for layer in layers) / 8
    assert code_bytes * 2 < 0.7 * model.num_parameters()  # weights that were kept
    float_bytes = sum(4 * tensor.numel() for tensor in small.state_dict().values() if tensor.is_floating_point())
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert 1 <= file_bytes / (code_bytes + float_bytes) <= 1.03


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_file_speak_of_the_same_names(family, tmp_path):
    model, _ = build(family)
    if FAMILIES[family][4]:
        prune_(model, family)
    pack_(model).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert set(described["shapes"]) <= names
    assert {f"{layer}.weight" for layer in described["layers"]} <= names
    assert not [name for name in names if "step_size" in name]


def test_a_checkpoint_with_the_modules_names_of_another_release_loads(tmp_path):
    model, inputs = build("vit")
    prune_(model, "vit")
    pack_(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "vit.encoder.layer.1.intermediate.dense" in config["quantization_config"]["layers"]  # classic
    config["quantization_config"] = read_manifest(model).to_dict()
    assert "vit.layers.1.mlp.fc1" in config["quantization_config"]["layers"]  # this release's module
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(model, tmp_path), inputs), logits(model, inputs))


def test_the_file_keeps_the_family_s_classic_names_and_flat_codes_under_weight(tmp_path):
    model, _ = build("vit")
    pack_(model).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        codes = file.get_tensor("vit.encoder.layer.0.attention.attention.query.weight")
    bits = read_manifest(model).layers["vit.layers.0.attention.q_proj"].bits
    assert (codes.dtype, codes.shape) == (torch.uint8, (16 * 16 * bits // 8,))


def test_a_headless_model_loads_from_a_checkpoint_with_a_head_and_saves_as_its_own(tmp_path):
    model, inputs = build("bert")
    prune_(model, "bert")
    pack_(model).save_pretrained(tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        expected = model.bert(**inputs).pooler_output
        assert torch.equal(base(**inputs).pooler_output, expected)
        base.save_pretrained(tmp_path / "base")
        assert torch.equal(load(base, tmp_path / "base")(**inputs).pooler_output, expected)
        headed = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        assert torch.equal(headed.bert(**inputs).pooler_output, expected)


def test_only_a_model_without_packed_layers_can_train(tmp_path):
    model, _ = build("vit")
    prune_(model, "vit")
    model.save_pretrained(tmp_path / "pruned")
    pruned = load(model, tmp_path / "pruned")
    assert not pruned.is_quantized
    pruned.half().float()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    transformers.Trainer(pruned, arguments)
    pack_(model).save_pretrained(tmp_path / "packed")
    packed = load(model, tmp_path / "packed")
    assert packed.is_quantized
    assert not packed.hf_quantizer.is_trainable
    with pytest.raises(ValueError):  # transformers' own words
        transformers.Trainer(packed, arguments)


FC1 = "vit.encoder.layer.1.intermediate.dense"  # as the file calls it
ENTRY = {"bits": 4, "shape": [2, 2], "step_size": 0.5}


def _rewrite_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=4), "format_version=4: this hf_geta reads versions 1 to 3"),
        (lambda q: q["layers"].update({"vit.layers.7.mlp.fc1": ENTRY}), "has no 'vit.layers.7"),
        (lambda q: q["layers"][FC1].update(bits=40), "bits=40: widths are whole, 2 to 16"),
        (lambda q: q["layers"][FC1].update(shape=[99, 16]), "does not fit into"),
        (lambda q: q["layers"][FC1].update(shape=[8, 16]), "by its config.json|ignore_mism"),
        (lambda q: q["shapes"].update({"vit.layernorm.bias": [3]}), "by its config.json|ignore_mism"),
        (lambda q: q["layers"].update({"vit.layernorm": {**ENTRY, "shape": [16]}}), "is a LayerNorm; what can be"),
        (lambda q: q["layers"][FC1].pop("step_size"), f"layers: {FC1} has step_size=None: a step size is"),
        (lambda q: q["layers"][FC1].update(step_size=math.nan), f"layers: {FC1} has step_size=nan: a step size is"),
        (lambda q: q["layers"][FC1].update(activation_step_size=0.1), f"layers: {FC1} has activation_step_size=0.1, "),
    ],
)
def test_a_config_that_does_not_fit_the_file_is_refused(change, message, tmp_path):
    model, _ = build("vit")
    prune_(model, "vit")
    pack_(model).save_pretrained(tmp_path)
    _rewrite_config(tmp_path, change)
    # transformers 5.23 finds wrong shapes in the file before we do, and calls them mismatched
    with pytest.raises((ValueError, RuntimeError), match=message):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("tensor", ["bias", "weight", "step_size", "block_multipliers"])
def test_a_file_that_lacks_a_packed_tensor_is_refused(tensor, tmp_path):
    model, _ = build("bert")
    pack_(model, "block").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"bert.pooler.dense.{tensor}"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"bert.pooler.dense.{tensor} is not in the checkpoint's file"):
        type(model).from_pretrained(tmp_path)


def test_a_tied_bias_may_lie_under_its_other_name_but_not_be_missing(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=30))
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    torch.nn.init.normal_(model.cls.predictions.bias)
    prepare_model(model, GETAConfig(weight_bits=(4, 8), activation_bits=(8, 8), quantize_embeddings=8), inputs)
    small = finalize_model(model).eval()
    assert isinstance(small.cls.predictions.decoder, PackedLayer)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(load(small, tmp_path), inputs), logits(small, inputs))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "cls.predictions.decoder.bias" not in tensors
    del tensors["cls.predictions.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.bias is not in the checkpoint's file"):
        type(small).from_pretrained(tmp_path)


def test_a_dense_checkpoint_cannot_be_compressed_by_loading(tmp_path):
    model, _ = build("vit")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        type(model).from_pretrained(tmp_path, quantization_config=hf_quantizer.GETAQuantizationConfig())


def test_importing_the_plug_in_twice_changes_nothing():
    registered = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["geta"]
    importlib.reload(hf_quantizer)
    importlib.reload(hf_geta)
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["geta"] is registered


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One packed and one only pruned."""
    path = tmp_path_factory.mktemp("checkpoints")
    model, _ = build("vit")
    pack_(model).save_pretrained(path / "packed")
    model, _ = build("vit")
    prune_(model, "vit")
    model.save_pretrained(path / "pruned")
    return path


@pytest.mark.parametrize("kind", ["packed", "pruned"])
@pytest.mark.parametrize("mismatches", [False, True])
def test_without_hf_geta_a_fresh_process_is_told_what_to_install_and_gets_no_model(kind, mismatches, checkpoints):
    load = f"AutoModel.from_pretrained({str(checkpoints / kind)!r}, ignore_mismatched_sizes={mismatches})"
    done = _python(f"from transformers import AutoModel; {load}")
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert done.stderr.rstrip().endswith(HINT)


def test_a_hint_in_the_words_of_another_release_is_taken_away_as_well(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "packed", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"transformers_weights": "install what comes after it"}))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (checkpoints / "packed/config.json").read_bytes()


def test_the_hint_is_of_compressed_models_alone_and_of_each_of_their_saves(checkpoints, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoints / "packed")
    for copied in (model, copy.deepcopy(model)):
        copied.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "config.json").read_bytes() == (checkpoints / "packed/config.json").read_bytes()
    model.dequantize()
    for folder in ("float", "again"):
        model.save_pretrained(tmp_path / folder)
        assert "transformers_weights" not in json.loads((tmp_path / folder / "config.json").read_text())
    assert not hasattr(model.config, "transformers_weights")


def test_importing_hf_geta_is_all_that_loading_takes(checkpoints):
    code = f"""
import sys, hf_geta, transformers
for kind in ("packed", "pruned"):
    transformers.AutoModelForImageClassification.from_pretrained({str(checkpoints)!r} + "/" + kind)
heavy = ("hf_geta.graph", "hf_geta.optim", "hf_geta.compress", "hf_geta.trainer", "datasets", "transformers.trainer")
assert not [name for name in sys.modules if name.startswith(heavy)], sorted(sys.modules)
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization" not in done.stderr
