"""QASSO over whole runs of a real (tiny) vision transformer: what it promises at every step, and at the end."""

import copy
import dataclasses
import io

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.optimization import Adafactor

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model
from hf_geta.measure import measure_compression, output_difference
from hf_geta.optim.schedule import Stage

TOTAL_STEPS = 60
CONFIG = GETAConfig(
    group_sparsity=0.5,
    weight_bits=[3, 6],
    activation_bits=[4, 8],
    pruning_periods=4,
    quantizer_learning_rate=1e-2,
)
BITS_TOLERANCE = 1e-4  # widths are recomputed from float32 logarithms
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, nesterov=True),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False),
}


def tiny_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.1,
    )
    return ViTForImageClassification(config)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 3, (6,), generator=generator)
    pixels = torch.randn(6, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return {"pixel_values": pixels, "labels": labels}


def prepared(config=CONFIG):
    inputs = {"pixel_values": batch(0)["pixel_values"]}
    return prepare_model(tiny_vit().train(), config, inputs)


def weight_rows(optimizer):
    """(quantizers,) bool: which round a weight, and which an input."""
    return torch.tensor([weight is not None for weight in optimizer.weights])


def train(model, optimizer, steps):
    """Yields after every step; the dropout of a step depends on the step alone."""
    for step in steps:
        torch.manual_seed(step)
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"granularity": "channel", "saliency": "fisher"},
        {"granularity": "block"},
        {"saliency": "magnitude"},
        {"saliency": "mix"},
    ],
)
def test_every_width_stays_inside_its_bounds_and_exactly_the_asked_groups_go(name, changes):
    config = GETAConfig.from_dict(CONFIG.to_dict() | changes)
    model = prepared(config)
    optimizer = create_optimizer(model, OPTIMIZERS[name](model.parameters()), TOTAL_STEPS)
    is_weight = weight_rows(optimizer)
    for step in train(model, optimizer, range(TOTAL_STEPS)):
        stage, bits = optimizer.schedule.stage_at(step), optimizer.widths.bits()
        if stage is Stage.WARMUP:
            continue
        for kind, (lower, target) in ((is_weight, config.weight_bits), (~is_weight, config.activation_bits)):
            upper = optimizer.schedule.upper_bits_at(step, target)
            assert bits[kind].min() >= lower - BITS_TOLERANCE
            assert bits[kind].max() <= upper + BITS_TOLERANCE
            assert upper == target or stage is Stage.PROJECTION
    qadg = model.geta.qadg
    total = sum(axis.size for axis in qadg.axes)
    removed = qadg.zero_groups(model)
    assert sum(map(len, removed.values())) == round(config.group_sparsity * total) == optimizer.removed.sum()
    assert all(len(removed.get(axis.name, ())) < axis.size for axis in qadg.axes)
    assert torch.allclose(optimizer.widths.bits(), optimizer.widths.bits().round(), atol=BITS_TOLERANCE)
    small = finalize_model(model)
    # summing fewer zeros may flip the rounding of an activation, by one step of at most 8 bits
    assert output_difference(model, small, {"pixel_values": batch(99)["pixel_values"]}) < 1e-2


@pytest.mark.parametrize(
    ("weights", "inputs", "discrete"),
    [([2, 4, 8], [4, 8, 16], False), ([3, 6], [4, 8], True), ([2, 3, 7], [8, 8], False)],
)
def test_a_set_of_widths_is_a_hull_while_it_trains_and_the_only_widths_at_the_end(weights, inputs, discrete):
    changes = {"weight_bits": weights, "activation_bits": inputs, "discrete_bits": discrete}
    config = GETAConfig.from_dict(CONFIG.to_dict() | changes)
    model = prepared(config)
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    kinds = ((weight_rows(optimizer), "weight_bits"), (~weight_rows(optimizer), "activation_bits"))
    relaxed = False
    for step in train(model, optimizer, range(TOTAL_STEPS)):
        stage, bits = optimizer.schedule.stage_at(step), optimizer.widths.bits()
        for kind, name in kinds if stage is not Stage.WARMUP else ():
            allowed = torch.tensor(config.allowed_bits(name))
            upper = optimizer.schedule.upper_bits_at(step, int(allowed[-1]))
            assert bits[kind].min() >= allowed[0] - BITS_TOLERANCE
            assert bits[kind].max() <= upper + BITS_TOLERANCE
            distance = (bits[kind, None] - allowed).abs().amin(1).max()
            relaxed |= stage is Stage.JOINT and bool(distance > 0.01)
            assert stage is not Stage.COOLDOWN or distance < BITS_TOLERANCE
    assert relaxed
    small = finalize_model(model)
    layers = small.config.quantization_config["layers"].values()
    assert {layer["bits"] for layer in layers} <= set(config.allowed_bits("weight_bits"))
    assert {layer["activation_bits"] for layer in layers} <= set(config.allowed_bits("activation_bits"))


@pytest.mark.parametrize(("learned", "weight_bits", "input_bits"), [(5.2, 4, 6), (5.6, 4, 6), (6.8, 8, 6)])
def test_a_learned_width_becomes_the_nearest_of_the_set_at_the_cooldown(learned, weight_bits, input_bits):
    stages = {"warmup_steps": 1, "projection_steps": 4, "joint_steps": 4}
    changes = stages | {"weight_bits": [2, 4, 8], "activation_bits": [4, 6, 9]}
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | changes))
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), 12)
    list(train(model, optimizer, range(9)))
    bits = torch.full_like(optimizer.widths.bits(), learned)
    optimizer.widths.project_(bits, bits)
    list(train(model, optimizer, range(9, 10)))
    is_weight = weight_rows(optimizer)
    for rows, expected in ((is_weight, weight_bits), (~is_weight, input_bits)):
        assert set(optimizer.final_bits[rows].tolist()) == {expected}
        assert (optimizer.widths.bits()[rows] - expected).abs().max() < BITS_TOLERANCE


def test_a_run_stopped_early_ends_with_the_widths_that_its_report_says():
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | {"weight_bits": [2, 4, 8], "activation_bits": [4, 8, 16]}))
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(30)))
    said = measure_compression(model, finalized=True)
    layers = finalize_model(model).config.quantization_config["layers"]
    for operation in said.operations:
        if operation.weight is not None and (layer := layers.get(operation.weight.removesuffix(".weight"))):
            assert (layer["bits"], layer["activation_bits"]) == (operation.weight_bits, operation.activation_bits)
            assert layer["bits"] in (2, 4, 8)


def test_warmup_is_the_base_optimizer_bit_for_bit():
    ours, plain = prepared(), prepared()
    optimizer = create_optimizer(ours, OPTIMIZERS["adamw"](ours.parameters()), TOTAL_STEPS)
    base = OPTIMIZERS["adamw"](plain.parameters())
    base.param_groups[0]["params"] = [p for n, p in plain.named_parameters() if "quantizer" not in n]
    quantizers = [p for n, p in plain.named_parameters() if "quantizer" in n]
    base.add_param_group({"params": quantizers, "lr": CONFIG.quantizer_learning_rate, "weight_decay": 0.0})
    warmup = range(optimizer.schedule.warmup_steps)
    assert len(warmup) > 0
    for _ in zip(train(ours, optimizer, warmup), train(plain, base, warmup), strict=True):
        for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        *((stop, {}) for stop in (3, 10, 15, 21, 26, 36, 45)),
        (26, {"saliency": "mix", "saliency_weights": [1, 2, 0.5]}),
        (21, {"group_divisible": 5}),
        (26, {"weight_bits": None, "activation_bits": None}),
        (45, {"weight_bits": [2, 4, 8]}),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_run(stop, changes):
    """Stops in every stage, inside a pruning period and on its border."""
    config = GETAConfig.from_dict(CONFIG.to_dict() | changes)
    model = prepared(config)
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(stop)))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    list(train(model, optimizer, range(stop, TOTAL_STEPS)))

    resumed = prepared(config)
    second = create_optimizer(resumed, OPTIMIZERS["adamw"](resumed.parameters()), TOTAL_STEPS)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    list(train(resumed, second, range(stop, TOTAL_STEPS)))
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("stop", [3, 15, 21, 26, 45, TOTAL_STEPS])
def test_a_run_that_goes_on_with_more_steps_ends_at_the_same_targets(stop):
    """From every stage; the second of two extensions still knows the first timetable."""
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(stop)))
    before = optimizer.final_bits
    for more in (20, 40):
        state, groups = copy.deepcopy(optimizer.state_dict()), optimizer.groups_to_remove
        optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS + more)
        optimizer.load_state_dict(state)
        list(train(model, optimizer, range(optimizer.step_count, TOTAL_STEPS + more - 10)))
        assert optimizer.stage_at(optimizer.step_count) is Stage.COOLDOWN
        assert optimizer.removed.sum() == optimizer.groups_to_remove == groups
        assert before is None or torch.equal(optimizer.final_bits, before)


def test_a_state_that_does_not_know_its_timetable_stays_in_its_cooldown():
    """It was saved by an older version."""
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    state = copy.deepcopy(optimizer.state_dict())
    del state["qasso"]["schedule"]
    longer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), 3 * TOTAL_STEPS)
    longer.load_state_dict(state)
    assert longer.schedule.stage_at(TOTAL_STEPS) is Stage.JOINT
    assert longer.stage_at(TOTAL_STEPS) is Stage.COOLDOWN
    list(train(model, longer, range(TOTAL_STEPS, TOTAL_STEPS + 5)))
    assert torch.equal(longer.removed, optimizer.removed)
    assert torch.equal(longer.final_bits, optimizer.final_bits)


def test_a_run_resumes_on_a_model_that_was_prepared_on_another_batch():
    """Which grids are signed comes with the model's state, after the optimizer was made."""
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(45)))
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    list(train(model, optimizer, range(45, TOTAL_STEPS)))
    other = {"pixel_values": batch(0)["pixel_values"].abs()}
    resumed = prepare_model(tiny_vit().train(), CONFIG, other)
    second = create_optimizer(resumed, OPTIMIZERS["adamw"](resumed.parameters()), TOTAL_STEPS)
    assert not torch.equal(second.widths.signed, optimizer.widths.signed)
    resumed.load_state_dict(states[0])
    second.load_state_dict(states[1])
    list(train(resumed, second, range(45, TOTAL_STEPS)))
    assert torch.equal(second.widths.bits(), optimizer.widths.bits())
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_mix_of_one_saliency_is_a_run_with_that_saliency():
    models = []
    for changes in ({"saliency": "fisher"}, {"saliency": "mix", "saliency_weights": [0, 0, 2]}):
        model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | changes))
        optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
        list(train(model, optimizer, range(TOTAL_STEPS)))
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


def test_removed_groups_stay_zero_under_momentum_and_decay():
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["sgd"](model.parameters()), TOTAL_STEPS)
    seen = torch.zeros_like(optimizer.removed)
    for _ in train(model, optimizer, range(TOTAL_STEPS)):
        assert (optimizer.removed | ~seen).all()  # nothing comes back
        seen = optimizer.removed.clone()
        for parameter, dim, positions in optimizer.space.owned_positions(seen):
            assert not parameter.index_select(dim, positions).any()


def test_a_learning_rate_of_zero_still_reaches_the_targets():
    model = prepared()
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.0), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert optimizer.removed.sum() == optimizer.groups_to_remove
    assert optimizer.widths.bits()[weight_rows(optimizer)].max() <= CONFIG.weight_bits[1] + BITS_TOLERANCE


def test_parameter_groups_of_any_shape_are_kept():
    """Groups with as many tensors of other shapes: comparing them by value would fail."""
    model = prepared()
    norm = model.vit.layernorm.weight
    groups = [{"params": [p for p in model.parameters() if p is not norm]}, {"params": [norm], "lr": 1e-3}]
    optimizer = create_optimizer(model, torch.optim.SGD(groups, lr=0.1), TOTAL_STEPS)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1e-3, CONFIG.quantizer_learning_rate]


def test_quantizers_have_their_own_rate_and_no_decay():
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    *others, group = optimizer.param_groups
    assert group["weight_decay"] == 0.0
    assert group["lr"] == CONFIG.quantizer_learning_rate
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("quantizer" in names[id(p)] for p in group["params"])
    assert not any("quantizer" in names[id(p)] for other in others for p in other["params"])


@pytest.mark.parametrize("given", [{"lr": None}, {"lr": 1e-2, "relative_step": False}], ids=str)
def test_adafactors_own_step_sizes_are_not_for_quantizers(given):
    """They are relative to the parameter, which is a logarithm here: a rate of 1e-2 would move ln d by 0.1."""
    model = prepared()
    optimizer = create_optimizer(model, Adafactor(model.parameters(), **given), TOTAL_STEPS)
    before = optimizer.widths.log_step_size()
    list(train(model, optimizer, range(1)))
    assert 0 < (optimizer.widths.log_step_size() - before).abs().max() < 2 * CONFIG.quantizer_learning_rate


class Averaging(torch.optim.Optimizer):
    """Trains y and evaluates the mean x of all y, as schedule-free optimizers do: the parameters are y or x by mode."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
                    mean = self.state[p].setdefault("mean", p.clone())
                    mean.lerp_(p, 1 / group["steps"])

    @torch.no_grad()
    def exchange(self):
        for p, state in self.state.items():
            other = state["mean"].clone()
            state["mean"].copy_(p)
            p.copy_(other)

    train = eval = exchange


@pytest.mark.parametrize("steps", [3, 12, 24, TOTAL_STEPS])
def test_zeros_and_widths_hold_in_both_modes_of_a_base_optimizer(steps):
    model = prepared()
    optimizer = create_optimizer(model, Averaging(model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(steps)))
    removed = int(optimizer.removed.sum())
    assert (steps >= TOTAL_STEPS) == (removed == optimizer.groups_to_remove)
    for change in (optimizer.eval, optimizer.train):
        before = model.classifier.weight.clone()
        change()
        assert not torch.equal(model.classifier.weight, before)
        assert sum(map(len, model.geta.qadg.zero_groups(model).values())) == removed
        if optimizer.final_bits is not None:
            torch.testing.assert_close(optimizer.widths.bits(), optimizer.final_bits, rtol=0, atol=BITS_TOLERANCE)


def test_a_run_whose_last_periods_were_skipped_does_not_end_without_a_word(caplog):
    model = prepared(dataclasses.replace(CONFIG, joint_steps=0.65, warmup_steps=0.1, projection_steps=0.2))
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS - 5)))
    finalize_model(model)
    assert f"{int(optimizer.removed.sum())} of {optimizer.groups_to_remove} groups are removed" in caplog.text


def test_a_run_without_pruning_keeps_every_group():
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | {"group_sparsity": 0.0}))
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert optimizer.removed.sum() == optimizer.groups_to_remove == 0
    assert measure_compression(model).group_sparsity == 0
    finalize_model(model)


PRUNING_ONLY = GETAConfig.from_dict(CONFIG.to_dict() | {"weight_bits": None, "activation_bits": None})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_only_prunes_ends_in_a_smaller_float_model(name, tmp_path):
    model = prepared(PRUNING_ONLY)
    assert [type(module) for module in model.modules()] == [type(module) for module in tiny_vit().modules()]
    optimizer = create_optimizer(model, OPTIMIZERS[name](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    total = sum(axis.size for axis in model.geta.qadg.axes)
    removed = model.geta.qadg.zero_groups(model)
    assert sum(map(len, removed.values())) == round(CONFIG.group_sparsity * total) == optimizer.removed.sum()
    cost = measure_compression(model, finalized=True)
    assert (cost.mean_weight_bits, cost.mean_activation_bits) == (32, 32)
    assert cost.tensor_bytes == 4 * cost.parameters
    small, inputs = finalize_model(model), {"pixel_values": batch(99)["pixel_values"]}
    assert sum(p.numel() for p in small.parameters()) == cost.parameters < cost.dense_parameters
    assert output_difference(model, small, inputs) < 1e-5  # the same sums, in another order
    small.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    assert output_difference(small, loaded, inputs) == 0


def test_a_run_that_only_prunes_is_the_base_optimizer_until_its_joint_stage():
    ours, plain = prepared(PRUNING_ONLY), tiny_vit().train()
    optimizer, base = (OPTIMIZERS["adamw"](model.parameters()) for model in (ours, plain))
    optimizer = create_optimizer(ours, optimizer, TOTAL_STEPS)
    steps = range(optimizer.schedule.warmup_steps + optimizer.schedule.projection_steps)
    for _ in zip(train(ours, optimizer, steps), train(plain, base, steps), strict=True):
        for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_a_run_stopped_before_it_pruned_anything_ends_in_the_same_float_model(tmp_path):
    model = prepared(PRUNING_ONLY)
    finalize_model(model).save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    assert output_difference(model, loaded, {"pixel_values": batch(99)["pixel_values"]}) == 0


class OneLayer(PreTrainedModel):
    """Its only layer ties the inputs to the outputs: nothing can be pruned."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values.flatten(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_where_everything_trains_nothing_is_said_of_parameters_that_do_not(caplog):
    model = prepared()
    create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    assert "does not train" not in caplog.text


@pytest.mark.parametrize("saliency", ["taylor", "magnitude"])
def test_a_model_without_prunable_axes_is_quantized_all_the_same(saliency, tmp_path):
    changes = {"group_sparsity": 0, "saliency": saliency, "modules_to_not_convert": []}
    config = GETAConfig.from_dict(CONFIG.to_dict() | changes)
    inputs = {"pixel_values": batch(0)["pixel_values"]}
    model = prepare_model(OneLayer(PretrainedConfig()), config, inputs)
    assert model.geta.qadg.axes == ()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert config.weight_bits[0] <= measure_compression(model).mean_weight_bits <= config.weight_bits[1]
    small = finalize_model(model)
    assert output_difference(model, small, inputs) < 1e-6
    small.save_pretrained(tmp_path)
    assert output_difference(small, OneLayer.from_pretrained(tmp_path), inputs) == 0


def test_a_model_without_prunable_axes_is_not_pruned_without_a_word():
    with pytest.raises(ValueError, match="no prunable axis found in OneLayer"):
        prepare_model(OneLayer(PretrainedConfig()), PRUNING_ONLY, {"pixel_values": batch(0)["pixel_values"]})


def test_a_state_of_another_model_is_refused():
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    state = copy.deepcopy(optimizer.state_dict())
    state["qasso"]["removed"] = state["qasso"]["removed"][:-1]
    with pytest.raises(ValueError, match="pruning groups"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="without compression"):
        optimizer.load_state_dict(optimizer.base.state_dict())


def test_frozen_parameters_are_neither_pruned_nor_written(caplog):
    model = prepared()
    frozen = {name: p for name, p in model.named_parameters() if ".layers.0." in name and "quantizer" not in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](trainable), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert optimizer.removed.sum() == optimizer.groups_to_remove == (4 + 24) // 2  # of the second layer alone
    assert caplog.text.count("2 of 4 prunable axes hold a parameter that does not train") == 1
    assert "may go, 28 of 56" in caplog.text
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="does not train"):
        create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), TOTAL_STEPS)


def test_what_is_in_no_group_of_the_optimizer_is_not_pruned():
    """Nobody clears its gradients: scores would be sums over the whole run."""
    model = prepared()
    left_out = {name: p for name, p in model.named_parameters() if ".layers.0." in name and "quantizer" not in name}
    before = {name: parameter.clone() for name, parameter in left_out.items()}
    others = [p for p in model.parameters() if not any(p is q for q in left_out.values())]
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](others), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert optimizer.removed.sum() == optimizer.groups_to_remove == (4 + 24) // 2  # of the second layer alone
    assert all(torch.equal(parameter, before[name]) for name, parameter in left_out.items())


def test_the_first_decision_has_seen_a_gradient():
    """Without a projection stage: ties, which go to the lower number, would empty the first axes."""
    config = GETAConfig.from_dict(
        CONFIG.to_dict() | {"projection_steps": 0, "initial_bits": 8, "weight_bits": [3, 8], "pruning_periods": 1}
    )
    model = prepared(config)
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    per_axis = optimizer.removed.split(optimizer.space.axis_sizes)
    assert all(0 < part.sum() < len(part) - 1 for part in per_axis if len(part) == 24)


def test_a_batch_that_does_not_fit_leaves_the_model_as_it_came():
    model = tiny_vit()
    good = {"pixel_values": batch(0)["pixel_values"]}
    for bad in ({"pixel_values": torch.zeros(2, 3, 9, 9)}, {"pixel_values": torch.full((2, 3, 8, 8), torch.nan)}):
        with pytest.raises(ValueError, match="9|NaN"):
            prepare_model(model, CONFIG, good, [bad])
    prepare_model(model, CONFIG, good)


def test_a_calibration_batch_without_memory_for_it_is_refused_in_torchs_words():
    """By which those who find a batch size by trying know that a smaller one would do."""

    def refuse(module, args, inputs):
        if len(inputs["pixel_values"]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = tiny_vit()
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    good = {"pixel_values": batch(0)["pixel_values"]}
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        prepare_model(model, CONFIG, good, [good, {"pixel_values": good["pixel_values"].repeat(2, 1, 1, 1)}])
    prepare_model(model, CONFIG, good)


@pytest.mark.parametrize("sparsity", [0.5, 0.6])
def test_with_blocks_and_least_sizes_exactly_the_asked_groups_go_too(sparsity):
    changes = {"group_divisible": 5, "min_groups": 2, "group_sparsity": sparsity}
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | changes))
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    seen = torch.zeros_like(optimizer.removed)
    for _ in train(model, optimizer, range(TOTAL_STEPS)):
        assert (optimizer.removed | ~seen).all()
        seen = optimizer.removed.clone()
    axes, removed = model.geta.qadg.axes, model.geta.qadg.zero_groups(model)
    assert sum(map(len, removed.values())) == round(sparsity * sum(axis.size for axis in axes))
    for axis in axes:
        kept = axis.size - len(removed.get(axis.name, ()))
        assert kept >= 2
        assert axis.size <= 5 or kept == axis.size or kept % 5 == 0


def test_a_number_of_groups_that_blocks_do_not_reach_becomes_the_nearest_and_is_logged_once(caplog):
    """Two layers of 24 units in blocks of 16 lose 8 or none, two of 4 heads lose up to 3 each: 0-6, 8-14, 16-22."""
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | {"group_divisible": 16, "group_sparsity": 7 / 56}))
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert optimizer.removed.sum() == optimizer.groups_to_remove == 8
    assert len([record for record in caplog.records if "asks for 7 of 56 groups" in record.message]) == 1


def test_a_share_that_rounds_to_no_group_is_told(caplog):
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | {"group_sparsity": 0.4 / 56}))
    create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    assert "of 56 groups rounds to none, and none is removed: write more than 0.0089" in caplog.text
    caplog.clear()
    for share in (0.0, 0.6 / 56):
        model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | {"group_sparsity": share}))
        optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
        assert optimizer.groups_to_remove == round(share * 56)
    assert "rounds to none" not in caplog.text


def test_more_groups_than_may_go_are_refused():
    model = prepared(GETAConfig(group_sparsity=0.99))
    with pytest.raises(ValueError, match="let at most"):
        create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), 1000)


def test_an_optimizer_of_matrices_alone_is_refused():
    model = prepared(dataclasses.replace(CONFIG, group_sparsity=0))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    with pytest.raises(ValueError, match="Muon steps matrices only"):
        create_optimizer(model, torch.optim.Muon(matrices, lr=1e-2), TOTAL_STEPS)
