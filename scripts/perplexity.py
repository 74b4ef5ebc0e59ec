"""How well a language model predicts the next token: perplexity on blocks of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def evaluate_perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """{"perplexity": exp of the mean of -ln p(token | those before it in its block)}, over all but first tokens.

    Args:
        batches: mappings with `input_ids`, (batch, block size).

    Raises:
        ValueError: without any batch.
    """
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="Perplexity"):
        ids = batch["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        for row, targets in zip(logits, ids[:, 1:]):  # one block at a time: the float32 logits are the largest tensor
            total += float(torch.nn.functional.cross_entropy(row.float(), targets, reduction="sum"))
        count += ids[:, 1:].numel()
    if not count:
        raise ValueError("no block to evaluate on: the evaluation texts are shorter than block_size.")
    return {"perplexity": math.exp(min(total / count, 700.0))}  # beyond, a float cannot say it
