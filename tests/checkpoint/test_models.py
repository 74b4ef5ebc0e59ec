"""Models from a folder: with weights, and their skeletons."""

import json

import pytest
import torch
import transformers

import hf_geta.hf_quantizer  # noqa: F401  registers the loader
from hf_geta.checkpoint.models import build_skeleton, load_model
from hf_geta.checkpoint.prune import resize_

VALUES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VALUES |= {"image_size": 16, "patch_size": 8, "num_labels": 3}


@pytest.fixture
def folder(tmp_path):
    transformers.ViTForImageClassification(transformers.ViTConfig(**VALUES)).save_pretrained(tmp_path)
    return tmp_path


class TwoHeads(transformers.ViTPreTrainedModel):
    """A user's own model class, which transformers does not know."""

    def __init__(self, config):
        super().__init__(config)
        self.vit = transformers.ViTModel(config)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, size) for size in (3, 2))
        self.post_init()


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_a_skeleton_has_the_modules_of_the_model_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    model = build_skeleton(folder)
    assert type(model) is transformers.ViTForImageClassification
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert shapes(model) == shapes(transformers.ViTForImageClassification(transformers.ViTConfig(**VALUES)))


def test_the_skeleton_of_a_compressed_checkpoint_has_its_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    kept = {"vit.layers.0.mlp.fc1.weight": [5, 16], "vit.layers.0.mlp.fc1.bias": [5]}
    layer = {"bits": 4, "shape": [16, 5], "step_size": 0.1}
    config["quantization_config"] = {
        "quant_method": "geta", "format_version": 1, "shapes": kept, "attributes": {},
        "layers": {"vit.layers.0.mlp.fc2": layer},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    dense = transformers.ViTForImageClassification(transformers.ViTConfig(**VALUES))
    resize_(dense, {**kept, "vit.layers.0.mlp.fc2.weight": [16, 5]})
    assert shapes(build_skeleton(folder)) == shapes(dense)


@pytest.mark.parametrize(
    ("class_name", "built"),
    [(None, "ViTForImageClassification"), ("AutoModel", "ViTModel"), ("ViTModel", "ViTModel")],
)
def test_the_class_is_the_one_asked_for_else_that_of_the_config(folder, class_name, built):
    assert type(build_skeleton(folder, class_name)).__name__ == built
    assert type(load_model(folder, class_name)).__name__ == built


def test_weights_of_one_architecture_are_not_loaded_as_another(folder):
    with pytest.raises(ValueError, match="LlamaForCausalLM is a model of type llama.*of a vit model"):
        load_model(folder, "LlamaForCausalLM")


def test_a_part_of_a_model_is_loaded_from_the_whole(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = text | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path, "CLIPTextModel")) is transformers.CLIPTextModel


def test_a_config_without_a_class_builds_the_base_model(tmp_path):
    transformers.ViTConfig(**VALUES).save_pretrained(tmp_path)
    assert type(build_skeleton(tmp_path)).__name__ == "ViTModel"


def test_a_model_of_a_users_own_class_is_of_that_class_and_keeps_its_heads(tmp_path):
    model = TwoHeads(transformers.ViTConfig(**VALUES))
    model.save_pretrained(tmp_path)
    assert shapes(build_skeleton(tmp_path)) == shapes(model)
    loaded = load_model(tmp_path)
    assert type(loaded) is TwoHeads
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["NeverImported", "OtherFamily"])
def test_a_model_whose_class_is_not_imported_is_refused_and_not_built_without_its_head(name, folder):
    class OtherFamily(transformers.BertPreTrainedModel):  # the same name, but no model of this config
        pass

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    for load in (build_skeleton, load_model):
        with pytest.raises(ValueError, match=f"saved from the class {name}.*import the module that defines it"):
            load(folder)
    assert type(build_skeleton(folder, "AutoModel")) is transformers.ViTModel


def test_a_loaded_model_has_its_weights(folder):
    model = load_model(folder)
    again = transformers.ViTForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("Nonsense", "no model class Nonsense"),
        ("nn", "no model class nn"),
        ("AutoModelForCausalLM", "cannot be built as"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(folder, class_name, message):
    with pytest.raises(ValueError, match=message):
        build_skeleton(folder, class_name)


def test_what_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="no such folder"):
        build_skeleton(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        build_skeleton(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no config of a model"):
        build_skeleton(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(folder)
