"""What several test files need: a compressed model in a folder, with its report, made without training."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.measure import compression_report
from hf_geta.report import save_report

SETTINGS = GETAConfig(group_sparsity=0.2, weight_bits=(4, 8), activation_bits=(6, 8))
REMOVED = {"vit.layers.0.attention.heads": [1], "vit.layers.1.mlp.hidden": [0, 5, 9]}


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` imports no other file: a machine with a device may lack the packages of the others."""
    is_other = collection_path.parent == Path(__file__).parent and collection_path.name != "test_devices.py"
    return (is_other and config.option.markexpr == "gpu") or None


@pytest.fixture
def own_compiler_settings(monkeypatch):
    """Takes back what TrainingArguments with `torch_compile` leave in the environment for accelerate below 1.2."""
    for variable in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{variable}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{variable}")


@pytest.fixture(scope="session")
def compressed_folder(tmp_path_factory):
    """Read only: copy it before you change it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=2)
    model = ViTForImageClassification(config).eval()
    prepare_model(model, SETTINGS, {"pixel_values": torch.randn(2, 1, 8, 8)})
    model.geta.qadg.zero_(model, REMOVED)
    folder = tmp_path_factory.mktemp("compressed") / "model"
    finalize_model(model).save_pretrained(folder)
    save_report(folder, compression_report(model))
    return folder
