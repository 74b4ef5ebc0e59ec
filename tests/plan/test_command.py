"""What `hf-geta plan` prints, and what it says when something is wrong."""

import pytest
import yaml
from transformers import ViTConfig

from hf_geta.cli import main
from hf_geta.plan.text import format_bytes

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "patch_size": 8}
RUN = {"model_type": "vit", "config_overrides": VIT, "image_size": 32, "per_device_train_batch_size": 4}
GETA = {"weight_bits": [4, 6], "activation_bits": [4, 8]}


@pytest.fixture
def plan(tmp_path, capsys):
    """Runs the command on a file of these values; (status, output, errors)."""

    def run(*arguments: str, **values) -> tuple[int, str, str]:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | {"geta": GETA} | values))
        status = main(["plan", str(tmp_path / "run.yaml"), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_plan_prints_what_a_run_will_do_need_and_leave(plan):
    status, out, _ = plan("--samples", "4000", "--processes", "2", num_train_epochs=2)
    assert status == 0
    for words in (
        "ViTForImageClassification (vit from scratch)",
        "vit.layers.{0..1}.mlp.hidden",
        "56 groups on 4 axes",
        "normalized over (aten.layer_norm)",
        "1,000 optimizer steps, each of pixel_values (4, 3, 32, 32) in each of 2 processes",
        "weights at most 16, 14, 12, 10, 8, 6 bits; activations at most 16, 14, 12, 10, 8 bits",
        "10 periods of 30 steps, 2.8 groups each",
        "lower widths",
        "28 of 56 groups go",
        "states of adamw_torch_fused",
        "activations of a batch, float32",
        "all-reduces",
    ):
        assert words in out


def test_an_optimizer_that_is_not_installed_is_unknown_and_the_rest_is_not(plan):
    status, out, _ = plan(max_steps=1000, optim="lomo")
    assert status == 0
    assert "?" in next(line for line in out.splitlines() if line.startswith("states of lomo"))
    assert "Unknown here: You need to install" in out


def test_keys_are_set_on_the_command_line(plan):
    floats = ("--set", "geta.weight_bits=null", "--set", "geta.activation_bits=null")
    others = ("--set", "image_size=40", "--set", "of_a_program=3")
    more = {"num_train_epochs": 2, "of_a_program": 2}
    _, out, _ = plan("--set", "geta.group_sparsity=0.25", "--set", "max_steps=500", *others, *floats, **more)
    assert "pixel_values (4, 3, 40, 40)" in out
    assert "500 optimizer steps" in out
    assert "14 of 56 groups go" in out
    assert "no layer is quantized" in out


def test_a_pretrained_model_is_planned_with_the_config_that_the_file_asks_for(plan, tmp_path):
    ViTConfig(**VIT, image_size=32).save_pretrained(tmp_path / "model")
    run = {"model_type": None, "model_name_or_path": str(tmp_path / "model"), "max_steps": 200}
    for overrides, groups in (({}, 56), ({"num_hidden_layers": 1}, 28)):
        assert f"of {groups} groups go" in plan(**run, config_overrides=overrides)[1]
    scratch = plan("--model", str(tmp_path / "model"), max_steps=200, config_overrides={"num_hidden_layers": 1})
    assert "of 56 groups go" in scratch[1]  # what the file says of its own model is not said of another


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ([], {}, "write --samples N"),
        ([], {"image_size": None}, "write --image-size N"),
        ([], {"model_type": None}, "names no model"),
        ([], {"model_type": "nonsense"}, "no such model type"),
        (
            [],
            {"config_overrides": {"hiden_size": 3}},
            "unknown field of vit in config_overrides: hiden_size",
        ),
        (
            [],
            {"geta": {"group_sparsty": 0.3}},
            "unknown field of GETAConfig: group_sparsty; did you mean group_sparsity?",
        ),
        ([], {"geta": [1]}, "no section geta:"),
        ([], {"optim": "nonsense"}, "TrainingArguments refuse"),
        (["--set", "max_steps"], {}, "write key=value"),
        (["--set", "learing_rate=0.5"], {}, "--set learing_rate=0.5: no run has a key learing_rate"),
        (["--set", "learing_rate=0.5"], {}, "did you mean learning_rate?"),
        (["--set", "getta.weight_bits=[4, 4]"], {}, "the only section of a run is geta"),
        (["--samples", "40"], {}, "do not fit the 9 steps of the joint stage"),
        (["--model", "/nowhere/at/all"], {}, "there is no such folder"),
        ([], {"model_name_or_path": "no-such-owner/no-such-model"}, "with --model FOLDER"),
    ],
)
def test_errors_are_one_line(arguments, values, message, plan, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, err = plan(*arguments, **values)
    assert (status, out) == (1, "")
    assert err.startswith("hf-geta: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_is_no_file_of_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    for name, message in (("list.yaml", "is no run"), ("none.yaml", "is no YAML file of a run")):
        assert main(["plan", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


def test_bytes_read_well():
    assert [format_bytes(size) for size in (0, 640, 1234, 4.94e9, 2.5e12)] == [
        "0 B",
        "640 B",
        "1.23 kB",
        "4.94 GB",
        "2,500 GB",
    ]
