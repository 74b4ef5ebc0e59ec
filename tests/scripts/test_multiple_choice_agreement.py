"""Multiple choice by lm-evaluation-harness and by our script: the same likelihoods, the same accuracies.

Needs `pip install lm-eval` (0.4.13 was compared), which is not in the extra `test`: without it the test is skipped.
"""

import json

import pytest
import torch
from multiple_choice import PROMPT, evaluate_multiple_choice, likelihoods_of_choices, load_questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_geta import GETAConfig, finalize_model, prepare_model

lm_eval = pytest.importorskip("lm_eval")
ROWS = [
    {"question": "How is water boiled?", "choices": ["In a kettle.", "In a  sieve, on ice"], "answer": 0},
    {"question": "Où est l'été?", "choices": ["après le printemps", "hier"], "answer": 1},
    {"question": "Where is a kettle? ", "choices": ["on", "in a kettle of water on a kettle", "ice"], "answer": 2},
    {"question": "What floats on water?", "choices": ["ice", "a kettle"], "answer": 0},
]


@pytest.fixture(scope="module", params=["", "<s>"], ids=["no first token", "a first token"])
def tokenizer(request):
    """Pairs of bytes that are frequent in the rows, as GPT-2, Llama 3 and SmolLM2 cut their texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [" ".join([row["question"], *row["choices"]]) for row in ROWS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    if request.param:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["dense", "packed"])
def model(request, tmp_path_factory):
    """A Llama as it was made, or pruned, quantized and loaded from disk."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    if request.param == "dense":
        return model
    config = GETAConfig(weight_bits=[4, 4], activation_bits=[8, 8], granularity="block", quantize_embeddings=8)
    prepare_model(model, config, {"input_ids": torch.randint(320, (2, 32))})
    qadg = model.geta.qadg
    qadg.zero_(model, {axis.name: [0] for axis in qadg.axes})
    folder = tmp_path_factory.mktemp("packed")
    finalize_model(model).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def harness(model, tokenizer, path, prompt):
    """(log-likelihoods of each question's choices, acc, acc_norm), by lm-evaluation-harness alone."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    task = ConfigurableTask(
        config={
            "task": "choices",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(path)}},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": prompt.replace("{question}", "{{question}}"),
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
        }
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    result = lm_eval.evaluate(lm=lm, task_dict={"choices": task}, bootstrap_iters=0)
    samples = sorted(result["samples"]["choices"], key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    measured = result["results"]["choices"]
    return scores, measured["acc,none"], measured["acc_norm,none"]


@pytest.mark.parametrize("prompt", [PROMPT, "{question} "])
def test_choices_score_as_in_lm_evaluation_harness(model, tokenizer, prompt, tmp_path):
    path = tmp_path / "validation.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    questions = load_questions(path)
    expected, accuracy, accuracy_norm = harness(model, tokenizer, path, prompt)
    ours = likelihoods_of_choices(model, tokenizer, questions, prompt, batch_size=4)
    for scores, theirs in zip(ours, expected, strict=True):
        assert scores == pytest.approx(theirs, rel=1e-5)  # batches of other lengths sum in another order
    result = evaluate_multiple_choice(model, tokenizer, questions, prompt)
    assert result == {"accuracy": accuracy, "accuracy_norm": accuracy_norm}
