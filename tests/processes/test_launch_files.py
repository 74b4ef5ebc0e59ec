"""The files and commands of configs/accelerate, as the launchers read them."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import TrainingArguments

from hf_geta.cli import _parser as geta_parser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
BATCH = next(shlex.split(line)[0].removeprefix("BATCH=") for line in LINES if line.startswith("BATCH="))
TRAINING_KEYS = {field.name for field in dataclasses.fields(TrainingArguments)}


def launch_arguments(*words):
    return _validate_launch_command(launch_command_parser().parse_args([*map(str, words)]))[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_starts_several_processes(file):
    """`MULTI_CPU` does not: accelerate leaves it to mpirun, and without that starts one process."""
    config = load_config_from_file(str(file))
    arguments = launch_arguments("--config_file", file, "program.py")
    assert arguments.num_processes == config.num_processes > 1
    assert arguments.multi_gpu or arguments.use_fsdp
    assert arguments.num_machines == 1 or arguments.main_process_ip
    assert f"[{file.name}]({file.name})" in README


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("accelerate ", "torchrun "))])
def test_a_command_of_the_page_is_one_that_its_launcher_and_trainer_take(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    launcher, *words = shlex.split(line.replace("$BATCH", BATCH))
    if launcher == "accelerate":
        arguments = launch_arguments(*words[1:])
    else:
        arguments = get_args_parser().parse_args(words)
    assert Path(arguments.training_script).is_file()
    flags = arguments.training_script_args
    assert flags[:2] == ["--config", "$CONFIG"]
    assert {flag.removeprefix("--") for flag in flags[2::2]} <= TRAINING_KEYS


def test_the_configs_of_the_page_are_there():
    named = [line.removeprefix("CONFIG=") for line in LINES if line.startswith("CONFIG=")]
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("hf-geta ")])
def test_a_plan_of_the_page_is_a_command(line):
    options = geta_parser().parse_args(shlex.split(line)[1:])
    assert (ROOT / options.config).is_file()
