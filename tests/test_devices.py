"""The package on a device: one body for each law, which the CPU proves here and CUDA then runs unchanged.

`pytest -m gpu` runs what needs a CUDA device, of this file alone; torch, transformers, accelerate and pytest are enough
for it. **The CUDA cases have not been run yet.**
"""

import functools
import gc
import os
import socket
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, GETAQuantizationConfig, GETATrainer, create_optimizer, finalize_model, prepare_model
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.optim.schedule import Stage
from hf_geta.quantization.functional import bits_to_step_size, fake_quantize, trace_fake_quantize
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.kernels import Grid
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.sharding import whole

needs_cuda = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
on_devices = pytest.mark.parametrize("device", DEVICES)
# float32 sums of the same numbers by the same kernels, which a library may choose anew for each call
SAME = {"rtol": 1e-5, "atol": 1e-6}
TOLERANCE = 1e-5  # of float64 weights and float32 quantizers after a run; one group that differs is 1e-2

STEPS, SAVE_STEPS = 22, 8  # warm-up 2, projection 4, joint 8, cool-down 8; a checkpoint lies inside a pruning period
CONFIG = GETAConfig(
    group_sparsity=0.5,
    weight_bits=[3, 6],
    activation_bits=[4, 8],
    bit_reduction=5,
    warmup_steps=2,
    projection_steps=4,
    joint_steps=8,
    pruning_periods=2,
)


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    # said at once, and not by the first loss, after which a compiler would begin anew
    return ViTForImageClassification(ViTConfig(**sizes, **images, problem_type="single_label_classification"))


def batch(step):
    draw = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 2, (6,), generator=draw)
    return {"pixel_values": torch.randn(6, 1, 8, 8, generator=draw) + labels.view(-1, 1, 1, 1), "labels": labels}


@pytest.fixture(autouse=True)
def as_it_was():
    """What a trainer leaves behind in the process: variables, determinism and, once it compiles, TF32."""
    environment, cudnn, products = dict(os.environ), torch.backends.cudnn, torch.backends.cuda.matmul
    flags = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, products.allow_tf32
    # read once in a process, at its first product of matrices; full determinism asks for it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(flags[0])
    cudnn.deterministic, cudnn.benchmark, products.allow_tf32 = flags[1:]


def samples(dtype=torch.float32):
    rows = [{name: value[0] for name, value in batch(step).items()} for step in range(24)]
    return [row | {"pixel_values": row["pixel_values"].to(dtype)} for row in rows]


def pixels(device):
    return batch(0)["pixel_values"].to(device)


class InBounds(TrainerCallback):
    """After every step every width is what the schedule allows it, from the projection on."""

    def __init__(self):
        self.trainer, self.steps = None, 0

    def on_step_end(self, args, state, control, **kwargs):
        qasso = self.trainer.qasso
        step = qasso.step_count - 1
        if step < 0 or qasso.schedule.stage_at(step) is Stage.WARMUP:
            return
        self.steps += 1
        for bits, allowed in zip(qasso.widths.bits().tolist(), qasso.allowed_bits, strict=True):
            # widths are rounded to 1e-4
            assert allowed[0] - 2e-4 <= bits <= qasso.schedule.upper_bits_at(step, allowed[-1]) + 2e-4


def new_trainer(device, folder, dtype=torch.float32, **changes):
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
    }
    args = TrainingArguments(output_dir=str(folder), **values | changes)
    args._n_gpu = min(args.n_gpu, 1)  # of several devices the first, without DataParallel
    model, watch = tiny_vit().to(args.device, dtype), InBounds()
    data = {"train_dataset": samples(dtype)}
    watch.trainer = GETATrainer(model=model, args=args, geta_config=CONFIG, callbacks=[watch], **data)
    return watch.trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_targets_are_met(trainer):
    qasso = trainer.qasso
    (watch,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, InBounds))
    assert watch.steps >= qasso.step_count - SAVE_STEPS > 0
    assert trainer.stage is Stage.COOLDOWN
    removed = trainer.model.geta.qadg.zero_groups(trainer.model)
    assert sum(map(len, removed.values())) == int(qasso.removed.sum()) == qasso.groups_to_remove
    for bits, allowed in zip(qasso.final_bits.tolist(), qasso.allowed_bits, strict=True):
        assert bits in allowed


def assert_all_on(device, model):
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    assert {tensor.device.type for tensor in state.values()} == {device}
    for quantizer in (module for module in model.modules() if isinstance(module, Quantizer)):
        assert {parameter.dtype for parameter in quantizer.parameters()} == {torch.float32}


@on_devices
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_run_meets_its_targets_and_its_small_model_is_loaded_where_it_was_trained(device, precision, tmp_path):
    asked = {} if precision == "float32" or (precision, device) == ("fp16", "cpu") else {precision: True}
    trainer = new_trainer(device, tmp_path, max_grad_norm=0, **asked)
    if (precision, device) == ("fp16", "cpu"):  # accelerate scales on devices only
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    assert_targets_are_met(trainer)
    assert_all_on(device, trainer.model)
    small = trainer.finalize().eval()
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small", device_map={"": device}).eval()
    assert_all_on(device, loaded)
    with torch.no_grad():
        ours, theirs = (model(pixel_values=pixels(device)).logits for model in (loaded, small))
    torch.testing.assert_close(ours, theirs, **SAME)
    on_cpu = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    packed = {name: layer for name, layer in small.named_modules() if isinstance(layer, PackedLayer)}
    assert packed
    for name, layer in packed.items():
        assert torch.equal(on_cpu.get_submodule(name).integers(), layer.integers().cpu()), name


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    """Device -> losses of the run that no option changes; made when asked for."""

    @functools.cache
    def of(device):
        trainer = new_trainer(device, tmp_path_factory.mktemp("plain"))
        trainer.train()
        return losses(trainer)

    return of


@on_devices
@pytest.mark.usefixtures("own_compiler_settings")
@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_a_run_that_is_computed_in_another_way_learns_the_same(device, way, plain_losses, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager" if device == "cpu" else "inductor"}
    changes = {"gradient_checkpointing": True} if way == "checkpointed" else compiled
    trainer = new_trainer(device, tmp_path, **changes)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing == (way == "checkpointed")
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule) == (way == "compiled")
    assert_targets_are_met(trainer)
    expected, found = plain_losses(device), losses(trainer)
    assert found[0] == pytest.approx(expected[0], rel=1e-2)  # accelerate lets what it compiles compute in TF32
    # roundings that flip, through all steps
    assert sum(found) == pytest.approx(sum(expected), rel=0.1)
    assert found[-1] < 0.8 * found[0]


def grid_of(form, dtype, exponent):
    """x, partly beyond the clip, and a grid of 4 bits: on the CPU, all that is learned requiring gradients."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(48, 80, generator=draw, dtype=dtype)
    clip_max = torch.tensor(1.1, dtype=dtype)
    exponent = None if exponent is None else torch.tensor(exponent, dtype=dtype)
    scale = None if form == "tensor" else torch.rand(48, 1, generator=draw, dtype=dtype) + 0.5
    multipliers = torch.randint(1, 17, (48, 3), generator=draw, dtype=torch.uint8) if form == "block" else None
    learned = [x, bits_to_step_size(4, clip_max, exponent), clip_max, exponent, scale]
    return [None if value is None else value.requires_grad_() for value in learned], multipliers


def gradients(function, learned, multipliers, signed):
    """Q(x) and the gradients of a sum of its entries, weighted, for all that is learned: on the CPU."""
    x, *grid = learned
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
    value = function(x, Grid(*grid, signed, multipliers, block_size=32))
    found = torch.autograd.grad((value * weights).sum(), [each for each in learned if each is not None])
    return [each.detach().cpu() for each in (value, *found)]


@on_devices
@pytest.mark.parametrize("form", ["tensor", "channel", "block"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "exponent", "tolerance"),
    # float32 with t = 1 has no function that one device computes otherwise than another: but the order of sums
    [(torch.float64, 1.3, 1e-10), (torch.float32, None, 2e-5)],
)
def test_fused_fake_quantization_is_the_elementwise_one_of_the_cpu(device, form, signed, dtype, exponent, tolerance):
    learned, multipliers = grid_of(form, dtype, exponent)
    expected = gradients(trace_fake_quantize, learned, multipliers, signed)
    there = [None if each is None else each.detach().to(device).requires_grad_() for each in learned]
    blocks = None if multipliers is None else multipliers.to(device)
    found = gradients(lambda x, grid: fake_quantize(x, *grid), there, blocks, signed)
    assert len(found) == len(expected) > 3
    for ours, theirs in zip(found, expected, strict=True):
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


@on_devices
def test_calibration_sets_what_the_histograms_of_the_cpu_say_of_the_inputs(device):
    model = tiny_vit().to(device).eval()
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            see = functools.partial(lambda name, _, args: seen.update({name: args[0].cpu()}), name)
            hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        model(pixel_values=pixels(device))
    for hook in hooks:
        hook.remove()
    random_state = torch.get_rng_state()
    prepare_model(model, CONFIG, {"pixel_values": pixels(device)})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_all_on(device, model)
    layers = {name: layer for name, layer in quantized_layers(model).items() if name in seen}
    assert len(layers) >= 7
    for name, layer in layers.items():
        histogram = MagnitudeHistogram(torch.device("cpu"))
        histogram.add(seen[name])
        assert layer.input_quantizer.signed == histogram.signed, name
        # a magnitude on the edge of a bin of 4 % may lie in the next one
        clip_max = histogram.clip_max(CONFIG.initial_bits)
        torch.testing.assert_close(layer.input_quantizer.clip_max.cpu(), clip_max, rtol=0.05, atol=0, msg=name)


class HostWaits(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers read from it, and tensors made of numbers for it."""

    OPERATORS = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "masked_select", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        if name in self.OPERATORS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def waits_of(device, function):
    """How often the host waits for the device: as CUDA tells, or by the operators that would."""
    if device == "cpu":
        with HostWaits() as waits:
            function()
        return sum(waits.found.values())
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def decides(optimizer):
    """Whether the step to come chooses groups or widths, or moves a bound: there it reads what it decides by."""
    schedule, step = optimizer.schedule, optimizer.step_count
    stage = schedule.stage_at(step)
    if stage is Stage.JOINT:
        period = schedule.pruning_period_at(step)
        return period.is_first_step or period.is_last_step
    return (stage is Stage.PROJECTION and optimizer._bounds_move()) or (
        stage is Stage.COOLDOWN and optimizer.final_bits is None
    )


@on_devices
@pytest.mark.parametrize(
    ("targets", "granularity"),
    [({"group_sparsity": 0.5}, "tensor"), ({"target_bops": 0.03}, "block")],
    ids=["share", "budget, blocks"],
)
def test_a_step_that_decides_nothing_reads_one_number_from_the_device(device, targets, granularity):
    """Whether all gradients are finite."""
    kept = {name: value for name, value in CONFIG.to_dict().items() if name not in ("group_sparsity", "target_bops")}
    config = GETAConfig.from_dict(kept | targets | {"granularity": granularity})
    model = prepare_model(tiny_vit().to(device), config, {"pixel_values": pixels(device)})
    base = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=True)
    optimizer = create_optimizer(model, base, STEPS)
    counted = Counter()
    for step in range(STEPS):
        inputs = {name: value.to(device) for name, value in batch(step).items()}
        model(**inputs).loss.backward()
        if decides(optimizer):
            optimizer.step()
        else:
            counted[optimizer.schedule.stage_at(step)] += 1
            assert waits_of(device, optimizer.step) == 1, optimizer.schedule.stage_at(step)
        optimizer.zero_grad()
    assert set(counted) == set(Stage)
    assert optimizer.removed.any()


PROMPT = torch.tensor([[5, 9, 33, 2, 17], [1, 60, 8, 8, 40]])


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A compressed decoder, made on the CPU; its inputs have 16 bits, so that a rounding that flips moves no word."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    texts = {"initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0}  # no two tokens are as likely
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **texts)).eval()
    widths = {"weight_bits": [8, 8], "activation_bits": [16, 16]}
    prepare_model(model, GETAConfig(**widths, granularity="block", quantize_embeddings=8), {"input_ids": PROMPT})
    axes = [axis for axis in model.geta.qadg.axes if axis.size > 8]
    assert axes
    model.geta.qadg.zero_(model, {axis.name: list(range(0, axis.size, 3)) for axis in axes})
    folder = tmp_path_factory.mktemp("llama")
    finalize_model(model).save_pretrained(folder)
    return folder


def load_llama(folder, backend="reference", **options):
    config = GETAQuantizationConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options).eval()


def written(model, device):
    prompt = PROMPT.to(device)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    return text.cpu()


@on_devices
@pytest.mark.parametrize(
    ("place", "backend"), [("by name", "reference"), ("auto", "auto"), ("moved", "packed"), ("moved", "auto")]
)
def test_a_loaded_decoder_writes_the_text_of_the_cpu(device, place, backend, llama_folder):
    memory = {"cpu" if device == "cpu" else 0: "1GiB"}  # "auto" would take a device where there is one
    options = {
        "by name": {"device_map": {"": device}},
        "auto": {"device_map": "auto", "max_memory": memory},
        "moved": {},
    }
    model = load_llama(llama_folder, backend, **options[place])
    model = model.to(device) if place == "moved" else model
    assert_all_on(device, model)
    text = written(model, device)
    assert torch.equal(text, written(load_llama(llama_folder), "cpu"))
    assert len(set(text[0, 5:].tolist())) > 3  # it says more than one thing


@on_devices
def test_a_decoder_loaded_in_bfloat16_keeps_its_scales_and_says_about_the_same(device, llama_folder):
    model = load_llama(llama_folder, device_map={"": device}, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert_all_on(device, model)
    scales = [tensor for name, tensor in model.state_dict().items() if name.endswith("step_size")]
    assert {scale.dtype for scale in scales} == {torch.float32}
    with torch.no_grad():
        ours = model(input_ids=PROMPT.to(device)).logits
        theirs = load_llama(llama_folder)(input_ids=PROMPT).logits
    assert ours.dtype == torch.bfloat16
    # 8 bits of mantissa, through two layers of large weights
    assert (ours.float().cpu() - theirs).norm() < 0.1 * theirs.norm()


@on_devices
def test_a_resumed_run_equals_the_uninterrupted_run_bit_for_bit(device, tmp_path):
    """With what Trainer offers for it."""
    saves = {"save_strategy": "steps", "save_steps": SAVE_STEPS}
    uninterrupted = new_trainer(device, tmp_path / "whole", full_determinism=True, **saves)
    uninterrupted.train()
    assert torch.are_deterministic_algorithms_enabled()
    resumed = new_trainer(device, tmp_path / "resumed", full_determinism=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVE_STEPS}"))
    assert_targets_are_met(resumed)
    expected = uninterrupted.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# -- one process as a launcher starts it: DDP, and FSDP2 as accelerate makes it ---------------------------------------


def in_float64(device, folder, **changes):
    """A run in which sums in another order hardly differ."""
    trainer = new_trainer(device, folder, torch.float64, optim="adamw_torch", **changes)
    trainer.train()
    return trainer


def ended(trainer):
    weights = {name: whole(tensor).cpu() for name, tensor in trainer.model.state_dict().items()}
    return weights, trainer.qasso.removed.cpu(), losses(trainer)


@pytest.fixture(scope="module")
def runs_alone(tmp_path_factory):
    """Device -> what a run ends with that no launcher has started; made when asked for."""
    return functools.cache(lambda device: ended(in_float64(device, tmp_path_factory.mktemp("alone"))))


@pytest.fixture
def alone(device, runs_alone):
    return runs_alone(device)


@pytest.fixture
def as_launched(device, alone, monkeypatch):
    """This process is the only one of a distributed run, by the variables that torchrun sets; not before `alone`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    if device == "cpu":  # on a device accelerate needs no help
        from tests.processes.run_fsdp import fsdp_on_cpu

        monkeypatch.setattr(AcceleratorState, "__init__", AcceleratorState.__init__)  # puts back what is patched now
        fsdp_on_cpu()
    yield
    gc.collect()  # gloo aborts a process that ends with a group in use
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


KINDS = {"whole": {}, "in pieces": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "ViTLayer"}}}


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("as_launched")
def test_a_distributed_run_of_one_process_ends_as_one_that_is_not_distributed(device, kind, alone, tmp_path):
    """Over NCCL on CUDA, gloo without; what several processes do is told by tests/processes."""
    trainer = in_float64(device, tmp_path, **KINDS[kind])
    assert ("gloo" if device == "cpu" else "nccl") in dist.get_backend()
    assert isinstance(trainer.model, FSDPModule) == (kind == "in pieces")
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (kind == "whole")
    assert_targets_are_met(trainer)
    (weights, removed, found), (its_weights, its_removed, its_losses) = ended(trainer), alone
    assert torch.equal(removed, its_removed)
    assert removed.any()
    assert found == pytest.approx(its_losses, rel=1e-4)
    assert weights.keys() == its_weights.keys()
    for name, expected in its_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=TOLERANCE, msg=name)
    small = trainer.finalize()
    # beside its pieces a device has no room for it
    assert_all_on("cpu" if kind == "in pieces" else device, small)
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small", device_map={"": device})
    with torch.no_grad():
        assert loaded(pixel_values=pixels(device).double()).logits.isfinite().all()
