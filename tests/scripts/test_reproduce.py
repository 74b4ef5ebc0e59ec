"""Laws of the tables: rows are configurations of one trainer, runs are kept, and the summary is that of the seeds."""

import dataclasses
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import reproduce
import tables.run
import torch
import yaml
from tables import identity, markdown, picture, workers
from tables.data import Images, Split, TrainingImages, prepare_images
from tables.plan import TABLES, Run, load_plan, merged, table_names
from tables.run import Folders, WidthCheck, _batch_size, _stage_config, _total_steps, execute
from tables.summary import ranking, summarize, within_points
from torch import nn
from write_mnist5k import write_mnist5k

from hf_geta import GETAConfig, GETATrainer
from hf_geta.optim.schedule import Stage
from hf_geta.quantization.swap import quantize_modules_
from hf_geta.report import load_report

WHITE_BOX = {"group_sparsity": 0.3, "weight_bits": [4, 8], "activation_bits": [6, 8]}
SMOKE = {
    "title": "smoke",
    "data": {"folder": "mnist5k", "hub": "none", "max_train_samples": 256, "max_eval_samples": 100},
    "training": {"max_steps": 14, "per_device_train_batch_size": 16, "learning_rate": 1e-3},
    "geta": {"pruning_periods": 2, "bit_reduction": 4},
    "budgets": [WHITE_BOX],
    "methods": {"dense": {"compress": False}, "geta": {}, "quantization_only": {"geta": {"group_sparsity": 0}}},
    "experiments": {
        "vit": {
            "model": {
                "model_type": "vit",
                "config_overrides": {
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                    "patch_size": 7,
                },
            }
        },
    },
}


def plan_of(tmp_path, values, **options):
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_plan(path, **options)


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("table", table_names())
def test_every_row_is_a_configuration_of_the_same_trainer(table, quick):
    """Within an experiment runs differ by seed, GETAConfig fields and the runs that they take a figure from, only."""
    runs = load_plan(table, quick).runs
    for experiment in {run.settings["experiment"] for run in runs}:
        mine = [run.settings for run in runs if run.settings["experiment"] == experiment]
        for settings in mine:
            for key in ("data", "model", "training"):
                assert settings[key] == mine[0][key]
            for fields in settings["stages"]:
                assert fields is None or GETAConfig.from_dict(fields)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("table", table_names())
def test_every_experiment_has_a_dense_row_for_every_seed(table, quick):
    runs = load_plan(table, quick).runs
    seeds = {(run.settings["experiment"], run.settings["seed"]) for run in runs}
    dense = {(r.settings["experiment"], r.settings["seed"]) for r in runs if r.settings["budget"] is None}
    assert dense == seeds


def test_a_run_stands_after_those_that_it_needs():
    for table in table_names():
        names = [run.name for run in load_plan(table).runs]
        assert len(set(names)) == len(names)
        for run in load_plan(table).runs:
            assert all(names.index(other) < names.index(run.name) for other in run.needs)


def test_every_local_folder_has_one_name_and_stands_in_the_readme():
    lines = (TABLES / "README.md").read_text().splitlines()
    folders = {}
    for table in table_names():
        for settings in (run.settings for quick in (False, True) for run in load_plan(table, quick).runs):
            for spec in filter(None, (settings["data"], settings["model"].get("pretrained"))):
                assert folders.setdefault(spec["hub"], spec["folder"]) == spec["folder"]
                (line,) = (line for line in lines if line.startswith(f"| `{spec['folder']}` | `{spec['hub']}`"))
                assert f"`{table}`" in line


def test_two_stages_take_their_sparsity_from_the_run_of_the_same_seed_and_budget():
    runs = {run.name: run for run in load_plan("vit").runs}
    two_stage = [run for run in runs.values() if run.settings["method"] == "two_stage"]
    assert two_stage
    for run in two_stage:
        (other,) = run.needs
        for key in ("experiment", "budget", "seed"):
            assert runs[other].settings[key] == run.settings[key]
        assert runs[other].settings["method"] == "geta"


def test_rows_bring_what_they_need_and_nothing_else():
    chosen = load_plan("vit", rows=["vit-fashion_mnist/two_stage"]).runs
    assert {run.settings["method"] for run in chosen} == {"geta", "two_stage"}
    assert {run.settings["experiment"] for run in chosen} == {"vit-fashion_mnist"}
    with pytest.raises(ValueError, match=r"no row two_stages; there are .*two_stage"):
        load_plan("vit", rows=["two_stages"])


def test_the_quick_form_goes_over_the_full_one_and_null_drops(tmp_path):
    values = SMOKE | {
        "quick": {
            "training": {"max_steps": 3},
            "methods": {"quantization_only": None},
            "experiments": {"vit": {"model": {"config_overrides": {"hidden_size": 8}}}},
        }
    }
    full, quick = (plan_of(tmp_path, values, quick=form).runs for form in (False, True))
    assert {run.settings["method"] for run in full} - {run.settings["method"] for run in quick} == {"quantization_only"}
    assert quick[0].settings["training"] == SMOKE["training"] | {"max_steps": 3}
    assert quick[0].settings["model"]["config_overrides"]["hidden_size"] == 8
    assert quick[0].settings["model"]["config_overrides"]["patch_size"] == 7
    assert not {run.name for run in full} & {run.name for run in quick}


def test_unknown_keys_and_fields_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key of [^:]*: budget; did you mean budgets"):
        plan_of(tmp_path, SMOKE | {"budget": 1})
    with pytest.raises(ValueError, match="unknown field of GETAConfig: sparsity; did you mean group_sparsity"):
        plan_of(tmp_path, merged(SMOKE, {"methods": {"geta": {"geta": {"sparsity": 1}}}}))
    with pytest.raises(ValueError, match="needs vit--geta--bops=0.5--seed0"):
        plan_of(tmp_path, merged(SMOKE, {"methods": {"two": {"group_sparsity_of": "geta", "budgets": [0.5]}}}))


@pytest.mark.parametrize("role", ["teacher", "group_sparsity_of"])
def test_a_method_that_there_is_not_is_refused_with_the_nearest(tmp_path, role):
    with pytest.raises(ValueError, match=rf"unknown {role} of vit, geta: dnese; did you mean dense\?"):
        plan_of(tmp_path, merged(SMOKE, {"methods": {"geta": {role: "dnese"}}}))


def test_methods_that_need_each_other_are_refused(tmp_path):
    methods = {"geta": {"teacher": "quantization_only"}, "quantization_only": {"group_sparsity_of": "geta"}}
    with pytest.raises(ValueError, match="geta needs itself, by way of geta, quantization_only"):
        plan_of(tmp_path, merged(SMOKE, {"methods": methods}))


@pytest.mark.parametrize("seeds", [0, -1])
def test_fewer_than_one_seed_are_refused(tmp_path, seeds):
    with pytest.raises(ValueError, match=f"seeds={seeds}: write a whole number, 1 or more"):
        plan_of(tmp_path, SMOKE, seeds=seeds)
    with pytest.raises(ValueError, match=f"seeds={seeds}:"):
        plan_of(tmp_path, SMOKE | {"seeds": seeds})


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--workers", "0"], ["--rows", "no_such"]])
def test_an_error_of_the_user_ends_the_program_in_one_line(monkeypatch, options, tmp_path):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "vit", "--output_dir", str(tmp_path), *options])
    with pytest.raises(SystemExit, match=r"^reproduce.py: (seeds=0|workers=0|no row no_such)[^\n]*$"):
        reproduce.run_program(reproduce._program)


def test_a_later_stage_has_the_same_budget_relative_to_the_dense_model():
    fields = {"target_bops": 0.02, "group_sparsity": 0}
    config = _stage_config(fields, group_sparsity=0.4, relative_bops=0.5)
    assert (config.target_bops, config.group_sparsity) == (0.04, 0)
    with pytest.raises(ValueError, match="has reached 0.01"):
        _stage_config(fields, None, relative_bops=0.01)
    pruning = {"weight_bits": None, "activation_bits": None, "target_bops": None}
    assert _stage_config(pruning, 0.4, 1.0).group_sparsity == 0.4
    assert _stage_config(pruning, 0.0, 1.0) is None  # nothing to remove: it trains on


def test_accumulated_batches_make_one_step():
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 10, "gradient_accumulation_steps": 4}
    assert _total_steps(training, examples=95) == 3 * 3  # 10 batches: two steps of 4 and one of 2
    assert _batch_size(training) == 40
    assert _total_steps(training | {"gradient_accumulation_steps": 1}, examples=95) == 30


@pytest.mark.parametrize(
    ("bits", "outside"),
    [((8, 8, 16), 0), ((4, 8, 16), 0), ((3, 8, 16), 1), ((8, 9, 16), 1), ((8, 8, 8), 1)],  # weight, input, outliers
)
def test_a_width_is_held_against_the_bounds_of_its_own_kind(bits, outside):
    config = GETAConfig(weight_bits=(4, 6, 8), activation_bits=(2, 8), outlier_activation_bits=16, granularity="tensor")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_modules_(model, config)
    linear, wide = model
    wide.input_quantizer.widths = "outlier_activation_bits"
    wide.weight_quantizer = linear.weight_quantizer  # shared: one width
    quantizers = (linear.weight_quantizer, linear.input_quantizer, wide.input_quantizer)
    for quantizer, width in zip(quantizers, bits, strict=True):
        quantizer.set_range_(1.0, width)
    check = WidthCheck()
    check.trainer = SimpleNamespace(model=model, geta_config=config, qasso=object(), stage=Stage.JOINT)
    check.on_log(logs={"loss": 1.0})
    assert (check.checked, check.outside) == (3, outside)


# -- summaries --------------------------------------------------------------------------------------------------------


def result(method, budget, seed, accuracy, bops=1.0, outside=0):
    figures = {
        "accuracy": accuracy,
        "relative_bops": bops,
        "group_sparsity": 0.5,
        "mean_weight_bits": 4,
        "mean_activation_bits": 6,
        "parameters": 10,
        "file_bytes": 100,
        "widths_checked": 4,
        "widths_outside": outside,
        "seconds": 2.0,
    }
    target = None if budget is None else {"target_bops": budget}
    return {"experiment": "e", "method": method, "budget": target, "seed": seed, "figures": figures}


RUNS = [
    *(result("dense", None, seed, accuracy) for seed, accuracy in enumerate((0.90, 0.94))),
    *(result("a", 0.02, seed, accuracy, 0.019, outside=1) for seed, accuracy in enumerate((0.89, 0.91))),
    *(result("a", 0.01, seed, accuracy, 0.010) for seed, accuracy in enumerate((0.80, 0.80))),
    *(result("b", 0.02, seed, accuracy, 0.018) for seed, accuracy in enumerate((0.92, 0.93))),
]


def test_mean_and_spread_are_those_of_the_seeds():
    rows = {(row["method"], row["relative_bops"]): row for row in summarize(RUNS)}
    row = rows["a", 0.019]
    assert row["score"] == pytest.approx(statistics.mean([0.89, 0.91]))
    assert row["score_spread"] == pytest.approx(statistics.stdev([0.89, 0.91]))
    assert row["difference"] == pytest.approx(statistics.mean([0.89 - 0.90, 0.91 - 0.94]))
    assert row["difference_spread"] == pytest.approx(statistics.stdev([-0.01, -0.03]))
    assert row["outside"] == 2 / 8
    assert summarize(RUNS[:1])[0]["score_spread"] is None  # one seed has no spread


def test_the_fewest_bops_within_two_points_and_the_ranking():
    rows = summarize(RUNS)
    found = {entry["method"]: entry["row"] for entry in within_points(rows, 2)}
    assert (found["a"]["relative_bops"], found["b"]["relative_bops"]) == (0.019, 0.018)
    assert within_points(rows, 0.1)[0]["row"] is None
    best, worst = ranking(rows)  # over bops=0.02 alone, which both have
    assert (best["method"], worst["method"], best["cells"]) == ("b", "a", 1)


def test_a_batch_is_augmented_and_normalized_as_a_whole():
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randint(0, 256, (5, 3, 4, 4), generator=generator, dtype=torch.uint8), torch.arange(5))
    half = torch.full((1, 3, 1, 1), 0.5)
    images = Images(split, split, ["a"] * 5, half, half)
    plain = TrainingImages(images).__getitems__([3, 1])
    torch.testing.assert_close(plain["pixel_values"], split.pixels[[3, 1]] / 127.5 - 1)
    assert plain["labels"].tolist() == [3, 1]
    torch.manual_seed(0)
    flipped = TrainingImages(images, horizontal_flip=True).__getitems__([2] * 20)["pixel_values"]
    assert len(flipped.unique(dim=0)) == 2


# -- one small table --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(plan, folders, results) of a table of a few steps, run with one worker."""
    folder = tmp_path_factory.mktemp("tables")
    write_mnist5k(folder / "data" / "mnist5k")
    plan = plan_of(folder, SMOKE)
    folders = Folders(folder / "smoke", str(folder / "data"))
    results = reproduce.run_table(plan, folders, workers=1)
    reproduce.write(results, folders.table)
    return plan, folders, results


def test_the_table_has_a_row_for_each_method_and_budget(smoke):
    _, folders, results = smoke
    assert results["failed"] == {}
    assert [row["method"] for row in results["summary"]] == ["dense", "geta", "quantization_only"]
    lines = (folders.table / "results.md").read_text().splitlines()
    assert sum(line.startswith(f"| {row['method']} ") for line in lines for row in results["summary"]) == 3
    assert "256 training images, 100 evaluation images, 14 steps of batch 16, 1 seed." in lines


def test_figures_are_those_of_what_was_asked_for(smoke):
    dense, geta, quantized = (row for row in smoke[2]["summary"])
    assert (dense["relative_bops"], dense["group_sparsity"], dense["mean_weight_bits"]) == (1.0, 0.0, 32)
    assert geta["group_sparsity"] == pytest.approx(0.3, abs=0.02)
    assert quantized["group_sparsity"] == 0
    assert geta["relative_bops"] < quantized["relative_bops"] <= 8 * 8 / 32**2
    assert dense["parameters"] / 2 < geta["parameters"] < quantized["parameters"] == dense["parameters"]
    assert geta["file_bytes"] < quantized["file_bytes"] < dense["file_bytes"]
    assert geta["outside"] == quantized["outside"] == 0


def test_a_finished_run_is_not_repeated(smoke, monkeypatch):
    plan, folders, results = smoke
    monkeypatch.setattr(reproduce, "execute", pytest.fail)  # whatever would run now would fail
    assert reproduce.run_table(plan, folders, workers=1)["runs"] == results["runs"]


def test_a_run_with_other_settings_is_another_run(smoke):
    plan, folders, _ = smoke
    for run in plan.runs:
        assert reproduce.finished(run, folders, {}) is not None
        other = dataclasses.replace(run, settings=run.settings | {"seed": 7})
        assert reproduce.finished(other, folders, {}) is None


@pytest.mark.parametrize("name", ["code_digest", "versions"])
def test_a_run_of_other_code_or_versions_is_another_run(smoke, monkeypatch, name):
    plan, folders, _ = smoke
    monkeypatch.setattr(identity, name, lambda: "another")
    assert not [run for run in plan.runs if reproduce.finished(run, folders, {})]


def test_a_run_on_other_data_is_another_run(smoke, tmp_path):
    plan, folders, _ = smoke
    shutil.copytree(folders.data_dir, tmp_path / "data")  # which keeps the files' times
    copied = dataclasses.replace(folders, data_dir=str(tmp_path / "data"))
    assert reproduce.finished(plan.runs[0], copied, {}) is not None
    os.utime(next(file for file in sorted((tmp_path / "data").rglob("*")) if file.is_file()))
    identity.folder_digest.cache_clear()
    assert reproduce.finished(plan.runs[0], copied, {}) is None
    hub = dataclasses.replace(folders, data_dir=None)
    assert reproduce.finished(plan.runs[0], hub, {}) is None


def test_a_result_that_says_less_than_it_must_is_repeated(smoke, tmp_path):
    plan, folders, _ = smoke
    shutil.copytree(folders.table, tmp_path / "old")
    old = dataclasses.replace(folders, table=tmp_path / "old")
    run = plan.runs[0]
    for key in ("settings", "code", "versions", "data", "after"):
        result = folders.load(run.name)
        del result[key]
        old.result(run.name).write_text(json.dumps(result))
        assert reproduce.finished(run, old, {}) is None


def test_a_run_is_repeated_after_the_one_that_it_needs(smoke, tmp_path):
    plan, folders, _ = smoke
    shutil.copytree(folders.table, tmp_path / "table")
    copied = dataclasses.replace(folders, table=tmp_path / "table")
    dense, student = plan.runs[0], dataclasses.replace(plan.runs[1], needs=(plan.runs[0].name,))
    execute(student, copied, quick=False)
    done = {dense.name: copied.load(dense.name)}
    assert reproduce.finished(student, copied, done) is not None
    assert reproduce.finished(student, copied, {}) is None
    done[dense.name]["finished"] = "2000-01-01T00:00:00.000"
    assert reproduce.finished(student, copied, done) is None


def test_the_code_of_a_run_is_the_library_and_what_trains_and_measures():
    names = {"/".join(file.parts[-2:]) for file in identity.sources()}
    for name in ("images", "image_models", "cifar_resnet", "texts", "questions", "classification", "runs", "splits"):
        assert f"scripts/{name}.py" in names
    assert {"tables/run.py", "tables/tasks.py", "tables/data.py", "hf_geta/trainer.py"} <= names
    assert not {"tables/markdown.py", "tables/picture.py", "scripts/benchmark_training.py"} & names


def test_pictures_are_decoded_again_where_the_code_is_another(smoke, monkeypatch):
    plan, folders, _ = smoke
    settings, path = plan.runs[0].settings, folders.prepared("vit", quick=False)
    before = path.stat().st_mtime_ns
    prepare_images(settings["data"], settings["model"], folders.data_dir, path)
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr(identity, "code_digest", lambda: "another")
    prepare_images(settings["data"], settings["model"], folders.data_dir, path)
    assert path.stat().st_mtime_ns != before


def test_date_and_versions_are_those_of_the_runs(smoke):
    _, _, results = smoke
    runs = [
        run | {"versions": {"torch": "1.0"}, "finished": f"2001-02-0{i + 3}"} for i, run in enumerate(results["runs"])
    ]
    found = reproduce.environment(runs)
    assert (found["date"], found["versions"]) == ("2001-02-03 to 2001-02-05", {"torch": "1.0"})
    assert reproduce.environment(runs[:1])["date"] == "2001-02-03"


def test_a_run_that_fails_is_named_and_those_that_need_it_wait_for_nothing(smoke, monkeypatch):
    monkeypatch.setattr(workers, "_process", lambda: ThreadPoolExecutor(1))
    plan, folders, _ = smoke
    bad = Run("bad", plan.runs[0].settings | {"training": {"max_steps": -1}}, (), False)
    after = Run("after", plan.runs[1].settings, ("bad",), False)
    results = reproduce.run_table(dataclasses.replace(plan, runs=(plan.runs[0], bad, after)), folders, workers=1)
    assert set(results["failed"]) == {"bad", "after"}
    assert "`bad`" in markdown.render(results)


def test_rendering_again_gives_the_same_text_and_pictures(smoke, monkeypatch):
    _, folders, results = smoke
    text = (folders.table / "results.md").read_text()
    for ending in ("md", "png", "svg"):
        (folders.table / f"results.{ending}").unlink()
    monkeypatch.setattr(reproduce, "table_names", lambda: [folders.table.name])
    again = reproduce.main([folders.table.name, "--quick", "--render", "--output_dir", str(folders.table.parent)])
    assert json.dumps(again) == json.dumps(results)
    assert (folders.table / "results.md").read_text() == text
    assert "relative BOPs" in (folders.table / "results.svg").read_text()
    assert (folders.table / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(picture.COLORS)) == len(picture.COLORS) == len(set(picture.MARKERS))


def test_some_rows_and_the_full_form_have_results_of_their_own(smoke, monkeypatch, tmp_path):
    plan, _, results = smoke
    (tmp_path / "smoke").mkdir()
    reproduce.write(results, tmp_path / "smoke")
    monkeypatch.setattr(reproduce, "table_names", lambda: ["smoke"])
    monkeypatch.setattr(reproduce, "load_plan", lambda *options: plan)
    monkeypatch.setattr(reproduce, "run_table", lambda *options: results | {"title": "another"})
    before = {file.name: file.read_bytes() for file in (tmp_path / "smoke").iterdir()}
    commands = {
        "results-full": [],
        "results-geta": ["--quick", "--rows", "geta"],
        "results-full-geta+vit--dense": ["--rows", "vit/dense", "geta"],
    }
    for stem, options in commands.items():
        reproduce.main(["smoke", "--output_dir", str(tmp_path), *options])
        assert f"({stem}.png)" in (tmp_path / "smoke" / f"{stem}.md").read_text()
        again = reproduce.main(["smoke", "--render", "--output_dir", str(tmp_path), *options])
        assert again["title"] == "another"
    after = {file.name: file.read_bytes() for file in (tmp_path / "smoke").iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"{stem}.{end}" for stem in commands for end in ("json", "md", "png", "svg")}
    with pytest.raises(ValueError, match=r"no results-dense.json in .*; there is results-full-geta"):
        reproduce.main(["smoke", "--quick", "--render", "--output_dir", str(tmp_path), "--rows", "dense"])


def test_results_that_cannot_be_written_leave_the_old_ones(smoke, monkeypatch, tmp_path):
    _, _, results = smoke
    reproduce.write(results, tmp_path)
    before = (tmp_path / "results.md").read_text()
    monkeypatch.setattr(os, "replace", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.write(results | {"title": "another"}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["title"] == results["title"]
    assert (tmp_path / "results.md").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"results.{end}" for end in ("json", "md", "png", "svg")
    ]


# -- rows that need another row ---------------------------------------------------------------------------------------

PRUNING = {"weight_bits": None, "activation_bits": None, "target_bops": None}
STAGES = {"warmup_steps": 1, "projection_steps": 2, "joint_steps": 2}
RELATED = {
    "training": {"max_steps": 15},
    "geta": {**STAGES, "weight_bits": [2, 8], "activation_bits": [4, 8]},
    "budgets": [0.02],
    "methods": {
        "quantization_only": None,
        "two_stage": {"group_sparsity_of": "geta", "stages": [{"geta": PRUNING}, {"geta": {"group_sparsity": 0}}]},
        "distillation": {"teacher": "dense"},
    },
}


class WatchedTrainer(GETATrainer):
    """Remembers the weights that it was given and those that it saved, with their report."""

    def __init__(self, model, **options):
        self.given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        super().__init__(model=model, **options)

    def save_model(self, folder):
        super().save_model(folder)
        self.saved, self.report = type(self.model).from_pretrained(folder).state_dict(), load_report(folder)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def related(smoke, tmp_path_factory):
    """(folders, figures by method, trainers by method) of a table whose rows need one another, run in this process."""
    folders = dataclasses.replace(smoke[1], table=tmp_path_factory.mktemp("related"))
    figures, trainers = {}, {}
    made = []

    def trainer(**options):
        made.append(WatchedTrainer(**options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.run, "GETATrainer", trainer)
        for run in plan_of(folders.table, merged(SMOKE, RELATED)).runs:
            figures[run.settings["method"]] = execute(run, folders, quick=False)["figures"]
            trainers[run.settings["method"]] = made.copy()
            made.clear()
    return folders, figures, trainers


def test_two_stages_share_the_steps_and_the_second_begins_where_the_first_ended(related):
    _, figures, trainers = related
    assert [len(made) for made in trainers.values()] == [1, 1, 1, 2]
    for method, made in trainers.items():
        assert sum(trainer.state.global_step for trainer in made) == figures[method]["steps"] == 15
    first, second = trainers["two_stage"]
    assert [first.state.global_step, second.state.global_step] == [7, 8]
    assert same_tensors(second.given, first.saved)


def test_two_stages_remove_as_many_groups_as_the_row_that_they_name_and_meet_the_same_budget(related):
    _, figures, trainers = related
    first, second = (trainer.report["compressed"] for trainer in trainers["two_stage"])
    assert 0 < figures["geta"]["group_sparsity"] == pytest.approx(figures["two_stage"]["group_sparsity"])
    assert (first["mean_weight_bits"], second["group_sparsity"]) == (32, 0)
    bops = figures["two_stage"]["relative_bops"]
    assert bops == pytest.approx(first["relative_bops"] * second["relative_bops"], rel=1e-12)
    assert max(bops, figures["geta"]["relative_bops"]) <= 0.02 < second["relative_bops"]


def test_a_taught_row_follows_the_model_that_the_row_of_its_teacher_left(related):
    folders, _, trainers = related
    taught, dense = trainers["distillation"][0], trainers["dense"][0]
    assert same_tensors(taught.teacher_model.state_dict(), dense.saved)
    assert [file.name.split("--")[1] for file in (folders.table / "models").iterdir()] == ["dense"]
    assert all(made[0].teacher_model is None for name, made in trainers.items() if name != "distillation")


# -- tasks of text ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_table(tmp_path_factory, encoder_folder):
    """Results of a table of few steps with a classifier and a model that marks answers."""
    folder = tmp_path_factory.mktemp("text")
    shutil.copytree(encoder_folder, folder / "data" / "encoder")
    rows = {
        "words": [{"text": " ".join([word] * n), "label": word} for word in ("good", "bad") for n in (2, 5)],
        "answers": [
            {"id": str(i), "question": "where ?", "context": f"{'b ' * i}good", "answers": answer("good", 2 * i)}
            for i in range(4)
        ],
    }
    for name, lines in rows.items():
        (folder / "data" / name).mkdir()
        for split in ("train", "validation"):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "data" / name / f"{split}.jsonl").write_text(text)
    windows = {"max_length": 16, "max_question_length": 4, "doc_stride": 2}
    experiments = {
        "words": {"task": "texts", "data": {"folder": "words", "hub": "none"}},
        "answers": {"task": "questions", "data": {"folder": "answers", "hub": "none", **windows}},
    }
    values = {key: SMOKE[key] for key in ("title", "geta", "budgets", "methods")}
    values |= {
        "training": SMOKE["training"] | {"per_device_train_batch_size": 2},
        "model": {"pretrained": {"folder": "encoder", "hub": "none"}, "head_learning_rate": 1e-2},
        "experiments": experiments,
        "methods": {"dense": {"compress": False}, "geta": {}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_process", lambda: ThreadPoolExecutor(1))  # a process imports everything once more
        results = reproduce.run_table(
            plan_of(folder, values), Folders(folder / "text", str(folder / "data")), workers=1
        )
    return markdown.render(results), results


def answer(text, start):
    return {"text": [text], "answer_start": [start]}


def test_texts_and_questions_have_rows_of_their_own_scores(text_table):
    text, results = text_table
    assert results["failed"] == {}
    found = [(row["experiment"], row["method"], row["metric"]) for row in results["summary"]]
    assert found == [(e, m, s) for e, s in (("answers", "f1"), ("words", "accuracy")) for m in ("dense", "geta")]
    assert all(0 <= row["score"] <= 1 for row in results["summary"])
    assert [row["group_sparsity"] for row in results["summary"]] == pytest.approx([0, 0.3, 0, 0.3], abs=0.02)
    assert "4 training texts, 4 evaluation texts, 14 steps of batch 2, 1 seed." in text
    for column in ("accuracy (%)", "F1 (%)", "exact match (%)"):
        assert column in text
