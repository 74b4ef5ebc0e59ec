"""A save happens whole or not at all."""

import pytest

from hf_geta.checkpoint.directory import replace_files


def write_files(**contents):
    def write(folder):
        for name, text in contents.items():
            (folder / name.replace("__", ".")).write_text(text)

    return write


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_new_directory_appears_with_everything_in_it(tmp_path):
    replace_files(tmp_path / "a" / "out", write_files(x="1", y="2"))
    assert contents(tmp_path / "a" / "out") == {"x": "1", "y": "2"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        replace_files(out, write_files(x="old"))

    def fail(folder):
        (folder / "x").write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_files(out, fail)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    assert not exists or contents(out) == {"x": "old"}


def test_stale_weights_go_and_other_files_stay(tmp_path):
    replace_files(tmp_path / "out", write_files(**{"model-00001-of-00002__safetensors": "old", "notes": "mine"}))
    (tmp_path / "out" / "checkpoint-10").mkdir()
    replace_files(tmp_path / "out", write_files(model__safetensors="new"))
    assert contents(tmp_path / "out") == {"model.safetensors": "new", "notes": "mine"}
    assert (tmp_path / "out" / "checkpoint-10").is_dir()
