"""What is found in, and planned for, the published configurations of models that people really use."""

import json
from collections import Counter
from pathlib import Path

import pytest

from hf_geta import build_qadg
from hf_geta.cli import main
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.optim.schedule import Schedule
from hf_geta.plan.run import read_run
from tests.plan.real_configs import REAL_MODELS

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET_SAMPLES = 1_281_167


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {}
    for name, real in REAL_MODELS.items():
        paths[name] = tmp_path_factory.mktemp(name.replace("/", "-"))
        (paths[name] / "config.json").write_text(json.dumps(real.config))
    return paths


@pytest.mark.parametrize("name", REAL_MODELS)
def test_every_layer_has_its_heads_and_hidden_units(name, folders):
    real = REAL_MODELS[name]
    run = read_run(CONFIGS / f"{real.run}.yaml", model=str(folders[name]))
    assert sum(p.numel() for p in run.model.parameters()) == real.published
    qadg = build_qadg(run.model, example_inputs(run.model, batch=2, length=16))
    assert Counter((axis.kind, axis.size) for axis in qadg.axes) == real.axes


def test_a_batch_is_as_long_as_the_run_says(folders):
    file = CONFIGS / "phi_2-wikitext-w4a8-s20.yaml"
    run = read_run(file, ["block_size=2048"], model=str(folders["microsoft/phi-2"]))  # all positions that it has
    assert {tuple(value.shape) for value in run.batch().values()} == {(2, 2048)}


@pytest.mark.parametrize("name", REAL_MODELS)
def test_their_runs_name_them_and_have_room_for_their_stages(name, folders):
    file = CONFIGS / f"{REAL_MODELS[name].run}.yaml"
    assert f"model_name_or_path: {name}" in file.read_text()
    run = read_run(file, model=str(folders[name]), samples=IMAGENET_SAMPLES)
    Schedule.from_config(run.geta, run.total_steps(processes=8))


def test_a_published_model_is_planned_from_its_config_alone(folders, capsys):
    file = CONFIGS / "deit_small-imagenet-w4a8-s30.yaml"
    folder = folders["facebook/deit-small-patch16-224"]
    arguments = ["plan", file, "--model", folder, "--samples", IMAGENET_SAMPLES, "--set", "max_steps=1000", "--json"]
    assert main([str(one) for one in arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["groups"] == plan["search_space"]["groups"] == 12 * (6 + 1536)
    assert plan["groups_to_remove"] == round(0.3 * plan["groups"])
    assert sum(stage["steps"] for stage in plan["stages"]) == plan["total_steps"] == 1000
    assert plan["memory"]["weights"] == pytest.approx(4 * 22_050_664, rel=0.01)  # and the quantizers
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["gradients"], rel=0.01)
    assert plan["memory"]["peak"] > plan["memory"]["activations"] > 0
