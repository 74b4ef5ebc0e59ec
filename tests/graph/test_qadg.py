"""The law of the search space, for every family: masked = pruned = saved and loaded; float and quantized alike."""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn

import hf_geta.hf_quantizer  # noqa: F401  registers the loader
from hf_geta.config import GETAConfig
from hf_geta.graph.build import build_qadg
from hf_geta.graph.integers import TracedInt
from hf_geta.graph.qadg import QADG
from hf_geta.quantization.calibration import calibrate_
from hf_geta.quantization.swap import quantize_modules_

# Removing terms of a sum changes the order of the others; outputs are of order one.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def members(qadg: QADG) -> list:
    return [
        (axis.name, axis.kind, axis.size, [(m.tensor, m.dim, m.indices.tolist()) for m in axis.members])
        for axis in qadg.axes
    ]


def test_axes_are_those_of_the_family(family):
    found = defaultdict(list)
    for axis in family.qadg.axes:
        found[axis.kind].append(axis.size)
    assert dict(found) == family.kinds


@pytest.mark.parametrize("seed", [0, 1])
def test_pruned_model_equals_masked_model(family, seed):
    removed = family.some_groups(seed)
    masked = family.copy()
    family.qadg.zero_(masked, removed)
    small = family.qadg.prune(family.model, removed)
    assert (family.outputs(masked) - family.outputs(family.model)).abs().max() > 1e-2
    torch.testing.assert_close(family.outputs(small), family.outputs(masked), **ROUNDING)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in family.model.parameters())


@pytest.mark.parametrize("number", [0, -1])
def test_pruned_model_equals_masked_model_for_one_axis_alone(family, number):
    axis = family.qadg.axes[number]
    removed = {axis.name: range(axis.size - 1)}
    masked = family.copy()
    family.qadg.zero_(masked, removed)
    assert not torch.equal(family.outputs(masked), family.outputs(family.model))
    small = family.qadg.prune(family.model, removed)
    torch.testing.assert_close(family.outputs(small), family.outputs(masked), **ROUNDING)


def test_pruned_model_equals_its_saved_and_loaded_self(family, tmp_path):
    small = family.qadg.prune(family.model, family.some_groups())
    small.save_pretrained(tmp_path)
    loaded = type(family.model).from_pretrained(tmp_path).eval()
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    torch.testing.assert_close(family.outputs(loaded), family.outputs(small), rtol=0, atol=0)


def test_a_loaded_pruned_model_can_be_pruned_again(family, tmp_path):
    family.qadg.prune(family.model, family.some_groups()).save_pretrained(tmp_path / "once")
    once = type(family.model).from_pretrained(tmp_path / "once").eval()
    qadg = build_qadg(once, family.inputs)
    axis = max(qadg.axes, key=lambda axis: axis.size)
    twice = qadg.prune(once, {axis.name: [0]})
    qadg.zero_(once, {axis.name: [0]})
    torch.testing.assert_close(family.outputs(twice), family.outputs(once), **ROUNDING)
    twice.save_pretrained(tmp_path / "twice")
    loaded = type(family.model).from_pretrained(tmp_path / "twice").eval()
    torch.testing.assert_close(family.outputs(loaded), family.outputs(twice), rtol=0, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_quantized_model_has_the_axes_of_the_float_model_and_the_same_law(family, granularity):
    model = family.copy()
    quantize_modules_(model, GETAConfig(weight_bits=(4, 8), activation_bits=(4, 8), granularity=granularity))
    calibrate_(model, [family.inputs], bits=8)
    qadg = build_qadg(model, family.inputs)
    assert members(qadg) == members(family.qadg)
    assert qadg.operations == family.qadg.operations
    removed = family.some_groups()
    dense = family.outputs(model)
    small = family.qadg.prune(model, removed)
    family.qadg.zero_(model, removed)
    assert (family.outputs(model) - dense).abs().max() > 1e-2
    # No step of the grid may tip over: inputs of a layer can differ in the last bit, so compare in the mean.
    difference = (family.outputs(small) - family.outputs(model)).abs().mean()
    assert difference < 1e-3 * dense.abs().mean()


def test_zero_groups_finds_what_zero_removed(family):
    removed = {name: sorted(groups) for name, groups in family.some_groups().items()}
    masked = family.copy()
    assert family.qadg.zero_groups(masked) == {}
    family.qadg.zero_(masked, removed)
    assert family.qadg.zero_groups(masked) == removed


def test_groups_of_all_axes_own_disjoint_entries_of_a_dimension(family):
    owners = defaultdict(list)
    for axis in family.qadg.axes:
        for member in axis.members:
            assert member.indices.dtype == torch.int64
            assert member.indices.shape[0] == axis.size
            owners[member.tensor, member.dim].append(member.indices.flatten())
    for parts in owners.values():
        indices = torch.cat(parts)
        assert indices.unique().numel() == indices.numel()


def test_names_are_unique_and_start_at_a_module(family):
    names = [axis.name for axis in family.qadg.axes]
    assert len(set(names)) == len(names)
    modules = dict(family.model.named_modules())
    assert all(name.rpartition(".")[0] in modules for name in names)


def test_multiply_accumulates_are_those_of_the_layers(family):
    weights = dict(family.model.named_parameters(remove_duplicate=False))
    linear = [op for op in family.qadg.operations if op.weight and weights[op.weight].ndim == 2]
    for operation in linear:  # an image or a text has so many rows per weight
        assert operation.macs % weights[operation.weight].numel() == 0
    assert all(operation.macs > 0 for operation in family.qadg.operations)


def test_multiply_accumulates_of_a_pruned_model_follow_from_the_axes(family):
    removed = family.some_groups()
    small = family.qadg.prune(family.model, removed)
    sizes = {axis.name: (axis.size, axis.size - len(removed[axis.name])) for axis in family.qadg.axes}
    expected = []
    for operation in family.qadg.operations:
        macs = operation.macs
        for name in operation.axes:
            macs = macs * sizes[name][1] // sizes[name][0]
        expected.append(macs)
    assert [operation.macs for operation in build_qadg(small, family.inputs).operations] == expected


def test_the_model_is_left_untouched(family):
    model = family.copy().train()
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    qadg = build_qadg(model, family.inputs)
    qadg.prune(model, family.some_groups())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == family.model.config.to_dict()
    assert not any(isinstance(value, TracedInt) for module in model.modules() for value in vars(module).values())


def test_qadg_survives_pickle_and_copy(family):
    for other in (pickle.loads(pickle.dumps(family.qadg)), copy.deepcopy(family.qadg)):
        assert members(other) == members(family.qadg)
        assert str(other) == str(family.qadg)
        other.prune(family.model, family.some_groups())


def test_table_has_a_line_for_every_axis(family):
    lines = str(family.qadg).splitlines()
    assert len(lines) == len(family.qadg.axes) + 2
    assert all(line.startswith(axis.name) for axis, line in zip(family.qadg.axes, lines[1:-1], strict=True))


def test_every_dimension_is_prunable_or_explained(family):
    for name, parameter in family.model.named_parameters():
        if max(parameter.shape, default=1) > 1:
            text = family.qadg.explain(name)
            for dim, size in enumerate(parameter.shape):
                assert size == 1 or f"dimension {dim}: " in text


def test_gpt2_split_size_follows_its_heads():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=8))
    qadg = build_qadg(model, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    small = qadg.prune(model, {"transformer.h.0.attn.heads": [1]})
    assert small.transformer.h[0].attn.split_size == 24
    assert small.config.quantization_config["attributes"] == {"transformer.h.0.attn.split_size": 24}
    assert small.lm_head.weight is small.transformer.wte.weight


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden + self.second(hidden).relu())


def test_plain_torch_modules_work_without_a_config():
    model, inputs = Residual(), {"x": torch.randn(2, 6)}
    qadg = build_qadg(model, inputs)
    assert [(axis.name, axis.size) for axis in qadg.axes] == [("hidden", 8)]
    small = qadg.prune(model, {"hidden": [0, 5]})
    qadg.zero_(model, {"hidden": [0, 5]})
    assert (small.second.in_features, small.second.out_features) == (6, 6)
    torch.testing.assert_close(small(**inputs), model(**inputs), **ROUNDING)


class Cached(Residual):
    """As LeViT does it: something computed from the weights is kept until the next training."""

    cache = None

    def train(self, mode=True):
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, x):
        self.cache = self.first(x) if self.cache is None else self.cache
        return self.last(self.cache)


def test_what_a_model_computed_from_its_weights_before_is_forgotten():
    model, inputs = Cached().eval(), {"x": torch.randn(2, 6)}
    qadg = build_qadg(model, inputs)
    with torch.no_grad():
        model(**inputs)
    small = qadg.prune(model, {"hidden": [0, 5]})
    qadg.zero_(model, {"hidden": [0, 5]})
    assert not small.training
    torch.testing.assert_close(small(**inputs), model(**inputs), **ROUNDING)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"heads": [0]}, "'heads' is no prunable axis; the axes are hidden"),
        ({"hidden": [8]}, r"hidden has groups 0 to 7, not \[8\]"),
        ({"hidden": [-1]}, r"hidden has groups 0 to 7, not \[-1\]"),
        ({"hidden": range(8)}, "hidden: all 8 groups would go; keep at least one"),
    ],
)
def test_what_cannot_be_removed_is_refused(removed, message):
    model = Residual()
    qadg = build_qadg(model, {"x": torch.randn(2, 6)})
    for act in (qadg.zero_, qadg.prune):
        with pytest.raises(ValueError, match=message):
            act(model, removed)


def test_unknown_names_cannot_be_explained():
    qadg = build_qadg(Residual(), {"x": torch.randn(2, 6)})
    with pytest.raises(ValueError, match="'nothing' is no axis and no tensor of the forward; the axes are hidden"):
        qadg.explain("nothing")


def test_a_model_without_prunable_axes_says_what_froze_them():
    qadg = build_qadg(nn.Sequential(nn.Linear(4, 4)), {"input": torch.randn(2, 4)})
    assert qadg.axes == ()
    assert qadg.explain_frozen() == "Frozen dimensions: 2 an output of the model; 1 an input of the model."
