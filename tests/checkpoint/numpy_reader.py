"""The format as its page describes it, read with json, struct and numpy alone, without hf_geta, torch, safetensors."""

import json
import struct
from pathlib import Path

import numpy as np


def read_weights(folder):
    """Name of a packed layer -> its weight, float32, of every layer in a checkpoint's folder."""
    layers = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["layers"]
    tensors = read_tensors(Path(folder))
    weights = {}
    for name, layer in layers.items():
        owner = layer.get("shared_with", name)
        integers = decode(tensors[f"{owner}.weight"], layer["bits"], layer["shape"])
        if layer.get("granularity", "tensor") == "tensor":
            step_size = np.float32(layers[owner]["step_size"])
        else:
            along = [-1 if dim == layer.get("channel_dim", 0) else 1 for dim in range(len(layer["shape"]))]
            step_size = tensors[f"{owner}.step_size"].view("<f4").reshape(along)
        if layer.get("granularity") == "block":
            integers *= multipliers(tensors[f"{owner}.block_multipliers"], layer)
        weights[name] = step_size * integers.astype(np.float32)
    return weights


def read_tensors(folder):
    """Name -> bytes of every tensor of model.safetensors, or of its shards."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        for name in header.keys() - {"__metadata__"}:
            start, end = header[name]["data_offsets"]
            tensors[name] = np.frombuffer(content[8 + length + start : 8 + length + end], np.uint8)
    return tensors


def multipliers(stream, layer):
    """Numbers of 4 bits, one less than the multiplier of a block of a channel, for every entry of a matrix."""
    shape, inputs, block_size = layer["shape"], 1 - layer.get("channel_dim", 0), layer.get("block_size", 32)
    blocks = [-(-size // block_size) if dim == inputs else size for dim, size in enumerate(shape)]
    numbers = (decode(stream, 4, blocks) & 15) + 1
    return np.repeat(numbers, block_size, axis=inputs)[: shape[0], : shape[1]]


def decode(stream, bits, shape):
    """Two's complement codes of `bits` bits each, the lowest bit of the stream first."""
    digits = np.unpackbits(stream, count=bits * np.prod(shape), bitorder="little").reshape(-1, bits)
    values = digits @ (1 << np.arange(bits))
    return np.where(digits[:, -1] == 1, values - (1 << bits), values).reshape(shape)
