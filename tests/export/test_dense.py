"""`dense`: a plain transformers model that needs nothing of this package, and computes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_geta
from hf_geta import build_qadg
from hf_geta.cli import main
from hf_geta.export.plain import packed_weights
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.graph.uniform import make_uniform
from hf_geta.quantization.layers import quantized_layers
from tests.export.families import FAMILIES, halved, make_model, prepared
from tests.quantization.random_blocks import draw_multipliers_

EXPORTED = ("llama", "gpt2", "t5", "vit", "resnet")
HERE = Path(__file__).parent
# Family: kind of axis -> the fields of its config that state how many groups are left.
STATED = {
    "llama": {"mlp": "intermediate_size", "kv_group": "num_attention_heads, num_key_value_heads"},
    "mistral": {"mlp": "intermediate_size", "kv_group": "num_attention_heads, num_key_value_heads"},
    "qwen2": {"mlp": "intermediate_size", "kv_group": "num_attention_heads, num_key_value_heads"},
    "qwen3": {"mlp": "intermediate_size", "kv_group": "num_attention_heads, num_key_value_heads"},
    "gemma": {"mlp": "intermediate_size", "kv_group": "num_attention_heads, num_key_value_heads"},
    "phi": {"mlp": "intermediate_size", "attention_head": "num_attention_heads, num_key_value_heads"},
    "gpt2": {"mlp": "n_inner"},
    "opt": {"mlp": "ffn_dim"},
    "t5": {"mlp": "d_ff", "attention_head": "num_heads"},
    "bert": {"mlp": "intermediate_size"},
    "distilbert": {"mlp": "hidden_dim"},
    "vit": {"mlp": "intermediate_size", "attention_head": "num_attention_heads"},
    "deit": {"mlp": "intermediate_size", "attention_head": "num_attention_heads"},
    "resnet": {"channel": "hidden_sizes[1]"},
}


def load_in_a_fresh_process(root):
    """What transformers alone finds in the folders; their logits lie beside them."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, HERE / "load_plain.py", root]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Some families, half of what their configs state pruned, at 8 bits: (folder, logits before, what was found)."""
    root, before = tmp_path_factory.mktemp("dense"), {}
    for family in EXPORTED:
        model = prepared(make_model(family))
        small, inputs = halved(model), example_inputs(model)
        small.save_pretrained(root / family / "compressed")
        torch.save(inputs, root / family / "inputs.pt")
        before[family] = logits(small, inputs)
        assert main(["export", str(root / family / "compressed"), str(root / family / "exported")]) == 0
    return root, before, load_in_a_fresh_process(root)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_familys_config_states_is_found_by_trial(family):
    model = make_model(family)
    qadg, families = make_uniform(build_qadg(model, example_inputs(model)), model)
    kinds = {axis.name: axis.kind for axis in qadg.axes}
    assert {kinds[one.axes[0]]: ", ".join(one.fields) for one in families} == STATED[family]


def test_the_page_says_of_each_family_what_its_config_states():
    page = (Path(hf_geta.__file__).parent / "export" / "README.md").read_text()
    for family, stated in STATED.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {family} "))
        assert all(f"`{field}`" in row for fields in stated.values() for field in fields.split(", "))


def test_exported_models_load_without_this_package_and_compute_the_same(exported):
    """The same floats in the same products; only memory alignment may change the order of a sum."""
    root, before, found = exported
    assert found["hf_geta"] is False
    for family in EXPORTED:
        after = torch.load(root / family / "outputs.pt")
        assert torch.allclose(before[family], after, rtol=1e-5, atol=1e-5 * float(before[family].abs().max())), family


def test_no_tensor_is_missing_or_left_over_and_nothing_is_warned_of(exported):
    found = exported[2]
    assert found["found"] == {family: {} for family in EXPORTED}
    assert found["warnings"] == []


def test_exported_configs_state_the_pruned_sizes_and_speak_of_no_quantization(exported):
    root = exported[0]
    config = json.loads((root / "llama" / "exported" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (12, 2, 1)
    assert config["head_dim"] == 8  # stated, since it is not width / heads any more
    assert "quantization_config" not in config
    config = json.loads((root / "vit" / "exported" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["head_dim"]) == (12, 2, 8)


def test_blocks_become_the_floats_that_they_stand_for(tmp_path):
    model = prepared(make_model("llama", hidden_size=72), weight_bits=(2, 8), granularity="block")
    for i, layer in enumerate(quantized_layers(model).values()):
        layer.weight_quantizer.set_bits_(2 + i % 7)
        draw_multipliers_(layer, 2 + i % 7)
    small = halved(model)
    small.save_pretrained(tmp_path / "compressed")
    assert main(["export", str(tmp_path / "compressed"), str(tmp_path / "exported")]) == 0
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    layers = packed_weights(small)
    assert layers
    assert all(torch.equal(tensors[name], layer.weight) for name, layer in layers.items())
