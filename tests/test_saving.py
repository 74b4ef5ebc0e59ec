"""A compressed model saves to the bytes that it was loaded from, however it was saved."""

import pytest
import torch

from tests.test_hf_quantizer import build, load, logits, pack_, prune_, same_files

SHARDS = {"max_shard_size": "3KB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("options", [{}, SHARDS, {"variant": "w4"}, {**SHARDS, "variant": "w4"}])
def test_saved_again_it_is_the_same_bytes(dtype, granularity, options, tmp_path):
    model, inputs = build("llama, tied")
    prune_(model, "llama, tied")
    pack_(model, granularity, 8).to(dtype).save_pretrained(tmp_path / "saved", **options)
    variant = {"variant": options["variant"]} if "variant" in options else {}
    loaded = load(model, tmp_path / "saved", **variant)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    loaded.save_pretrained(tmp_path / "again", **options)
    assert same_files(tmp_path / "saved", tmp_path / "again")
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == ("max_shard_size" in options)


@pytest.mark.parametrize("kind", ["pruned", "packed"])
def test_the_state_that_trainers_hand_over_is_what_is_saved(kind, tmp_path):
    model, _ = build("vit")
    prune_(model, "vit")
    if kind == "packed":
        pack_(model)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    loaded = load(model, tmp_path / "own")
    loaded.save_pretrained(tmp_path / "loaded", state_dict=loaded.state_dict())
    assert same_files(tmp_path / "own", tmp_path / "given")
    assert same_files(tmp_path / "own", tmp_path / "loaded")


def test_a_later_save_into_the_same_folder_is_the_one_that_loads(tmp_path):
    first, inputs = build("llama")
    pack_(first).save_pretrained(tmp_path, **SHARDS)
    second, _ = build("llama")
    prune_(second, "llama")
    pack_(second, "channel").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(load(second, tmp_path), inputs), logits(second, inputs))
    first.save_pretrained(tmp_path, **SHARDS)
    (tmp_path / "model.safetensors").unlink(
        missing_ok=True
    )  # transformers removes shards only, and prefers a whole file
    assert torch.equal(logits(load(first, tmp_path), inputs), logits(first, inputs))


@pytest.mark.parametrize("packed", ["just packed", "loaded"])
def test_a_model_with_a_replaced_layer_is_not_saved_and_nothing_is_written(packed, tmp_path):
    model = pack_(build("llama")[0], modules_to_not_convert=())
    if packed == "loaded":
        model.save_pretrained(tmp_path / "first")
        model = load(model, tmp_path / "first")
    model.resize_token_embeddings(70)  # its output layer is a new one
    with pytest.raises(ValueError, match=r"lm_head was replaced.*Call model\.dequantize\(\)"):
        model.save_pretrained(tmp_path / "resized")
    assert not (tmp_path / "resized").exists()


def test_in_float_a_layer_may_be_replaced(tmp_path):
    model, inputs = build("llama")
    pack_(model, modules_to_not_convert=()).save_pretrained(tmp_path / "packed")
    loaded = load(model, tmp_path / "packed")
    loaded.resize_token_embeddings(70)
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "resized")
    assert torch.equal(logits(load(loaded, tmp_path / "resized"), inputs), logits(loaded, inputs))
