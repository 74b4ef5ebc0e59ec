"""Compressed checkpoints in use, as a program in a process of its own: `use_checkpoints.py FOLDER`.

The folders `language`, `texts` and `images` in FOLDER were written by `test_loading.py`, with the logits that are due.
"""

import logging
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

import hf_geta  # noqa: F401  all that it takes

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


def main(folder):
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    warnings.simplefilter("error", UserWarning)
    use_language_model(folder / "language")
    use_classifiers(folder)
    assert not warned, warned


if __name__ == "__main__":
    main(Path(sys.argv[1]))
