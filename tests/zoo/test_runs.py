"""Short runs of architectures that do something of their own in training; `scripts/zoo.py --law` takes all of them."""

import pytest

from tests.zoo.cases import Case, run_case

MODELS = {
    "GroupViTModel": "groupvit",  # writes into what a layer returns
    "MambaForCausalLM": "mamba",  # multiplies by the weight of a layer that it does not call
    "Gemma3nForCausalLM": "gemma3n_text",  # so in train mode only
    "DeepseekV4ForCausalLM": "deepseek_v4",  # has linear layers of several groups
    "Llama4ForCausalLM": "llama4_text",  # has a router that is a linear layer, and returns more
    "DiffusionGemmaForBlockDiffusion": "diffusion_gemma",  # ties the experts of its encoder and its decoder
    "GradiumPhononTTSForConditionalGeneration": "gradium_phonon_tts",  # hands a layer one vector
    "Mask2FormerForUniversalSegmentation": "mask2former",  # calls layers by a list of its own
    "Qwen3NextForCausalLM": "qwen3_next",
    "DetrForObjectDetection": "detr",
    "WhisperForConditionalGeneration": "whisper",
}


@pytest.mark.parametrize("model_class", MODELS)
def test_the_small_model_computes_what_the_trained_one_does_and_so_does_its_file(model_class):
    record = run_case(Case("", MODELS[model_class], model_class), "training")
    assert record.lawful, f"{record.stage}: {record.reason}"
