"""Laws of the text data: labels and columns are found, whatever they are called and wherever they lie."""

import json

import datasets
import pytest
from splits import load_rows
from texts import TextArguments, load_texts

ROWS = [{"question": f"{word} ?", "passage": f"{word} is good .", "answer": word < "d"} for word in "abcdefgh"]


def write(folder, rows, ending="jsonl"):
    for split in ("train", "validation"):
        table = datasets.Dataset.from_list(rows)
        {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[ending](f"{folder}/{split}.{ending}")
    return str(folder)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_pairs_of_texts_and_their_classes_are_found(tmp_path, word_tokenizer, ending):
    arguments = TextArguments(data_dir=write(tmp_path, ROWS, ending), label_column="answer")
    texts = load_texts(arguments).tokenized(word_tokenizer, 8)
    assert texts.columns == ["question", "passage"]
    assert texts.names == ["False", "True"]
    assert texts.train["labels"][:] == [int(row["answer"]) for row in ROWS]
    first = texts.evaluation[0]
    tokens = word_tokenizer.convert_ids_to_tokens(first["input_ids"])
    assert " ".join(tokens) == "[CLS] a ? [SEP] a is good [SEP]"
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_streamed_texts_are_the_same_texts(tmp_path, word_tokenizer):
    folder = write(tmp_path, ROWS)
    settings = {"data_dir": folder, "label_column": "answer", "text_columns": ["passage"]}

    def load(streaming):
        arguments = TextArguments(**settings, streaming=streaming)
        return load_texts(arguments).tokenized(word_tokenizer, 8)

    stream, table = load(True), load(False)
    assert isinstance(stream.train, datasets.IterableDataset)
    for found, expected in ((stream.train, table.train), (stream.evaluation, table.evaluation)):
        assert sorted(found, key=str) == sorted(expected, key=str)
    assert list(stream.train) != list(table.train)  # shuffled: files are often sorted by class
    assert stream.names == table.names


def test_numbers_and_names_are_classes_in_their_order(tmp_path):
    rows = [{"text": "a", "label": label} for label in (5, 1, 3, 1)]
    texts = load_texts(TextArguments(data_dir=write(tmp_path, rows)))
    assert (texts.names, texts.train["labels"][:]) == (["1", "3", "5"], [2, 0, 1, 0])


def test_a_test_split_stands_in_where_no_validation_is(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-00000.jsonl").write_text(json.dumps({"text": split, "label": 0}) + "\n")
    _, evaluation = load_rows(TextArguments(data_dir=str(tmp_path)))
    assert evaluation[0]["text"] == "test"
    (tmp_path / "test-00000.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="splits .*other.*: a train split and one of validation, .* are needed, or"):
        load_rows(TextArguments(data_dir=str(tmp_path)))


def test_of_a_train_split_alone_a_share_is_evaluated_the_same_whoever_asks(tmp_path):
    rows = [{"text": str(i), "label": i % 2} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = TextArguments(data_dir=str(tmp_path), validation_split_percentage=25)
    train, evaluation = load_rows(arguments)
    assert (len(train), len(evaluation)) == (30, 10)
    assert sorted([*train["text"], *evaluation["text"]]) == sorted(row["text"] for row in rows)
    claimed = arguments.claim("text-classification", "accuracy", 10)["evaluation"]
    assert claimed["validation_split_percentage"] == 25
    arguments.trains = False  # as who measures again
    assert load_rows(arguments)[1]["text"] == evaluation["text"]
    with pytest.raises(ValueError, match="a stream has them one by one"):
        load_rows(arguments, streaming=True)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": "a", "label": 0.5}, {}, "are no classes: write label_column"),
        ({"text": "a", "gold": 1}, {}, "no column label; there are: text, gold"),
        ({"text": "a", "label": 1}, {"text_columns": ["sentence"]}, "no column sentence"),
        ({"a": "a", "b": "b", "c": "c", "label": 1}, {}, "write text_columns"),
        ({"label": 1}, {}, "write text_columns"),
    ],
)
def test_what_cannot_be_classified_is_said(tmp_path, row, changes, message):
    with pytest.raises(ValueError, match=message):
        load_texts(TextArguments(data_dir=write(tmp_path, [row]), **changes))


def test_a_class_that_training_has_not_is_refused(tmp_path):
    folder = write(tmp_path, [{"text": "a", "label": 0}])
    (tmp_path / "validation.jsonl").write_text('{"text": "a", "label": 7}\n')
    with pytest.raises(ValueError, match="holds 7, which is none of the classes"):
        load_texts(TextArguments(data_dir=folder))


def test_texts_without_a_class_are_refused(tmp_path):
    """As the test splits of GLUE."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    for split, label in (("train", 1), ("test", -1)):
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [label] * 2}, features=features)
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ValueError, match=r"column 'label': some texts have no class \(-1\)"):
        load_texts(TextArguments(data_dir=str(tmp_path)))
