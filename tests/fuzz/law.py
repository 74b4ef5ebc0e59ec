"""The law of a run: refused in clear words before any step, or its targets hold in every step and at the end.

And what comes of it, finalized, saved and loaded, computes in float what the masked model computes.
"""

from __future__ import annotations

import copy
import random
import re
import tempfile

import torch

from hf_geta import GETAConfig, build_qadg, create_optimizer, finalize_model, prepare_model
from hf_geta.checkpoint.layers import set_backend_
from hf_geta.measure import float_inputs, measure_compression, output_difference
from hf_geta.optim.schedule import Stage
from hf_geta.quantization.layers import quantized_layers
from tests.fuzz.grammar import STEPS
from tests.fuzz.modules import make_batch, make_model

ADVICE = re.compile(r"\b(write|pass|choose|use|shorten|check|let|raise|start|lower|relax|train|drop|take)\b", re.I)
DIVERGED = "diverged"  # the model's own doing: products of branches, trained by plain SGD
EXACT = 1e-4  # relative: sums are taken over fewer zeros, in another order
ROUNDING = 1e-9
IN_DOUBLE, CUTS = 1e-10, 4


def run_or_refusal(model_values, settings, optimizer):
    """ "kept", or what the refusal said.

    Raises:
        AssertionError: where the law is broken.
    """
    model = make_model(*model_values)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [make_batch(*model_values[:2], seed) for seed in range(3)]
    inputs = [{"x": batch["x"]} for batch in batches]
    try:
        config = GETAConfig(**settings)
        prepare_model(model, config, inputs[0], inputs)
    except ValueError as refusal:
        check_words(refusal)
        after = model.state_dict()
        assert after.keys() == before.keys(), "a refused model is left as it came"
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        return str(refusal)
    base = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](model.parameters(), lr=1e-3)
    try:
        qasso = create_optimizer(model, base, STEPS)
    except ValueError as refusal:
        check_words(refusal)
        return str(refusal)
    model.train()
    for step in range(STEPS):
        qasso.zero_grad()
        loss = model(**batches[step % 3])["loss"]
        if not loss.isfinite():
            return DIVERGED
        loss.backward()
        qasso.step()
        check_step(model, qasso, config)
    check_end(model, qasso, config)
    check_what_is_saved(model.eval(), inputs[0])
    return "kept"


def check_words(refusal):
    assert ADVICE.search(str(refusal)), f"it does not say what to do: {refusal}"


def check_step(model, qasso, config):
    """After warm-up every width is inside its range; everything is finite; K groups are gone when they should be."""
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    stage = qasso.schedule.stage_at(qasso.step_count - 1)
    if stage is not Stage.WARMUP:
        for name, layer in quantized_layers(model).items():
            for quantizer in filter(None, (layer.weight_quantizer, layer.input_quantizer)):
                allowed = config.allowed_bits(quantizer.widths)
                upper = allowed[-1] if stage is not Stage.PROJECTION else config.initial_bits
                assert allowed[0] - 1e-3 <= float(quantizer.bits.detach()) <= upper + 1e-3, (
                    name,
                    stage,
                    float(quantizer.bits.detach()),
                )
    removed = qasso.removed.sum()
    if stage is Stage.COOLDOWN:
        assert removed == qasso.groups_to_remove
    assert sum(map(len, model.geta.qadg.zero_groups(model).values())) >= removed


def check_end(model, qasso, config):
    total = sum(axis.size for axis in model.geta.qadg.axes)
    removed = model.geta.qadg.zero_groups(model)
    assert sum(map(len, removed.values())) == qasso.groups_to_remove
    assert all(len(removed.get(axis.name, ())) < axis.size for axis in model.geta.qadg.axes)
    for axis in model.geta.qadg.axes:
        kept = axis.size - len(removed.get(axis.name, ()))
        assert kept == axis.size or kept >= min(config.min_groups, axis.size)
        assert kept == axis.size or axis.size <= config.group_divisible or kept % config.group_divisible == 0
    if config.has_budget:
        assert qasso.targets.gap(qasso.removed) <= ROUNDING
    elif config.group_divisible == 1 and not config.uniform:
        assert qasso.groups_to_remove == round(config.group_sparsity * total)
    for layer in quantized_layers(model).values():
        for quantizer in filter(None, (layer.weight_quantizer, layer.input_quantizer)):
            assert (
                min(abs(float(quantizer.bits.detach()) - bits) for bits in config.allowed_bits(quantizer.widths)) < 1e-3
            )
    if config.target_bops is not None:
        assert measure_compression(model).relative_bops <= config.target_bops * (1 + 1e-4)  # of rounded figures


def check_what_is_saved(model, inputs):
    small = finalize_model(model)
    set_backend_(small, "reference")
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    set_backend_(loaded, "reference")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert output_difference(small, loaded, inputs) == 0, "loaded is not what was saved"
    with float_inputs(model), float_inputs(loaded):
        difference = output_difference(model, loaded, inputs)
    assert difference <= EXACT, f"loaded and masked differ by {difference:.1e}"


def check_cuts(model_values, seed):
    """Whichever groups go, of one axis or of several: the cut model computes what the masked one does, in double.

    Returns:
        How many axes there were.
    """
    model, draw = make_model(*model_values).eval(), random.Random(seed)
    inputs = {"x": make_batch(*model_values[:2])["x"]}
    qadg = build_qadg(model, inputs)
    model.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    for _ in range(CUTS):
        removed = {
            axis.name: draw.sample(range(axis.size), draw.randint(1, axis.size - 1))
            for axis in qadg.axes
            if draw.random() < 0.5
        }
        masked = copy.deepcopy(model)
        qadg.zero_(masked, removed)
        difference = output_difference(masked, qadg.prune(model, removed), inputs)
        assert difference <= IN_DOUBLE, f"without {removed} they differ by {difference:.1e}"
    return len(qadg.axes)
