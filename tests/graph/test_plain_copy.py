"""The search space is the model's, not that of the precision or the attention that it happens to run with."""

import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_geta.graph.build import build_qadg
from hf_geta.graph.capture import plain_copy

IDS = {"input_ids": torch.arange(1, 13).view(2, 6)}


def gpt2(kind=GPT2LMHeadModel):
    return kind(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200, n_positions=64)).eval()


def llama(kind=LlamaForCausalLM, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 200}
    return kind(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)).eval()


def spaces(model):
    return [(axis.name, axis.kind, axis.size, len(axis.members)) for axis in build_qadg(model, IDS, verify=True).axes]


class AutocastGPT2(GPT2LMHeadModel):
    """A forward that chooses its precision itself."""

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*args, **kwargs)


@pytest.fixture
def fresh_accelerate():
    """A process has one precision, that of its first Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_autocast_of_accelerate_hides_no_group(make, fresh_accelerate):
    expected, model = spaces(make()), make()
    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    wrapped = model.forward
    assert spaces(model) == expected != []
    assert model.forward == wrapped


def test_a_method_around_the_forward_hides_no_group_and_is_not_copied():
    """As trl sets it on a model, for a loss that never holds all logits."""
    expected, model = spaces(gpt2()), gpt2()
    own = model.forward
    if model.training:  # it is not: a variable of the closure stays without a value
        never = None

    def around(self, *args, **kwargs):
        return own(*args, **kwargs) if args or kwargs else never

    model.forward = wrapped = types.MethodType(around, model)
    assert spaces(model) == expected != []
    assert model.forward == wrapped
    qadg = build_qadg(model, IDS)
    for copied in (plain_copy(model), qadg.prune(model, {qadg.axes[0].name: [0]})):
        assert copied.forward == types.MethodType(GPT2LMHeadModel.forward, copied)


def test_autocast_in_the_forward_of_a_model_hides_no_group():
    assert spaces(gpt2(AutocastGPT2)) == spaces(gpt2()) != []


@torch.library.custom_op("hf_geta_test::attention", mutates_args=())
def opaque_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if q.dtype != torch.bfloat16:
        raise TypeError("like a kernel, for bfloat16 only")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@opaque_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def attend(module, query, key, value, attention_mask, **kwargs):
    return opaque_attention(query, key, value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("kernel", ["flex_attention", "opaque"])
def test_a_kernel_of_attention_hides_no_group(kernel):
    AttentionInterface.register("opaque", attend)
    model = llama(attn_implementation=kernel).bfloat16()
    assert spaces(model) == spaces(llama()) != []
    assert model.config._attn_implementation == kernel
    assert plain_copy(model).config._attn_implementation == "sdpa"
