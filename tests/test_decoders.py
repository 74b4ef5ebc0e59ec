"""Laws of compressed decoders: whole key-value groups go, and the text is the masked model's, token for token."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.finalize import rounded_widths
from hf_geta.measure import float_inputs, output_difference

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that texts differ and no two tokens are as likely
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW, LAYER_TYPES = 6, ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=LAYER_TYPES, tie_word_embeddings=False)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),  # queries, keys and values in one weight, gate and up too
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3, eos_token_id=None
        )
    ),
}
CONFIG = {
    "weight_bits": [8, 8],
    "activation_bits": [8, 8],
    "initial_bits": 8,
    "granularity": "channel",
    "quantize_embeddings": 8,
}
BLOCKS = {"weight_bits": [4, 4], "granularity": "block"}  # at 8 bits, all blocks have their channel's grid
CASES = {family: (family, {}) for family in FAMILIES} | {"llama in blocks": ("llama", BLOCKS)}
PROMPTS = torch.tensor([[5, 9, 33, 2, 17], [1, 60, 8, 8, 40]])
SHORT = 3  # tokens of the second prompt, where it is padded
CACHES = {"none": {"use_cache": False}, "dynamic": {}, "static": {"cache_implementation": "static"}}


@pytest.fixture(scope="module", params=CASES)
def models(request):
    """(masked, small): other heads and hidden units gone in every layer."""
    family, changes = CASES[request.param]
    torch.manual_seed(0)
    masked = FAMILIES[family]().eval()
    prepare_model(masked, GETAConfig(**CONFIG | changes), {"input_ids": PROMPTS})
    removed = {}
    for number, axis in enumerate(masked.geta.qadg.axes):
        count = [1, 0, 2, 3][number % 4] if "head" in axis.name or "group" in axis.name else 7 * (number % 3)
        removed[axis.name] = list(range(0, axis.size, 2))[:count] if axis.size > 4 else list(range(count))
    masked.geta.qadg.zero_(masked, removed)
    small = finalize_model(masked).eval()
    with rounded_widths(masked):
        yield masked, small


@pytest.fixture(scope="module")
def loaded(models, tmp_path_factory):
    """The small model, from a folder."""
    folder = tmp_path_factory.mktemp("small")
    models[1].save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def heads_of(model):
    """Key-value heads of every layer, by the rows of what makes the keys."""
    if model.config.model_type == "gpt2":
        return [layer.attn.c_attn.weight.shape[1] // 3 // 8 for layer in model.transformer.h]
    if model.config.model_type == "phi3":  # two query heads, a key and a value head in each group
        return [layer.self_attn.qkv_proj.weight.shape[0] // 8 // 4 for layer in model.model.layers]
    return [layer.self_attn.k_proj.weight.shape[0] // 8 for layer in model.model.layers]


def generate(model, prompts=PROMPTS, mask=None, **options):
    mask = torch.ones_like(prompts) if mask is None else mask
    return model.generate(prompts, attention_mask=mask, max_new_tokens=16, do_sample=False, **options)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_the_text_is_that_of_the_masked_model(models, loaded, cache):
    masked, small = models
    text = generate(small, **cache)
    assert torch.equal(text, generate(masked, **cache))
    assert torch.equal(text, generate(loaded, **cache))
    assert text.shape == (2, 21)
    assert len(set(text[0, 5:].tolist())) > 3  # it says more than one thing


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompts_padded_on_the_left_go_on_as_in_the_masked_model_and_as_each_does_alone(models, loaded, cache):
    """With float inputs: sums in another order may tip a rounding, and that a token."""
    masked, small = models
    mask = torch.ones_like(PROMPTS)
    mask[1, :-SHORT] = 0
    padded, options = PROMPTS * mask, CACHES[cache]
    with float_inputs(masked), float_inputs(small), float_inputs(loaded):
        text = generate(small, padded, mask, **options)
        assert torch.equal(text, generate(masked, padded, mask, **options))
        assert torch.equal(text, generate(loaded, padded, mask, **options))
        assert torch.equal(text[:1], generate(small, PROMPTS[:1], **options))
        assert torch.equal(text[1:, -SHORT - 16 :], generate(small, PROMPTS[1:, -SHORT:], **options))


def test_every_layer_has_heads_of_its_own_number_and_keeps_its_groups_whole(models):
    masked, small = models
    assert len(set(heads_of(small))) > 1
    if masked.config.model_type not in ("gpt2", "phi3"):
        for layer, heads in zip(small.model.layers, heads_of(small)):
            assert layer.self_attn.q_proj.weight.shape[0] == 2 * 8 * heads  # two query heads share a key-value head
            assert layer.self_attn.v_proj.weight.shape[0] == 8 * heads


def test_a_loaded_decoder_searches_with_beams_as_the_saved_one_does(models, loaded):
    _, small = models
    assert torch.equal(generate(loaded, num_beams=2), generate(small, num_beams=2))


def test_experts_lose_hidden_units_and_the_router_stays_as_it_was(models):
    masked, small = models
    if masked.config.model_type != "mixtral":
        pytest.skip("it has no experts")
    widths = [layer.mlp.experts.down_proj.weight.shape[2] for layer in small.model.layers]
    assert min(widths) < max(widths) == SIZES["intermediate_size"]
    for ours, theirs in zip(small.model.layers, masked.model.layers):
        assert torch.equal(ours.mlp.gate.weight, theirs.mlp.gate.weight)
        assert ours.mlp.experts.gate_up_proj.manifest.bits == 8


def test_with_float_inputs_only_the_order_of_sums_tells_the_models_apart(models):
    masked, small = models
    rounded = small(input_ids=PROMPTS).logits
    with float_inputs(masked), float_inputs(small):
        assert not torch.equal(small(input_ids=PROMPTS).logits, rounded)
        # float32 sums through three layers of large weights
        assert output_difference(masked, small, {"input_ids": PROMPTS}) < 1e-3
    assert torch.equal(small(input_ids=PROMPTS).logits, rounded)


def test_a_dequantized_decoder_has_embeddings_of_its_own_class_and_rounds_nothing(models, tmp_path):
    masked, small = models
    small.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()
    assert type(dense.get_input_embeddings()) is masked.get_input_embeddings().float_class
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert tied == masked.config.tie_word_embeddings
    with float_inputs(small):
        assert torch.equal(dense(input_ids=PROMPTS).logits, small(input_ids=PROMPTS).logits)
