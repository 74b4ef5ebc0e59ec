"""The files and commands of configs/accelerate, as the launchers read them."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.run import get_args_parser

from hf_geta.cli import _parser as geta_parser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


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
def test_a_command_of_the_page_is_one_that_its_launcher_takes(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    launcher, *words = shlex.split(line)
    if launcher == "accelerate":
        arguments = launch_arguments(*words[1:])
    else:
        arguments = get_args_parser().parse_args(words)
    assert Path(arguments.training_script).is_file()
    words = iter(arguments.training_script_args)
    given = dict(zip(words, words, strict=True))
    assert given.pop("--config") == "$CONFIG"
    assert given in ({}, {"--use_cpu": "true"})


def test_the_configs_of_the_page_are_there():
    named = [line.removeprefix("CONFIG=") for line in LINES if line.startswith("CONFIG=")]
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("hf-geta ")])
def test_a_plan_of_the_page_is_a_command(line):
    options = geta_parser().parse_args(shlex.split(line)[1:])
    assert (ROOT / options.config).is_file()
