"""`gguf`: one model.gguf for llama.cpp, of Llama-shaped models, with integer weights.

llama.cpp knows one d per block of 32 numbers of a row, as float16, and its codes of 4, 5 and 8 bits hold ours: what is
lost is the rounding of d. Models whose layers kept different sizes are of llama.cpp's architecture `deci`, whose layers
are Llama's with sizes of their own; `llama` reads those of the first layer only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_geta.checkpoint.integer import KERNEL_BITS
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.export.ggml_blocks import BLOCK, block_type, to_blocks
from hf_geta.export.gguf_vocabulary import add_vocabulary
from hf_geta.export.plain import float_tensors, leave_inputs_in_float_, packed_weights

if TYPE_CHECKING:
    import gguf

FILE = "model.gguf"
ROTATIONS = ("default", "linear", "llama3")  # those that a factor for each frequency says
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ONE_PART = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+)\.\w+")


def write_gguf(model: PreTrainedModel, folder: Path) -> None:
    """Write model.gguf: packed weights as blocks of integers, other matrices in the model's dtype, vectors in float32.

    The tokenizer is the one in `folder`.

    Raises:
        ValueError: the extra is not installed, or llama.cpp has no layers like the model's.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'hf-geta[gguf]'.") from error
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"GGUF is written for LlamaForCausalLM; this is a {type(model).__name__}.")
    shapes = [_LayerShape.of(layer) for layer in model.model.layers]
    _check(model, shapes)
    leave_inputs_in_float_(model, packed_weights(model))
    writer = gguf.GGUFWriter(folder / FILE, "llama" if len(set(shapes)) == 1 else "deci")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, model, shapes)
    add_vocabulary(writer, folder, model.config.vocab_size)
    _add_tensors(writer, model, shapes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _LayerShape(NamedTuple):
    """Sizes of one decoder layer, as kept; its hidden units filled up to whole blocks."""

    head_sizes: frozenset[int]  # of queries and keys, and of values
    heads: int
    groups: int
    units: int

    @classmethod
    def of(cls, layer: Any) -> _LayerShape:
        attention, units = layer.self_attn, layer.mlp.up_proj.out_features
        head_size = attention.head_dim
        heads, groups = (part.out_features // head_size for part in (attention.q_proj, attention.k_proj))
        head_sizes = frozenset((head_size, attention.v_proj.out_features // groups))
        return cls(head_sizes, heads, groups, units + -units % BLOCK)


def _check(model: LlamaForCausalLM, shapes: Sequence[_LayerShape]) -> None:
    config: Any = model.config
    if config.hidden_act != "silu":
        raise ValueError(f"llama.cpp's layers have silu, this model's {config.hidden_act}.")
    if (rotation := config.rope_parameters["rope_type"]) not in ROTATIONS:
        raise ValueError(f"rope_type {rotation!r}: what GGUF is written for is {', '.join(ROTATIONS)}.")
    head_sizes = sorted({size for shape in shapes for size in shape.head_sizes})
    if head_sizes != [2 * model.model.rotary_emb.inv_freq.numel()]:
        raise ValueError(f"llama.cpp's heads have one size, all of it rotated; here are sizes {head_sizes}.")


def _add_sizes(writer: gguf.GGUFWriter, model: LlamaForCausalLM, shapes: Sequence[_LayerShape]) -> None:
    """What llama.cpp has to know before it reads tensors; a list by layers where they differ."""
    config: Any = model.config
    (head_size,) = shapes[0].head_sizes
    writer.add_name(Path(config.name_or_path).name or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(shapes))
    writer.add_head_count(_one_or_all([shape.heads for shape in shapes]))
    writer.add_head_count_kv(_one_or_all([shape.groups for shape in shapes]))
    writer.add_feed_forward_length(_one_or_all([shape.units for shape in shapes]))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _one_or_all(sizes: list[int]) -> Any:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _add_tensors(writer: gguf.GGUFWriter, model: LlamaForCausalLM, shapes: Sequence[_LayerShape]) -> None:
    import gguf

    names, tied = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(shapes)), model.config.tie_word_embeddings
    packed = packed_weights(model)
    tensors = {name: one for name, one in float_tensors(model).items() if not (tied and name == "lm_head.weight")}
    if ((factors := _frequency_factors(model)) != 1).any():
        tensors["rope_freqs.weight"] = factors
    for name, tensor in tensors.items():
        kind = FLOATS[model.dtype] if tensor.ndim > 1 else "F32"
        values = _arranged(name, tensor, shapes).float().numpy()
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        if layer := packed.get(name):
            codes, step_sizes, bits = _codes(layer, name, shapes)
            if block := block_type(codes, step_sizes, bits):
                kind, data = block, to_blocks(codes, step_sizes, block)
        target = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[kind])


def _codes(
    layer: PackedLayer, name: str, shapes: Sequence[_LayerShape]
) -> tuple[NDArray[np.int32], NDArray[np.float32], int]:
    """Integers, their step sizes by row, (out,), or by ggml's block, (out, blocks), and how many bits they have."""
    by_block, manifest = layer.block_step_sizes(), layer.manifest
    if by_block is not None and manifest.block_size % BLOCK == 0:  # a block is one or more of ggml's
        codes, bits = layer.dense_codes(), manifest.bits
        step_sizes = by_block.repeat_interleave(manifest.block_size // BLOCK, 1)[:, : -(-manifest.shape[1] // BLOCK)]
        step_sizes = step_sizes if "down_proj" in name else _arranged(name, step_sizes, shapes)
    else:
        codes, bits = layer.integers(), manifest.bits
        bits = bits if by_block is None else max(bits, KERNEL_BITS)  # code times multiplier
        step_sizes = _arranged(name, layer.step_sizes().reshape(-1).expand(manifest.shape[0]), shapes)
    return _arranged(name, codes, shapes).numpy(), step_sizes.numpy(), bits


def _arranged(name: str, tensor: Tensor, shapes: Sequence[_LayerShape]) -> Tensor:
    """A tensor of a layer, or its codes or step sizes, as they lie in llama.cpp.

    transformers rotates pairs of which one is in each half of a head, llama.cpp neighbours. Hidden units of zeros fill
    up the last block: silu(0) * 0 = 0 adds nothing.
    """
    if (match := ONE_PART.fullmatch(name)) is None:
        return tensor
    shape, part = shapes[int(match[1])], match[2]
    if part in ("q_proj", "k_proj"):
        (head_size,) = shape.head_sizes
        return tensor.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)
    if part in ("gate_proj", "up_proj"):
        return F.pad(tensor, (*(0, 0) * (tensor.ndim - 1), 0, shape.units - len(tensor)))
    if part == "down_proj" and tensor.ndim > 1:
        return F.pad(tensor, (0, shape.units - tensor.shape[1]))
    return tensor


def _frequency_factors(model: LlamaForCausalLM) -> Tensor:
    """What llama.cpp divides the rotation's frequencies by, float32 (head_size / 2,); 1 but for scaled rotations."""
    rotary = model.model.rotary_emb
    return rotary.compute_default_rope_parameters(model.config)[0] / rotary.inv_freq.float()
