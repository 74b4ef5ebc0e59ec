"""Blocks as training might leave them."""

import torch

from hf_geta.quantization.blocks import MULTIPLIERS, multiplier_unit


def draw_multipliers_(layer, bits, seed=0):
    """Any multipliers that a layer of this width can have; nothing where it has no blocks."""
    if (blocks := layer.weight_quantizer.blocks) is not None:
        unit = multiplier_unit(bits)
        generator = torch.Generator().manual_seed(seed)
        shape = blocks.multipliers.shape
        blocks.multipliers.copy_(torch.randint(1, MULTIPLIERS // unit + 1, shape, generator=generator) * unit)
