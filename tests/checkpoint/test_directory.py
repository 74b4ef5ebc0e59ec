"""A save happens whole or not at all."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from hf_geta.checkpoint.directory import check_writable, replace_files
from tests.forked import run_in_a_child


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


def test_a_folder_that_exists_needs_nothing_of_its_parent(tmp_path):
    """It may be a mount, to which nothing can be renamed from outside, or its parent not writable."""
    out, places = tmp_path / "out", []

    def write(folder):
        places.append(folder.parent)
        (folder / "x").write_text("1")

    replace_files(out, write)
    (out / ".out.killed.partial").mkdir()
    replace_files(out, write)
    assert places == [tmp_path, out]
    assert [path.name for path in out.iterdir()] == ["x"]


NOBODY = 65534


@pytest.fixture
def read_only():
    """A folder with a save, which nobody may write; below no folder that is private."""
    out = Path(tempfile.mkdtemp())
    replace_files(out, write_files(config__json="old", model__safetensors="old"))
    out.chmod(0o555)
    yield out
    shutil.rmtree(out)


def test_a_folder_that_turned_read_only_keeps_the_earlier_save_and_is_refused_before_a_run(read_only):
    def save():
        if os.getuid() == 0:  # who may write anywhere
            os.setuid(NOBODY)
        with pytest.raises(PermissionError):
            replace_files(read_only, write_files(config__json="new", model__safetensors="new"))
        with pytest.raises(ValueError, match=r"cannot be written .*choose another folder"):
            check_writable(str(read_only))

    run_in_a_child(save)
    assert contents(read_only) == {"config.json": "old", "model.safetensors": "old"}


def test_what_counts_as_an_earlier_save_is_the_callers_to_say(tmp_path):
    out = tmp_path / "out"
    replace_files(out, write_files(model__safetensors="dense", model__onnx="old", model__onnx__data="old"))
    replace_files(out, write_files(model__onnx="new"), "model.onnx*")
    assert contents(out) == {"model.safetensors": "dense", "model.onnx": "new"}


@pytest.mark.parametrize("renamed", range(5))
def test_a_process_killed_between_two_renames_leaves_nothing_that_mixes_two_saves(renamed, tmp_path):
    """And the next save is whole; a single file of weights, which the old save has, would be read before shards."""
    out = tmp_path / "out"
    replace_files(out, write_files(config__json="old", model__safetensors="old", z="old"))
    new = {"config.json": "new", "model-1.safetensors": "new", "model-2.safetensors": "new", "z": "new"}
    write_new = write_files(**{name.replace(".", "__"): text for name, text in new.items()})
    child = os.fork()
    if child == 0:  # a process of its own, which ends by SIGKILL
        move, left = os.replace, [renamed]

        def move_and_die(*paths):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            move(*paths)

        os.replace = move_and_die
        try:
            replace_files(out, write_new)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if renamed < len(new) else 0)
    assert ("config.json" in contents(out)) == (renamed == len(new))
    if renamed < len(new):
        (left_over,) = out.glob(".out.*.partial")
        assert {**contents(out), **contents(left_over)}.items() >= new.items()
    replace_files(out, write_new)
    assert contents(out) == new
    assert not list(out.glob(".*"))


def test_stale_weights_go_and_other_files_stay(tmp_path):
    replace_files(tmp_path / "out", write_files(**{"model-00001-of-00002__safetensors": "old", "notes": "mine"}))
    (tmp_path / "out" / "checkpoint-10").mkdir()
    replace_files(tmp_path / "out", write_files(model__safetensors="new"))
    assert contents(tmp_path / "out") == {"model.safetensors": "new", "notes": "mine"}
    assert (tmp_path / "out" / "checkpoint-10").is_dir()
