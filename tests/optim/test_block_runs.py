"""Whole runs with blocks, of matrices with several of them: what trained is what is packed, saved, loaded, resumed."""

import filecmp
import io
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model, set_backend_
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.measure import output_difference
from hf_geta.optim.schedule import Stage
from hf_geta.quantization.kernels import MULTIPLIERS
from hf_geta.quantization.layers import quantized_layers

STEPS, TOKENS = 40, 50
CONFIG = GETAConfig(
    group_sparsity=0.4, weight_bits=[4, 4], activation_bits=[8, 8], pruning_periods=3, granularity="block"
)
WIDTHS = {
    "4": {},
    "5": {"weight_bits": [5, 5], "weight_block_size": 16},
    "2 to 6": {"weight_bits": [2, 6], "share_inputs": True},
}


def llama():
    sizes = {"hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 1, "vocab_size": TOKENS}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def gpt2():
    """Its layers are Conv1D, (in, out)."""
    sizes = {"n_embd": 48, "n_inner": 104, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": TOKENS}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0))


FAMILIES = {"llama": llama, "gpt2": gpt2}


def batch(step):
    ids = torch.randint(0, TOKENS, (4, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def started(family, config=CONFIG):
    """Later inputs of a layer have weights up to 30 times as large as earlier ones, which blocks are for."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not model.lm_head:
            sizes = torch.logspace(0, 1.5, layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])
            layer.weight.data *= sizes[:, None] if isinstance(layer, Conv1D) else sizes
    model = prepare_model(model, config, {"input_ids": batch(99)["input_ids"]})
    return model, create_optimizer(model, torch.optim.AdamW(model.parameters(), lr=3e-3), STEPS)


def train(model, optimizer, steps):
    for step in steps:
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def changed(changes):
    return GETAConfig.from_dict(CONFIG.to_dict() | changes)


class Trained(NamedTuple):
    """Of a layer of a prepared model, without what pruning takes."""

    weight: torch.Tensor
    rounded: torch.Tensor
    has_lost_inputs: bool


@torch.no_grad()
def trained_weights(model):
    qadg, found = model.geta.qadg, {}
    removed = qadg.zero_groups(model)
    for name, layer in quantized_layers(model).items():
        kept = [torch.ones(size, dtype=torch.bool) for size in layer.weight.shape]
        for axis in qadg.axes:
            for member in axis.members:
                if member.tensor == f"{name}.weight":
                    kept[member.dim][member.indices[list(removed.get(axis.name, ()))].reshape(-1)] = False
        values = (layer.weight, layer.weight_quantizer(layer.weight))
        values = (value[kept[0]][:, kept[1]] for value in values)
        found[name] = Trained(*values, not kept[1 - layer.channel_dim].all())
    assert any(layer.has_lost_inputs for layer in found.values()) == bool(removed)
    return found


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def check_saved(small, path):
    """The folder loads as the same model, which saves as the same bytes."""
    small.save_pretrained(path / "saved")
    loaded = type(small).from_pretrained(path / "saved")
    for backend in ("reference", "auto"):
        for each in (small, loaded):
            set_backend_(each, backend)
        assert output_difference(small, loaded, batch(77)) == 0
    loaded.save_pretrained(path / "again")
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(path / "saved" / name, path / "again" / name, shallow=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_the_weights_of_the_small_model_are_those_that_trained_bit_for_bit(family, widths, tmp_path):
    model, optimizer = started(family, changed(WIDTHS[widths]))
    train(model, optimizer, range(STEPS))
    trained, small = trained_weights(model), finalize_model(model)
    assert any(layer.has_lost_inputs for layer in trained.values())
    packed = packed_layers(small)
    for name, layer in trained.items():
        assert torch.equal(packed[name].weight, layer.rounded), name
    assert any(layer.units_of_blocks().unique().numel() > 2 for layer in packed.values())
    # summing fewer zeros may flip the rounding of an activation, by one step of 8 bits; so may sums of integers
    for backend in ("reference", "auto", "packed"):
        set_backend_(small, backend)
        assert output_difference(model, small, batch(77)) < 1e-2
    check_saved(small, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [Stage.PROJECTION, Stage.JOINT])
def test_a_run_stopped_before_its_cooldown_is_packed_with_blocks_of_what_is_left(family, stage, tmp_path):
    model, optimizer = started(family, changed({"weight_bits": [4, 6]}))
    steps = [step for step in range(STEPS) if optimizer.schedule.stage_at(step) is stage]
    train(model, optimizer, range(steps[-1] + 1))
    assert optimizer.final_bits is None
    trained, small = trained_weights(model), finalize_model(model)
    assert any(layer.has_lost_inputs for layer in trained.values()) == (stage is Stage.JOINT)
    for name, layer in packed_layers(small).items():
        assert 4 <= layer.manifest.bits <= 6
        assert int(layer.units_of_blocks().max()) <= layer.highest_multiplier
        error, before = ((value - trained[name].weight).norm() for value in (layer.weight, trained[name].rounded))
        assert error < 1.5 * before  # rounding loses half a bit at most, and 2^(1/2) is 1.41
    check_saved(small, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [Stage.PROJECTION, Stage.JOINT, Stage.COOLDOWN])
@pytest.mark.parametrize("place", ["first", "middle"])
def test_a_resumed_run_equals_the_uninterrupted_one(family, stage, place):
    model, optimizer = started(family, changed({"weight_bits": [2, 6]}))
    steps = [step for step in range(STEPS) if optimizer.schedule.stage_at(step) is stage]
    stop = steps[0] + 1 if place == "first" else steps[len(steps) // 2]
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(stop, STEPS))
    resumed, second = started(family, changed({"weight_bits": [2, 6]}))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    train(resumed, second, range(stop, STEPS))
    expected = model.state_dict()
    assert any(name.endswith("multipliers") and value.min() < MULTIPLIERS for name, value in expected.items())
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_with_blocks_is_not_larger_than_its_budget(family, tmp_path):
    dense = sum(p.numel() for p in FAMILIES[family]().parameters()) * 4
    values = {"group_sparsity": None, "target_size": str(dense * 45 // 100), "weight_bits": [2, 8]}
    config = changed(values)
    model, optimizer = started(family, config)
    train(model, optimizer, range(STEPS))
    trained, small = trained_weights(model), finalize_model(model)
    small.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= optimizer.targets.cost <= config.target_size_bytes
    tensors = load_file(tmp_path / "model.safetensors")
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    priced = optimizer.targets.cost - optimizer.targets.budget.constant
    last_blocks = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("step_size")) / 2
    assert written - len(tensors) <= priced <= written + last_blocks  # whole bytes; a last block counts as a whole one
    for name, layer in packed_layers(small).items():
        assert torch.equal(layer.weight, trained[name].rounded), name
