"""Damaged and hostile checkpoints: refused with a message, or loaded as they were; nothing is run, grown or written.

Mutations of a real checkpoint, drawn by hypothesis, and the tricks that one can think of by name.
"""

import copy
import json
import math
import re

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hf_geta.hf_quantizer  # noqa: F401  registers the loader
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.config import GETAConfig
from hf_geta.graph.build import build_qadg
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from tests.quantization.random_blocks import draw_multipliers_

REFUSALS = (ValueError, OSError, RuntimeError, SafetensorError)
IDS = {"input_ids": torch.arange(12).view(2, 6)}
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = (
    "",
    "../x",
    "/etc/passwd",
    "__class__",
    "forward",
    "transformer",
    "transformer.h.0",
    "config.auto_map",
    "a" * 3000,
)
JUNK = st.sampled_from(
    [None, 0, -1, 10**60, math.nan, math.inf, -0.5, 1e300, *NAMES, [], [[]], [0], ["x"], {}, {"x": {}}, [1] * 50]
)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    previous = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(previous)


@pytest.fixture(scope="module", params=["tensor", "channel", "block", "block of 16"])
def checkpoint(request, tmp_path_factory):
    """A pruned, packed GPT-2 with an attribute that followed and quantized inputs: its folder and its logits."""
    torch.manual_seed(0)
    granularity, _, size = request.param.partition(" of ")
    width = int(size or 8) * 2  # two blocks
    config = transformers.GPT2Config(vocab_size=32, n_embd=width, n_layer=1, n_head=4, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    qadg = build_qadg(model, IDS)
    model = qadg.prune(model, {axis.name: [0] for axis in qadg.axes})
    grid = {"granularity": granularity, "weight_block_size": int(size or 32)}
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), activation_bits=(8, 8), **grid))
    for i, layer in enumerate(quantized_layers(model).values()):
        layer.weight_quantizer.set_bits_(3 + i)
        draw_multipliers_(layer, 3 + i)
        layer.input_quantizer.set_range_(3.0, 8)
    folder = tmp_path_factory.mktemp("checkpoint")
    pack_model_(model).save_pretrained(folder)
    return folder, logits(model)


def logits(model):
    with torch.no_grad():
        return model(**IDS).logits


def outcome(folder):
    """The logits of the model in a folder, or the message with which it is refused; the folder stays as it is."""
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    try:
        return logits(transformers.GPT2LMHeadModel.from_pretrained(folder))
    except REFUSALS as error:
        return str(error)
    finally:
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == before


def objects(value):
    """All objects of a JSON value, the innermost too."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from objects(part)


@given(data=st.data())
@settings(SETTINGS, max_examples=100)
def test_a_changed_manifest_is_refused_or_says_the_same(checkpoint, data, tmp_path):
    folder, expected = checkpoint
    config = json.loads((folder / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from([part for part in objects(config["quantization_config"]) if part]))
        key = data.draw(st.sampled_from(sorted(where.keys() - {"quant_method"})))  # transformers reads that one
        change = data.draw(st.sampled_from(["delete", "replace", "rename", "repeat", "add"]))
        name = data.draw(st.sampled_from(NAMES))
        if change == "replace":
            where[key] = copy.deepcopy(data.draw(JUNK))
        elif change == "add":
            where[name] = copy.deepcopy(data.draw(JUNK))
        else:
            value = where[key] if change == "repeat" else where.pop(key)
            if change != "delete":
                where[name] = copy.deepcopy(value)
    copy_files(folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = outcome(tmp_path)
    assert result if isinstance(result, str) else torch.equal(result, expected)


def copy_files(source, target):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


@given(data=st.data())
@settings(SETTINGS, max_examples=40)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_flipped_and_cut_bytes_are_refused_or_load(checkpoint, name, data, tmp_path):
    folder, expected = checkpoint
    content = bytearray((folder / name).read_bytes())
    # of the config what is ours; of the file its header, and the first numbers
    first, last = (0, 8 + int.from_bytes(content[:8], "little") + 100)
    if name == "config.json":
        first = content.index(b'"quantization_config"')
        last = content.index(b"}", content.index(b'"shapes"')) + 1
    place = data.draw(st.integers(first, last - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    copy_files(folder, tmp_path)
    (tmp_path / name).write_bytes(content)
    result = outcome(tmp_path)
    assert result if isinstance(result, str) else result.shape == expected.shape


LAYER = "transformer.h.0.mlp.c_fc"


@pytest.mark.parametrize("checkpoint", ["block"], indirect=True)
@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (
            "step_size",
            lambda t: t * torch.tensor([math.nan] + 62 * [1.0]),
            "is not finite and positive",
        ),
        ("step_size", lambda t: t * math.inf, "is not finite and positive"),
        ("step_size", lambda t: -t, "is not finite and positive"),
        ("step_size", lambda t: 0 * t, "is not finite and positive"),
        ("weight", lambda t: t.view(torch.int8), "only other codes .uint8. can replace"),
        ("block_multipliers", lambda t: t | 0xF0, "block_multipliers go past 8, the highest at 5 bits"),
    ],
)
def test_packed_tensors_that_the_format_does_not_have_are_refused(checkpoint, tensor, change, message, tmp_path):
    copy_files(checkpoint[0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.{tensor}"] = change(tensors[f"{LAYER}.{tensor}"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert re.search(message, outcome(tmp_path))
