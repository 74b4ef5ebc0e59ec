"""What .github/SECURITY.md promises: each promise names the tests that hold it; those of no other file are here."""

import builtins
import importlib.util
import json
import logging
import os
import pickle
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer
from hf_geta.report import load_report
from hf_geta.report.check import check_folder
from tests.forked import run_in_a_child

ROOT = Path(__file__).parent.parent
PAGE = ROOT / ".github" / "SECURITY.md"
TOKEN = "hf_" + "NeverWriteThisAnywhere"
PLAIN_FILES = {".safetensors", ".json", ".md", ".svg", ".png", ".jinja", ".txt"}
REFUSALS = (ValueError, OSError, RuntimeError, SafetensorError)
LARGEST_BYTES = 300 << 20  # of a refusal


@pytest.fixture
def folder(compressed_folder, tmp_path):
    return shutil.copytree(compressed_folder, tmp_path / "model")


def promises():
    """(sentence, names of tests) of every line of the page that promises something."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            sentence, _, tests = line.rpartition(" Held by ")
            yield sentence, re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)


def test_every_promise_names_tests_that_exist():
    found = list(promises())
    assert len(found) >= 8
    for sentence, tests in found:
        assert tests, f"no test holds it: {sentence}"
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"
    assert "SECURITY.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def no_pickles(monkeypatch):
    """Whatever reads a pickle fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(np, "load", refuse)


def test_loading_and_checking_read_no_pickle(folder, no_pickles):
    shutil.copy(folder / "config.json", folder / "training_args.bin")  # what lies beside is not read
    AutoModelForImageClassification.from_pretrained(folder)
    assert check_folder(folder)


@pytest.mark.parametrize("parent", ["..", "", "x/../.."])
def test_an_index_that_names_files_outside_of_its_folder_is_refused(parent, folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    (tmp_path / "shards" / "x").mkdir()
    AutoModelForImageClassification.from_pretrained(tmp_path / "shards")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / "shards" / moved).rename(tmp_path / moved)
    elsewhere = f"{parent or tmp_path}/{moved}"
    index["weight_map"] = {key: elsewhere if name == moved else name for key, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"safetensors is not in .*shards, whose index names it"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "shards")


def test_weights_in_a_pickle_are_refused_unread(folder, no_pickles):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_code_beside_a_checkpoint_is_never_run(folder, tmp_path):
    """Neither a modeling file that its config names, nor one under a name that Python would find."""
    canary = tmp_path / "ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "hf_geta.py", "conftest.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForImageClassification": "modeling_evil.Evil",
    }
    config["quantization_config"]["layers"] |= {"__import__('os').abort()": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(REFUSALS, match="abort"):  # the name is told, not run
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    del config["quantization_config"]["layers"]["__import__('os').abort()"]
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    check_folder(folder)
    assert not canary.exists()


HUGE = {
    "a shape": lambda c: c["quantization_config"]["layers"]["classifier"].update(shape=[10**9, 10**9]),
    "a layer's name for many": lambda c: c["quantization_config"]["layers"].update({"x" * 10**6: {}}),
    "many layers": lambda c: c["quantization_config"]["layers"].update({f"layer.{i}": {} for i in range(10**5)}),
    "an attribute": lambda c: c["quantization_config"]["attributes"].update({"vit.config.hidden_size": 10**15}),
    "a tensor of no layer": lambda c: c["quantization_config"]["shapes"].update({"vit.x": [10**12]}),
    "a shape of many dimensions": lambda c: c["quantization_config"]["shapes"].update({"vit.x": [1] * 10**6}),
    "the model's own config": lambda c: c.update(hidden_size=4 * 10**5, intermediate_size=10**6),
}


@pytest.mark.parametrize("claim", HUGE)
def test_a_claim_of_huge_sizes_is_refused_without_the_memory(claim, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].setdefault("attributes", {})
    HUGE[claim](config)
    (folder / "config.json").write_text(json.dumps(config))

    def load():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(REFUSALS) as refusal:
            AutoModelForImageClassification.from_pretrained(folder)
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < LARGEST_BYTES
        assert len(str(refusal.value)) < 10_000

    run_in_a_child(load)  # whose peak of memory is no earlier test's


def tiny_trainer(output_dir, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=2))
    data = [{"pixel_values": torch.randn(1, 8, 8), "labels": number % 2} for number in range(16)]
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=20,
        logging_steps=5,
        save_steps=10,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    config = GETAConfig(group_sparsity=0.3, activation_bits=[4, 8], pruning_periods=2, bit_reduction=8)
    return GETATrainer(model=model, args=args, geta_config=config, train_dataset=data)


def tree(folder):
    """Every path below a folder but for its part "out", with bytes or the target of a link."""
    paths = [path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts]
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes() for path in paths}


def test_training_and_saving_write_nothing_outside_the_output_folder(tmp_path, monkeypatch):
    """Of what Python opens; beside the folder only its own half-written twin, which is gone at the end."""
    for name in ("before", "around"):
        (tmp_path / name).mkdir()
    (tmp_path / "around" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "around")
    before, written, watching = tree(tmp_path), [], True

    def audit(event, arguments):
        if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            mode, flags = arguments[1] or "", arguments[2] or 0
            if set("wax+") & set(mode) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                written.append(os.path.abspath(os.fsdecode(arguments[0])))
        elif watching and event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"):
            written.extend(
                os.path.abspath(os.fsdecode(part)) for part in arguments if isinstance(part, str | os.PathLike)
            )

    sys.addaudithook(audit)
    try:
        trainer = tiny_trainer(tmp_path / "out")
        trainer.train()
        trainer.save_model()
        trainer.save_model(str(tmp_path / "out" / "small"))
    finally:
        watching = False
    assert tree(tmp_path) == before
    allowed = re.compile(re.escape(str(tmp_path)) + r"/(out|\.out\.\w+\.partial)(/|$)|/dev/null$")
    assert len(written) > 20
    assert {path for path in written if not allowed.match(path)} <= {str(tmp_path)}  # whose folder was asked for


def test_a_link_in_the_output_folder_is_replaced_and_not_written_through(tmp_path):
    target, folder = tmp_path / "target", tmp_path / "out"
    target.write_text("mine")
    folder.mkdir()
    names = ["model.safetensors", "config.json", "README.md", "geta_report.json", "geta_report.json.partial"]
    for name in names:
        (folder / name).symlink_to(target)
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(folder))
    assert target.read_text() == "mine"
    assert not any((folder / name).is_symlink() for name in names[:4])
    AutoModelForImageClassification.from_pretrained(folder)


def test_a_token_is_in_no_log_report_card_or_checkpoint(tmp_path, caplog, capfd, monkeypatch):
    """Given as an argument, and in the environment."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    trainer = tiny_trainer(tmp_path / "out", hub_token=TOKEN)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="mit")
    assert load_report(tmp_path / "out")["training"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md", "geta_report.json"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())
    with pytest.raises(ValueError) as refusal:  # nor in what is said when something is wrong
        tiny_trainer(tmp_path / "out" / "README.md" / "x", hub_token=TOKEN)
    assert TOKEN not in str(refusal.value)


def test_what_is_saved_is_tensors_and_text(tmp_path):
    """No pickle: training_args.bin, which Trainer writes into checkpoints, is not in the compressed model."""
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= PLAIN_FILES
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix != ".png":
            path.read_text(encoding="utf-8")


def test_the_package_has_no_way_to_run_text():
    """`eval`, `exec` and `compile` of text, unsafe YAML, and pickles have no place in hf_geta."""
    forbidden = re.compile(
        r"(?<![.\w])(?<!def )(eval|exec|compile|__import__)\(|yaml\.(unsafe_|full_)?load\(|pickle\.|torch\.load\("
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "hf_geta").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line) and "copyreg.pickle" not in line
    ]
    assert found == []
    assert importlib.util.find_spec("hf_geta")
    assert builtins.eval  # what is searched for exists
