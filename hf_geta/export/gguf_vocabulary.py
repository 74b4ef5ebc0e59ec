"""A tokenizer as GGUF has it. llama.cpp splits text by rules that it knows by name, not by the tokenizer's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf

logger = logging.getLogger(__name__)

LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name -> what a tokenizer.json of the kind does, in order.
SPLITS: dict[str, list[tuple[Any, ...]]] = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", LLAMA3_WORDS + LLAMA3_OTHERS), ("ByteLevel", False)],
}


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """The tokens, merges, special tokens and chat template of the tokenizer in `folder`, filled up to `size` tokens.

    Where there is none, or llama.cpp has no name for how it splits text, the file takes token ids only.

    Raises:
        ValueError: if it has a token that the model has no row for.
    """
    import gguf

    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if tokenizer is None or (split := _split(tokenizer)) is None:
        why = "there is no tokenizer.json" if tokenizer is None else "llama.cpp has no name for how it splits text"
        logger.warning("No tokenizer is in the GGUF file, which takes token ids only: %s.", why)
        writer.add_tokenizer_model("no_vocab")
        return
    last = max(
        [*tokenizer["model"]["vocab"].values(), *(added["id"] for added in tokenizer["added_tokens"])], default=-1
    )
    if last >= size:
        raise ValueError(
            f"tokenizer.json has a token {last}, and the model's vocab_size={size} no row for it: give the tokenizer "
            "that belongs to the model, or resize_token_embeddings before training."
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        special = added["special"]
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _split(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how this tokenizer splits text; None where there is none."""
    model, before = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or tokenizer.get("normalizer"):
        return None
    steps = [_step(one) for one in before.get("pretokenizers", [before])]
    name = next((name for name, known in SPLITS.items() if steps == known), None)
    return name if bool(model.get("ignore_merges")) == (name == "llama-bpe") else None


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "Split":
        return (kind, step.get("pattern", {}).get("Regex")) if step.get("behavior") == "Isolated" else (kind, None)
    value = {"ByteLevel": step.get("use_regex", True), "Digits": step.get("individual_digits")}.get(str(kind))
    return (kind, None) if step.get("add_prefix_space") else (kind, value)
