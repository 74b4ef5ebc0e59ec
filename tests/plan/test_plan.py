"""Laws of the plan: what it says of a run before it starts is what the run does."""

import itertools
import json

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments

from hf_geta import GETATrainer, finalize_model, prepare_model
from hf_geta.measure import measure_compression
from hf_geta.plan.plan import make_plan
from hf_geta.plan.run import read_run
from hf_geta.plan.text import format_plan
from hf_geta.preparation import preparation_of

SHAPE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
GETA = {"weight_bits": [4, 6], "activation_bits": [4, 8], "group_sparsity": 0.4, "pruning_periods": 2}
STAGES = {"warmup_steps": 1, "projection_steps": 2, "joint_steps": 2, "bit_reduction": 6}
TRAINING = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
SAMPLES = 80  # 5 batches, so that an epoch ends with a step of one batch


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    values = {"model_type": "vit", "config_overrides": {**SHAPE, "patch_size": 4}, "image_size": 32, **TRAINING}
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "max_train_samples": SAMPLES, "geta": GETA | STAGES}))
    return path


@pytest.fixture(scope="module")
def plan(file):
    return make_plan(read_run(file))


class Watch(TrainerCallback):
    """The stage of every optimizer step, and the most bytes that torch's allocator held beyond those at its start."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.peaks: list[int] = []

    def on_step_begin(self, *args, **kwargs):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.profile.__exit__(None, None, None)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        self.peaks.append(max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))
        self.stages.append(self.trainer.stage.label)


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    """The run itself, from the same file."""
    run, folder = read_run(file), tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    images = torch.randn(SAMPLES, 3, 32, 32)
    watch = Watch()
    trainer = GETATrainer(
        model=AutoModelForImageClassification.from_config(run.model.config),
        args=TrainingArguments(folder, **TRAINING, save_strategy="no", report_to="none", disable_tqdm=True),
        geta_config=run.geta,
        train_dataset=[{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)],
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    trainer.save_model(folder)
    return trainer, watch, folder


def test_planned_steps_and_stages_are_those_of_the_run(plan, trained):
    trainer, watch, _ = trained
    assert plan.total_steps == trainer.state.global_step == sum(stage.steps for stage in plan.stages)
    planned = [stage.name for stage in plan.stages for _ in range(stage.steps)]
    assert planned == watch.stages


def test_planned_groups_are_those_that_the_trainer_removes(plan, trained):
    trainer, *_ = trained
    assert plan.groups == trainer.qasso.space.num_groups
    assert plan.groups_to_remove == int(trainer.qasso.removed.sum()) == round(0.4 * plan.groups)


def test_what_a_run_leaves_lies_within_the_planned_bounds(plan, trained):
    trainer, _, folder = trained
    saved, (fewest, most) = sum(file.stat().st_size for file in folder.glob("*.safetensors")), plan.extremes
    compressed = json.loads((folder / "geta_report.json").read_text())["compressed"]
    assert fewest.parameters <= compressed["parameters"] <= most.parameters
    assert 0.97 * fewest.file_bytes <= saved <= most.file_bytes  # planned headers are upper bounds
    assert fewest.relative_bops <= compressed["relative_bops"] <= most.relative_bops


def test_planned_memory_is_an_upper_estimate_within_half_of_what_is_measured(plan, trained):
    """On the CPU kernels work block by block; what they would hold on an accelerator is most of the difference."""
    _, watch, _ = trained
    memory = plan.memory
    planned = memory.peak - memory.weights - memory.optimizer - memory.search_space  # what a step adds to what stays
    measured = max(watch.peaks[1:])  # the first step makes the optimizer's state
    assert measured <= planned <= 1.5 * measured


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_model_of_the_planned_end_has_the_planned_size(granularity, file, tmp_path):
    settings = ["geta.group_sparsity=0.5", "geta.weight_bits=[4, 4]", "geta.activation_bits=null"]
    settings.append(f"geta.granularity={granularity}")
    settings += ["geta.weight_block_size=16"] if granularity == "block" else []
    run = read_run(file, settings)
    model = AutoModelForImageClassification.from_config(run.model.config)
    end = make_plan(run).ends[0]
    prepare_model(model, run.geta, {"pixel_values": torch.randn(2, 3, 32, 32)})
    qadg = preparation_of(model).qadg
    qadg.zero_(model, {axis.name: range(axis.size // 2) for axis in qadg.axes})
    finalize_model(model).save_pretrained(tmp_path)
    cost = measure_compression(model, finalized=True)
    assert end.parameters == cost.parameters
    assert end.relative_bops == pytest.approx(cost.relative_bops)
    saved = (tmp_path / "model.safetensors").stat().st_size
    # what the header takes is an upper bound, and a last block of inputs that is not there
    assert (0.98 if granularity == "tensor" else 0.97) * end.file_bytes <= saved <= end.file_bytes


def test_a_budget_is_planned_with_what_is_in_reach(file):
    run = read_run(file, ["geta.group_sparsity=null", "geta.target_bops=0.01"])
    budget, (least, most) = (plan := make_plan(run)).budget, plan.ends
    assert plan.groups_to_remove is None
    assert budget.least < budget.target < budget.start
    assert most.relative_bops == pytest.approx(budget.start)
    assert most.parameters == plan.dense.parameters > least.parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["geta.group_sparsity=null", "geta.target_bops=1e-5"], "target_bops=1e-05 cannot be met"),
        (["max_steps=4"], "leave none for the cool-down"),
        (["geta.group_sparsity=0.9", "geta.min_groups=60"], "lower group_sparsity to"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size=0: write a number, 1 or more"),
        (["num_train_epochs=many"], "num_train_epochs='many': write a number, 0 or more"),
    ],
)
def test_a_plan_refuses_what_the_trainer_would(settings, message, file):
    with pytest.raises(ValueError, match=message):
        make_plan(read_run(file, settings))


def test_more_processes_take_fewer_steps_and_a_copy_of_the_gradients(file, plan):
    shared = make_plan(read_run(file, ["gradient_accumulation_steps=1"]), processes=2)
    assert shared.total_steps == 3 * 3  # of 5 batches each process takes 3
    assert shared.memory.buckets == shared.memory.gradients
    sent = shared.communication
    assert sent.gradients + sent.quantizer_gradients == shared.memory.gradients
    assert sent.decision == shared.groups
    forgotten = shared.dense.parameters - shared.ends[0].parameters
    assert shared.memory.redundant == pytest.approx(4 * forgotten / GETA["pruning_periods"], abs=1)  # an int32 for each
    assert "Sharded over 2 devices" in format_plan(shared)
    assert plan.communication is None


def test_a_plan_says_which_granularity_a_run_has_that_names_none(plan, file):
    assert "Note: granularity='tensor', as usual for such a model." in format_plan(plan)
    assert "granularity" not in format_plan(make_plan(read_run(file, ["geta.granularity=channel"])))
