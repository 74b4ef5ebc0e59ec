"""Laws of the settings: one YAML file, flags over it, nothing unknown."""

import runpy
import sys
from pathlib import Path

import pytest
import runs
from image_models import ModelArguments
from images import DataArguments
from questions import QuestionArguments
from run_arguments import parse_run
from run_seq2seq import PairArguments
from texts import TextArguments
from token_blocks import BlockArguments
from transformers import TrainingArguments

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Task, the second word of a config's name -> the program's own arguments; images for any other.
TASKS = {
    "sentiment": TextArguments,
    "boolq": TextArguments,
    "squad": QuestionArguments,
    "cnn_dailymail": PairArguments,
    "wikitext": BlockArguments,
}
PROGRAMS = [Path(runs.__file__).parent / f"run_{name}.py" for name in ("clm", "seq2seq", "question_answering")]
PROGRAMS += [Path(runs.__file__).parent / f"run_{name}_classification.py" for name in ("image", "text")]
TYPES = (ModelArguments, DataArguments, TrainingArguments)
FILE = """
model_type: vit
data_dir: somewhere
learning_rate: 1e-3
warmup_steps: 7
geta:
  group_sparsity: 0.5
  weight_bits: [4, 8]
  warmup_steps: 0.2
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return str(path)


def test_the_file_fills_every_dataclass(config):
    model, data, training, geta = parse_run(TYPES, ["--config", config])
    assert (model.model_type, data.data_dir) == ("vit", "somewhere")
    assert training.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert (geta.group_sparsity, tuple(geta.weight_bits)) == (0.5, (4, 8))


def test_flags_override_the_file(config):
    flags = ["--learning_rate", "0.5", "--group_sparsity", "0.3", "--weight_bits", "4", "6"]
    flags += ["--compress", "false", "--image-size", "64"]
    model, _, training, geta = parse_run(TYPES, ["--config", config, *flags])
    assert (training.learning_rate, model.compress, model.image_size) == (0.5, False, 64)
    assert (geta.group_sparsity, tuple(geta.weight_bits)) == (0.3, (4, 6))


def test_widths_may_be_none_in_the_file_and_as_a_flag(config):
    *_, geta = parse_run(TYPES, ["--config", config, "--weight_bits", "none"])
    assert geta.weight_bits is None
    Path(config).write_text(FILE.replace("[4, 8]", "null"))
    *_, geta = parse_run(TYPES, ["--config", config])
    assert geta.weight_bits is None
    *_, geta = parse_run(TYPES, ["--config", config, "--weight_bits", "2", "4", "8"])
    assert geta.weight_bits == (2, 4, 8)
    with pytest.raises(ValueError, match="two whole numbers"):
        parse_run(TYPES, ["--config", config, "--weight_bits", "4", "none"])


@pytest.mark.parametrize("field", ["quantize_embeddings", "outlier_activation_bits"])
def test_a_single_width_may_be_none_as_a_flag_too(field, config, capsys):
    Path(config).write_text(f"{FILE}  activation_bits: [8, 8]\n  {field}: 16\n")
    for flags, width in (([], 16), ([f"--{field}", "none"], None), ([f"--{field}", "12"], 12)):
        *_, geta = parse_run(TYPES, ["--config", config, *flags])
        assert getattr(geta, field) == width
    with pytest.raises(SystemExit):
        parse_run(TYPES, ["--config", config, f"--{field}", "few"])
    assert "'few': write a whole number, or none." in capsys.readouterr().err


@pytest.mark.parametrize(("field", "written"), [("granularity", "block"), ("target_size", "4MB")])
def test_a_text_may_be_none_as_a_flag_too(field, written, config):
    Path(config).write_text(f"{FILE}  {field}: {written}\n")
    for flags, value in (([], written), ([f"--{field}", "none"], None), ([f"--{field}", written], written)):
        *_, geta = parse_run(TYPES, ["--config", config, *flags])
        assert getattr(geta, field) == value


def test_two_fields_of_one_name_stay_two(config):
    _, _, training, geta = parse_run(TYPES, ["--config", config])
    assert (training.warmup_steps, geta.warmup_steps) == (7, 0.2)
    _, _, training, geta = parse_run(TYPES, ["--config", config, "--geta_warmup_steps", "5", "--warmup_steps", "3"])
    assert (training.warmup_steps, geta.warmup_steps) == (3, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("learning_rate", "lerning_rate"), "lerning_rate; did you mean learning_rate"),
        (FILE.replace("group_sparsity", "group_sparse"), "section geta.*did you mean group_sparsity.*weight_bits"),
        ("[1, 2]", "is no run: it holds no keys"),
        ("geta: 5", "no section geta:"),
        (FILE.replace("[4, 8]", "[8, 4]"), r"the lower bound comes first"),
        (FILE.replace("model_type: vit", ""), "model_type"),
        (FILE.replace("data_dir: somewhere", ""), "dataset_name"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_the_way_out(config, text, message):
    Path(config).write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_run(TYPES, ["--config", config])


@pytest.mark.parametrize("flag", ["--lerning_rate", "--group_spars", "--lerning-rate"])
def test_an_unknown_flag_is_refused_even_if_it_begins_a_known_one(config, flag):
    with pytest.raises(ValueError, match="unknown flag"):
        parse_run(TYPES, ["--config", config, flag, "1"])


def test_an_evaluation_reports_in_the_folder_that_it_evaluates_unless_a_flag_names_another(config, tmp_path):
    Path(config).write_text("output_dir: of_a_run\ndo_train: true" + FILE)
    evaluate = ["--config", config, "--do_train", "false", "--model_name_or_path"]
    for flags, folder in (
        (["--config", config], "of_a_run"),
        ([*evaluate, str(tmp_path)], str(tmp_path)),
        ([*evaluate, str(tmp_path), "--output_dir", "mine"], "mine"),
        ([*evaluate, "name/on-the-hub"], TrainingArguments().output_dir),
    ):
        assert parse_run(TYPES, flags)[2].output_dir == folder


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_mistake_of_the_user_ends_a_program_in_one_line(program, config, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program), "--config", config, "--lerning_rate", "1"])
    with pytest.raises(SystemExit, match=rf"^{program.name}: unknown .*"):
        runpy.run_path(str(program), run_name="__main__")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_complete_run(path):
    task = TASKS.get(path.stem.split("-")[1])
    types = TYPES if task is None else (runs.ModelArguments, task, TrainingArguments)
    model, data, training, geta = parse_run(types, ["--config", str(path), "--use_cpu", "true"])  # bf16 anywhere
    assert training.do_train
    assert training.output_dir == f"outputs/{path.stem}"
    if geta.has_budget:
        assert path.stem.endswith(f"-bops{100 * geta.target_bops:g}")
    else:
        bits = f"w{geta.weight_bits[1]}a{geta.activation_bits[1]}"
        assert path.stem.endswith(f"-{bits}-s{geta.group_sparsity * 100:.0f}")
    assert model.compress
    assert data.dataset_name or data.data_dir


def test_an_error_that_nobody_wrote_for_the_user_keeps_its_traceback():
    """One of a library, hours into a run."""
    with pytest.raises(ValueError, match="invalid literal"):
        runs.run_program(lambda: int("seven"))
