"""Compressed checkpoints in use, as a program in a process of its own: `use_checkpoints.py FOLDER`.

The folders `language`, `texts` and `images` in FOLDER were written by `test_loading.py`, with the logits that are due.
"""

import filecmp
import logging
import pickle
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)

import hf_geta  # all that it takes

KINDS = {
    "language": AutoModelForCausalLM,
    "texts": AutoModelForSequenceClassification,
    "images": AutoModelForImageClassification,
}
GENERATE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def use_language_model(folder):
    """Key-value groups of another number in every layer, tied embeddings."""
    ids, expected = torch.load(folder / "due.pt")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    groups = [layer.self_attn.k_proj.weight.shape[0] for layer in plain.model.layers]
    assert len(set(groups)) == len(groups) == 3
    assert torch.equal(plain(ids).logits, expected)
    text = plain.generate(ids, **GENERATE)
    for options in ({"attn_implementation": "eager"}, {"device_map": "auto"}, {"dtype": "auto"}, {"dtype": "float32"}):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)  # eager sums in another order
        for cache in ("dynamic", "static"):
            assert torch.equal(model.generate(ids, cache_implementation=cache, **GENERATE), text)
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert small(ids).logits.dtype == torch.bfloat16
    assert small.generate(ids, **GENERATE).shape == text.shape
    compiled = torch.compile(plain, backend="eager", fullgraph=True)  # the tracing, without a compiler
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert pipeline("text-generation", model=str(folder))("the cat", max_new_tokens=3)[0]["generated_text"]


@torch.no_grad()
def use_classifiers(folder):
    ids, expected = torch.load(folder / "texts" / "due.pt")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "texts")
    assert torch.equal(model(ids).logits, expected)
    scores = pipeline("text-classification", model=str(folder / "texts"))("the cat sat", top_k=None)
    assert len(scores) == expected.shape[1]
    pixels, expected = torch.load(folder / "images" / "due.pt")
    model = AutoModelForImageClassification.from_pretrained(folder / "images")
    assert torch.equal(model(pixels).logits, expected)
    classify = pipeline("image-classification", model=str(folder / "images"), dtype="auto")
    assert len(classify(Image.new("RGB", (16, 16)))) == expected.shape[1]
    # What needs no tensor of the head says so, in transformers' words, as for any checkpoint.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert torch.isfinite(AutoModel.from_pretrained(folder / "texts")(ids).last_hidden_state).all()


def use_in_every_way(model_class, folder, scratch):
    """What holds of any kind of model; its float form trains, with and without another compression."""
    inputs, expected = torch.load(folder / "due.pt")
    model = model_class.from_pretrained(folder)
    pickle.loads(pickle.dumps(model)).save_pretrained(scratch / "again")
    names = [path.name for path in (scratch / "again").iterdir()]
    assert filecmp.cmpfiles(folder, scratch / "again", names, shallow=False) == (names, [], [])
    model.save_pretrained(scratch / "shards", max_shard_size="4KB")
    assert len(list((scratch / "shards").glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(model_class.from_pretrained(scratch / "shards")(inputs).logits, expected)
        for attention in ("sdpa", "eager"):
            logits = model_class.from_pretrained(folder, attn_implementation=attention)(inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # sums in another order
        half = model_class.from_pretrained(folder, dtype=torch.bfloat16)
        logits = half(inputs if inputs.dtype == torch.int64 else inputs.bfloat16()).logits
        assert (logits.float() - expected).norm() < 0.1 * expected.norm()  # 8 bits of mantissa
    empty = model_class.from_pretrained(folder, device_map="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    floats = model.dequantize()
    optimizer = torch.optim.SGD(floats.parameters(), lr=0.1)
    floats(inputs).logits.square().mean().backward()
    optimizer.step()
    again = hf_geta.prepare_model(floats, hf_geta.GETAConfig(group_sparsity=0.2), {floats.main_input_name: inputs})
    again(inputs).logits.square().mean().backward()
    hf_geta.finalize_model(again).save_pretrained(scratch / "twice")
    assert torch.isfinite(model_class.from_pretrained(scratch / "twice")(inputs).logits).all()


def main(folder):
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    warnings.simplefilter("error", UserWarning)
    use_language_model(folder / "language")
    use_classifiers(folder)
    for name, model_class in KINDS.items():
        use_in_every_way(model_class, folder / name, folder / "scratch" / name)
    assert not warned, warned


if __name__ == "__main__":
    main(Path(sys.argv[1]))
