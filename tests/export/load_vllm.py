"""Run by an interpreter that has vLLM, without hf_geta: what it makes of exported folders.

python load_vllm.py ROOT    ROOT/NAME/{exported/, inputs.pt, dtype.txt} -> ROOT/NAME/log_probabilities.pt
"""

import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams


def log_probabilities(folder):
    """Of each token of the inputs after the first, given those before it: (texts, tokens - 1)."""
    texts = torch.load(folder / "inputs.pt")["input_ids"].tolist()
    llm = LLM(
        model=str(folder / "exported"),
        dtype=(folder / "dtype.txt").read_text(),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        kv_cache_memory_bytes=2**26,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
    return torch.tensor(
        [
            [of[token].logprob for token, of in zip(text[1:], output.prompt_logprobs[1:], strict=True)]
            for text, output in zip(texts, outputs, strict=True)
        ]
    )


if __name__ == "__main__":
    for place in sorted(Path(sys.argv[1]).iterdir()):
        torch.save(log_probabilities(place), place / "log_probabilities.pt")
