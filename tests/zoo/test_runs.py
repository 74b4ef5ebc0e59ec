"""Short runs of architectures that do something of their own in training: what is saved is what was trained."""

import pytest
import torch

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model, set_backend_
from hf_geta.graph.tracing import float_tensors
from hf_geta.graph.trial import distance, run
from tests.zoo.cases import Case, build
from tests.zoo.inputs import make_inputs

CONFIG = GETAConfig(weight_bits=(4, 4), group_sparsity=0.3, initial_bits=8, pruning_periods=2)
STEPS = 40
ROUNDING = 1e-4  # of the scale, by sums in another order; weights rounded after training alone moved Mamba by 3e-2
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
def test_the_small_model_computes_what_the_trained_one_does_and_so_does_its_file(model_class, tmp_path):
    model = build(Case("", MODELS[model_class], model_class))
    inputs = make_inputs(model)
    dense = run(model, inputs)
    prepare_model(model, CONFIG, inputs)
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=1e-4), STEPS)
    model.train()
    for _ in range(STEPS):
        outputs = float_tensors(model(**inputs)).values()
        sum(y[y.isfinite()].square().mean() for y in outputs if y.requires_grad).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = run(model, inputs)
    assert distance(dense, trained) > 100 * ROUNDING
    small = finalize_model(model)
    set_backend_(small, "reference")
    assert distance(trained, run(small, inputs)) < ROUNDING
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    set_backend_(loaded, "reference")
    assert distance(run(small, inputs), run(loaded, inputs)) == 0
