"""Example inputs are what the forward takes."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_geta.graph.capture import capture
from hf_geta.graph.example_inputs import example_inputs

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
SPEECH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "pad_token_id": 0}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WAVES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "text": ("BertModel", TEXT, {"input_ids", "attention_mask"}),
    "few positions": ("GPT2Model", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}, {"input_ids"}),
    "two sequences": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
        {"input_ids", "decoder_input_ids"},
    ),
    "image": ("ViTModel", {**VISION, "image_size": 32, "patch_size": 8}, {"pixel_values"}),
    "gray image": (
        "ViTModel", {**VISION, "image_size": [32, 16], "patch_size": 8, "num_channels": 1}, {"pixel_values"},
    ),
    "video": (
        "VideoMAEModel",
        {**VISION, "image_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2},
        {"pixel_values"},
    ),
    "wave": (
        "Wav2Vec2ForCTC",
        {**WAVES, "conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        {"input_values"},
    ),
    "spectrogram": (
        "ASTModel", {**VISION, "max_length": 32, "num_mel_bins": 16, "patch_size": 8}, {"input_values"},
    ),
    "features": (
        "WhisperForConditionalGeneration",
        {**SPEECH, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "max_source_positions": 16, "num_mel_bins": 8, "decoder_start_token_id": 1},
        {"input_features", "decoder_input_ids"},
    ),
    "image and text": (
        "CLIPModel",
        {"text_config": {**TEXT, "eos_token_id": 3},
         "vision_config": {**VISION, "image_size": 32, "patch_size": 8}},
        {"input_ids", "pixel_values"},
    ),
}  # fmt: skip


def make_model(class_name: str, values: dict[str, Any], device: str) -> nn.Module:
    model_class = getattr(transformers, class_name)
    with torch.device(device):
        return model_class(model_class.config_class(**values)).to(device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_takes_them(case, device):
    class_name, values, names = CASES[case]
    model = make_model(class_name, values, device)
    inputs = example_inputs(model)
    assert names <= set(inputs)
    assert {tensor.device.type for tensor in inputs.values()} == {device}
    assert all(len(tensor) == 2 for tensor in inputs.values())
    capture(model, inputs)
    if device == "cpu":
        with torch.no_grad():
            assert model.eval()(**inputs)[0].isfinite().all()


def test_sizes_can_be_chosen():
    model = make_model("ResNetModel", {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}, "meta")
    assert example_inputs(model, batch=3, image_size=48)["pixel_values"].shape == (3, 3, 48, 48)
    model = make_model("BertModel", TEXT, "meta")
    assert example_inputs(model, batch=1, length=5)["input_ids"].shape == (1, 5)


def test_neither_random_numbers_nor_the_mode_of_the_model_change():
    model = make_model("VideoMAEModel", CASES["video"][1], "cpu").train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    example_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


class Robot(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, joints, torques=None):
        return joints


@pytest.mark.parametrize("config", [None, transformers.BertConfig()])
def test_what_cannot_be_made_is_for_the_user_to_give(config):
    with pytest.raises(ValueError, match=r"no example inputs for Robot.*build_qadg\(model, inputs\)"):
        example_inputs(Robot(config))


def test_a_missing_argument_is_named():
    model = make_model(
        "SegGptModel", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 24}, "meta"
    )
    with pytest.raises(ValueError, match="nothing to give for prompt_pixel_values, prompt_masks"):
        example_inputs(model)
