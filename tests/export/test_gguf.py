"""`hf-geta export --format gguf`: what readers of others find in the file."""

import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.checkpoint.models import load_model
from hf_geta.config_checks import BLOCK_SIZES
from hf_geta.export.formats import export_checkpoint
from hf_geta.export.ggml_blocks import HALF_ROUNDING, block_type, to_blocks
from hf_geta.export.gguf import write_gguf
from hf_geta.quantization.layers import quantized_layers
from tests.export.families import make_model
from tests.quantization.random_blocks import draw_multipliers_

IDS = {"input_ids": torch.arange(24).view(2, 12)}
VALUES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "bos_token_id": 1}
VALUES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64}
BLOCKS = [("block", size) for size in BLOCK_SIZES]  # of 16 inputs, d is its channel's


def llama(**values):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 64, **VALUES, **values}, initializer_range=0.2)).eval()


def exported(model, folder, removed=(), granularity="channel", block_size=32, dtype="auto"):
    """The loaded checkpoint of a model without these (axis, groups), in 2 to 9 bits, and a reader of its GGUF file."""
    values = {"granularity": granularity, "weight_block_size": block_size}
    prepare_model(model, GETAConfig(weight_bits=(2, 9), **values), IDS)
    model.geta.qadg.zero_(model, {axis: list(range(count)) for axis, count in removed})
    for i, layer in enumerate(quantized_layers(model).values()):
        layer.weight_quantizer.set_bits_(2 + i % 8)
        draw_multipliers_(layer, 2 + i % 8)
    finalize_model(model).save_pretrained(folder)
    export_checkpoint(folder, folder / "gguf", "gguf", dtype)
    return load_model(folder).eval(), gguf.GGUFReader(folder / "gguf" / "model.gguf")


def value(reader, key):
    return reader.get_field(key).contents()


@pytest.mark.parametrize("bits", range(2, 9))
def test_ggml_reads_a_block_as_half_precision_step_size_times_code(bits):
    random = np.random.default_rng(bits)
    top = 2 ** (bits - 1) - 1
    codes = random.integers(-top, top, (3, 64), dtype=np.int32, endpoint=True)
    codes[0, :2] = -top, top
    step_sizes = random.uniform(1e-3, 1, 3).astype(np.float32)
    kind = block_type(codes, step_sizes, bits)
    read = gguf.quants.dequantize(to_blocks(codes, step_sizes, kind), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, step_sizes.astype(np.float16).astype(np.float32)[:, None] * codes)


@pytest.mark.parametrize(
    ("bits", "columns", "step_size"), [(9, 32, 0.1), (4, 48, 0.1), (4, 32, 1e-7), (4, 32, 1e5)], ids=str
)
def test_what_no_block_holds_stays_in_float(bits, columns, step_size):
    codes = np.ones((2, columns), dtype=np.int32)
    assert block_type(codes, np.full(2, step_size, dtype=np.float32), bits) is None


@pytest.mark.parametrize(("granularity", "size"), [("tensor", 32), ("channel", 32), *BLOCKS])
def test_transformers_reads_the_file_as_the_model_that_was_exported(tmp_path, granularity, size):
    model = llama(tie_word_embeddings=granularity == "channel")
    model, reader = exported(model, tmp_path, granularity=granularity, block_size=size)
    assert value(reader, "general.architecture") == "llama"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf").eval()
    with torch.no_grad():
        expected, logits = model(**IDS).logits, read(**IDS).logits
    # d is rounded by at most 2^-11, in 14 layers that follow one another.
    assert (logits - expected).norm() <= 14 * HALF_ROUNDING * expected.norm()


@pytest.mark.parametrize(("granularity", "size"), [("channel", 32), *BLOCKS])
def test_layers_of_different_sizes_are_a_deci_model_with_a_size_per_layer(tmp_path, granularity, size):
    removed = [("model.layers.1.self_attn.kv_groups", 1), ("model.layers.1.mlp.hidden", 40)]
    model, reader = exported(llama(), tmp_path, removed, granularity, size)
    assert value(reader, "general.architecture") == "deci"
    assert value(reader, "deci.attention.head_count") == [8, 6]
    assert value(reader, "deci.attention.head_count_kv") == [4, 3]
    assert value(reader, "deci.feed_forward_length") == [96, 64]  # 56 hidden units, filled up to blocks of 32
    tensors = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    layer = model.model.layers[1]
    for name, part in (
        ("ffn_up", layer.mlp.up_proj),
        ("ffn_down", layer.mlp.down_proj),
        ("attn_v", layer.self_attn.v_proj),
    ):
        rows, columns = part.weight.shape
        read = torch.from_numpy(np.array(tensors[f"blk.1.{name}.weight"]))
        torch.testing.assert_close(read[:rows, :columns], part.weight, rtol=HALF_ROUNDING, atol=0)
        assert not read[rows:].any()
        assert not read[:, columns:].any()


@pytest.mark.parametrize(("granularity", "size"), [("channel", 32), *BLOCKS])
def test_rotated_pairs_are_neighbours(tmp_path, granularity, size):
    model, reader = exported(llama(), tmp_path, granularity=granularity, block_size=size)
    tensors = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    for name, part in (
        ("attn_q", model.model.layers[1].self_attn.q_proj),
        ("attn_k", model.model.layers[1].self_attn.k_proj),
    ):
        read = torch.from_numpy(np.array(tensors[f"blk.1.{name}.weight"]))
        for row in range(len(read)):
            head, i = divmod(row, 16)
            expected = part.weight[16 * head + i // 2 + 8 * (i % 2)]
            torch.testing.assert_close(read[row], expected, rtol=HALF_ROUNDING, atol=0)


def test_scaled_rotations_are_factors_of_frequencies(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    _, reader = exported(llama(rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}), tmp_path)
    factors = next(one.data for one in reader.tensors if one.name == "rope_freqs.weight")
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)


def save_tokenizer(folder, before):
    words = sorted({*pre_tokenizers.ByteLevel.alphabet()} | {"ab", "abc", "<s>"})
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return len(words)


def test_the_tokenizer_goes_into_the_file(tmp_path):
    size = save_tokenizer(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    _, reader = exported(llama(vocab_size=size + 2), tmp_path)
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.tokens")[-2:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    text = "abcab 12 a"
    expected = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")(text)["input_ids"] == expected


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    size = save_tokenizer(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(ValueError, match=rf"a token {size - 1}, and the model's vocab_size={size - 1}"):
        exported(llama(vocab_size=size - 1), tmp_path)


def test_other_formats_in_the_same_folder_stay(tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.safetensors").write_text("of an export before")
    exported(llama(), tmp_path)
    assert {"model.safetensors", "model.gguf"} <= {path.name for path in (tmp_path / "gguf").iterdir()}


def test_a_tokenizer_that_llama_cpp_has_no_name_for_stays_out_with_a_warning(tmp_path, caplog):
    size = save_tokenizer(tmp_path, pre_tokenizers.Whitespace())
    _, reader = exported(llama(vocab_size=size), tmp_path)
    assert value(reader, "tokenizer.ggml.model") == "no_vocab"
    assert "llama.cpp has no name for how it splits text" in caplog.text


def test_float_tensors_keep_the_dtype_that_is_asked_for_and_vectors_are_float32(tmp_path):
    _, reader = exported(llama(), tmp_path, dtype="bfloat16")
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["output_norm.weight"] == "F32"


def test_models_that_llama_cpp_has_no_layers_for_are_refused(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    for model, message in (
        (make_model("gpt2"), "GGUF is written for LlamaForCausalLM; this is a GPT2LMHeadModel"),
        (llama(hidden_act="gelu"), "llama.cpp's layers have silu, this model's gelu"),
        (llama(rope_parameters=yarn), "rope_type 'yarn'"),
    ):
        with pytest.raises(ValueError, match=message):
            write_gguf(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"gguf is not installed: pip install 'hf-geta\[gguf\]'"):
        write_gguf(llama(), tmp_path)
