"""Laws of question answering: what a window hides, another shows; answers come back from their own logits."""

import itertools
import shutil

import datasets
import evaluate
import numpy as np
import pytest
from questions import OUTSIDE, QuestionArguments, answer_tokens, best_spans, load_tokenizer, ranked_answers, windows_of
from run_question_answering import METRICS, score_answers
from transformers import AutoTokenizer

CONTEXT = "a b c d e f g h i j k l m n o p q r s t u v w x y z ."
LOW, HIGH = -5.0, 5.0


def example(answer, number=0, context=CONTEXT):
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"id": str(number), "question": "where is it ?", "context": context, "answers": found}


def table(*answers):
    return datasets.Dataset.from_list([example(answer, i) for i, answer in enumerate(answers)], features=FEATURES)


FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "question", "context")}
    | {
        "answers": {
            "text": datasets.List(datasets.Value("string")),
            "answer_start": datasets.List(datasets.Value("int64")),
        }
    }
)
SETTINGS = {"data_dir": "-", "max_length": 16, "doc_stride": 3, "max_question_length": 6}


def own_logits(windows, padding=0):
    """Logits that point at each window's labels, as long as the window and its padding."""
    for window in windows:
        length = len(window["input_ids"])
        logits = np.full((2, length + padding), LOW, dtype=np.float32)
        logits[:, length:] = 100  # padding must not win
        logits[0, window["start_positions"]] = logits[1, window["end_positions"]] = HIGH
        yield tuple(logits)


ANSWERS = ["a", "z .", "b c", "f g h", "h i j", "m n o", "x y z"]


def test_an_answer_comes_back_from_its_own_logits_across_windows(word_tokenizer):
    arguments, examples = QuestionArguments(**SETTINGS), table(*ANSWERS)
    windows = windows_of(examples, word_tokenizer, arguments)
    assert len(windows) > 2 * len(examples)
    found = ranked_answers(list(own_logits(windows, padding=3)), windows, examples, arguments)
    assert [found[str(i)][0]["text"] for i in range(len(ANSWERS))] == ANSWERS
    assert score_answers(found, examples) == {"exact_match": 100, "f1": 100}


def test_windows_cover_the_context_and_share_the_stride(word_tokenizer):
    arguments = QuestionArguments(**SETTINGS)
    windows = windows_of(table("a"), word_tokenizer, arguments)
    characters = [
        [range(start, end) for start, end in zip(w["offset_start"], w["offset_end"]) if start != OUTSIDE]
        for w in windows
    ]
    assert {i for window in characters for token in window for i in token} >= {
        i for i, letter in enumerate(CONTEXT) if letter != " "
    }
    for before, after in itertools.pairwise(characters):
        assert len(set(before) & set(after)) == arguments.doc_stride
    assert max(len(window["input_ids"]) for window in windows) == arguments.max_length


def test_labels_point_at_the_answer_or_at_the_first_token(word_tokenizer):
    for window in windows_of(table("f g", None), word_tokenizer, QuestionArguments(**SETTINGS)):
        start, end = window["start_positions"], window["end_positions"]
        text = CONTEXT[max(window["offset_start"][start], 0) : max(window["offset_end"][end], 0)]
        assert (text == "f g") or (start, end, text) == (0, 0, "")


def test_an_answer_inside_a_token_is_that_token():
    starts, ends = [OUTSIDE, 0, 4, 8], [OUTSIDE, 3, 7, 11]
    assert answer_tokens(starts, ends, {"text": ["b"], "answer_start": [5]}) == (2, 2)
    assert answer_tokens(starts, ends, {"text": ["beyond"], "answer_start": [9]}) == (0, 0)


def test_the_best_spans_are_those_of_a_search_over_all():
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 12))
    window = {
        "offset_start": [OUTSIDE] * 3 + [*range(8)] + [OUTSIDE],
        "offset_end": [OUTSIDE] * 3 + [*range(1, 9)] + [OUTSIDE],
    }
    pairs = [(i, j) for i in range(3, 11) for j in range(i, min(i + 4, 11))]
    expected = sorted(((start[i] + end[j], i - 3, j - 2) for i, j in pairs), reverse=True)
    np.testing.assert_allclose(best_spans(start, end, window, max_answer_length=4, count=5), expected[:5])
    assert len(best_spans(start, end, window, max_answer_length=4, count=100)) == len(pairs)


def test_no_answer_is_given_where_the_first_token_beats_the_best_by_the_threshold(word_tokenizer):
    examples = table(None)
    windows = windows_of(examples, word_tokenizer, QuestionArguments(**SETTINGS))
    logits = list(own_logits(windows))  # every window points at its first token

    def best(**changes):
        found = ranked_answers(logits, windows, examples, QuestionArguments(**SETTINGS, **changes))
        return found["0"][0]["text"]

    assert best(version_2_with_negative=True) == ""
    assert best(version_2_with_negative=True, null_score_diff_threshold=2 * (HIGH - LOW) + 1) != ""
    assert best() != ""


def test_an_empty_context_has_no_answer(word_tokenizer):
    rows = datasets.Dataset.from_list([example(None, context="")], features=FEATURES)
    windows = windows_of(rows, word_tokenizer, QuestionArguments(**SETTINGS))
    found = ranked_answers(list(own_logits(windows)), windows, rows, QuestionArguments(**SETTINGS))
    assert found == {"0": []}
    assert score_answers(found, rows)["exact_match"] == 100


def test_padding_never_moves_the_positions_of_answers(encoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path, dirs_exist_ok=True)
    AutoTokenizer.from_pretrained(tmp_path, padding_side="left").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).padding_side == "right"


def test_long_questions_are_cut_and_windows_without_room_refused(word_tokenizer):
    rows = datasets.Dataset.from_list([example("d e") | {"question": "what is " * 50}], features=FEATURES)
    windows = windows_of(rows, word_tokenizer, QuestionArguments(**SETTINGS))
    assert max(len(window["input_ids"]) for window in windows) == SETTINGS["max_length"]
    with pytest.raises(ValueError, match="doc_stride=7: a window has room for 7 tokens"):
        windows_of(rows, word_tokenizer, QuestionArguments(**SETTINGS | {"doc_stride": 7}))


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 100, 100),  # case, articles and punctuation do not count
        ("in Paris", ["Paris"], 0, 100 * 2 / 3),  # precision 1/2, recall 1
        ("Paris", ["London", "in Paris"], 0, 100 * 2 / 3),  # the best of the answers
        ("a b b", ["b b c"], 0, 100 * 4 / 5),  # words as bags; "a" is an article
        ("", [], 100, 100),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
    ],
)
def test_exact_match_and_f1_are_those_of_squad(text, answers, exact, f1):
    metric = evaluate.load(str(METRICS / "squad" / "squad.py"))
    references = [{"id": "0", "answers": {"text": answers, "answer_start": [0] * len(answers)}}]
    scores = metric.compute(predictions=[{"id": "0", "prediction_text": text}], references=references)
    assert scores == pytest.approx({"exact_match": exact, "f1": f1})
