"""Laws of multiple choice: a choice scores the sum of its tokens' log-probabilities, whatever it is batched with."""

import json

import pytest
import torch
from multiple_choice import Question, evaluate_multiple_choice, load_questions, log_likelihoods
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

WORDS = ["<unk>", "q", "a", "bb", "ccc"]
# p(next | last word), so that every likelihood can be written down.
TABLE = torch.tensor(
    [[0.2] * 5, [0.1, 0.1, 0.5, 0.2, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.1, 0.6, 0.1], [0.2] * 5]
)


class Bigram(nn.Module):
    """A language model that remembers one word."""

    device = torch.device("cpu")

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=TABLE.log()[input_ids])


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_scores_are_those_computed_by_hand():
    # From "q": p(a) = .5, p(bb bb) = .2 * .6 = .12. Per character: ln .5 / 1 = -.69, ln .12 / 5 = -.42.
    questions = [Question("q", ["a", "bb bb"], 0), Question("q", ["a", "bb bb"], 1), Question("q", ["a", "ccc"], 0)]
    # p(ccc) = .1: ln .1 / 3 = -.77, so "a" wins the last one either way.
    result = evaluate_multiple_choice(Bigram(), tokenizer(), questions, prompt="{question}")
    assert result == {"accuracy": pytest.approx(2 / 3), "accuracy_norm": pytest.approx(2 / 3)}
    first, second = (
        evaluate_multiple_choice(Bigram(), tokenizer(), [each], prompt="{question}") for each in questions[:2]
    )
    assert (first, second) == ({"accuracy": 1, "accuracy_norm": 0}, {"accuracy": 0, "accuracy_norm": 1})


def test_a_likelihood_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    pairs = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [1, 2, 3, 4, 5])]
    batched, alone = log_likelihoods(model, pairs, 3), log_likelihoods(model, pairs, 1)
    assert batched == pytest.approx(alone, rel=1e-5)
    loss = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), labels=torch.tensor([[-100, -100, -100, 4, 5]])).loss
    assert alone[0] == pytest.approx(-2 * loss.item(), rel=1e-5)


def test_a_line_that_is_no_question_is_named(tmp_path):
    good = {"question": "q", "choices": ["a", "bb"], "answer": 1}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"answer": 2}) + "\n")
    assert load_questions(path, limit=1) == [Question("q", ["a", "bb"], 1)]
    with pytest.raises(ValueError, match="line 2"):
        load_questions(path)
    with pytest.raises(ValueError, match="no question"):
        evaluate_multiple_choice(Bigram(), tokenizer(), [])
