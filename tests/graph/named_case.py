"""What a case of a named family is: a tiny model, inputs for it, and the axes expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model class, the values of its config, inputs, and the axes expected: kind -> sizes in order."""

    model: str
    values: dict[str, Any]
    inputs: Inputs
    axes: dict[str, list[int]]

    def build(self) -> nn.Module:
        """The model in eval mode."""
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(**self.values)).eval()


def waves(*shape: int) -> Tensor:
    """A signal of the given shape in which no two windows are alike."""
    count = torch.Size(shape).numel()
    return torch.linspace(0, count**0.5, count).sin().view(shape)


TOKENS = torch.arange(3, 17).view(2, 7)
TEXT: Inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
SENTENCES: Inputs = {"input_ids": torch.cat((TOKENS, torch.full((2, 1), 2)), 1)}  # with an end
SEQUENCES: Inputs = {**TEXT, "decoder_input_ids": TOKENS[:, :5]}
CHOICES: Inputs = {name: tensor.view(2, 1, 7).repeat(1, 3, 1) for name, tensor in TEXT.items()}
IMAGES: Inputs = {"pixel_values": waves(2, 3, 32, 32)}
LARGE_IMAGES: Inputs = {"pixel_values": waves(2, 3, 64, 64)}
POINTS: Inputs = {**LARGE_IMAGES, "input_points": torch.tensor([[[[10.0, 20.0]]], [[[30.0, 5.0]]]])}
SOUND: Inputs = {"input_values": waves(2, 800)}
SPECTRA: Inputs = {"input_features": waves(2, 8, 20), "decoder_input_ids": TOKENS[:, :5]}

HIDDEN = {"mlp": [24, 24]}
HEADS = {"attention_head": [4, 4], **HIDDEN}
GROUPS = {"kv_group": [2, 2], **HIDDEN}

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LANGUAGE = {**SMALL, **SPECIAL, "vocab_size": 50, "max_position_embeddings": 16}
