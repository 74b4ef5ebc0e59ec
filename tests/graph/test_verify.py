"""What was found is tried: a wrong search space never gets to training, and what fails takes nothing else along."""

import copy
import dataclasses
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_geta import build_qadg, verify_qadg
from hf_geta.graph import build, capture
from hf_geta.graph.rules import registry, rule
from hf_geta.graph.trial import failing, other_inputs
from tests.zoo.cases import all_cases
from tests.zoo.cases import build as zoo_model
from tests.zoo.law import randomize_

ROW = {"x": torch.randn(2, 7, 5)}


class Layers(nn.Module):
    """Two hidden axes in a row; `between` sees the first hidden states."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.between = between

    def forward(self, x):
        hidden = self.between(F.relu(self.first(x)))
        return self.last(F.relu(self.second(hidden)))


@torch.library.custom_op("hf_geta_tests::reverse", mutates_args=())
def reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


reverse.register_fake(torch.empty_like)


@torch.library.custom_op("hf_geta_tests::add_twelve", mutates_args=())
def add_twelve(x: torch.Tensor) -> torch.Tensor:
    return x + torch.arange(12.0)


@add_twelve.register_fake
def _(x):
    return x + x.new_empty(12)


@pytest.fixture(autouse=True)
def wrong_rules(monkeypatch):
    """A rule that says that entries stay where they are, for operators that do not keep them there."""
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    rule("hf_geta_tests::reverse", "hf_geta_tests::add_twelve")(lambda axes, x: x)


def test_the_law_holds_for_every_family_on_inputs_of_another_length(family):
    for inputs in other_inputs(family.inputs):
        verification = verify_qadg(family.model, inputs, family.qadg, seed=3)
        assert verification.holds, str(verification)
        assert verification.moved > 1e-2
        assert verification.error < 1e-4
        removed, total = verification.removed
        assert 0.2 * total < removed <= 0.5 * total


def test_an_axis_with_a_wrong_member_is_named():
    model = Layers(nn.Identity()).eval()
    qadg = build_qadg(model, ROW)
    first, second = qadg.axes
    *members, last = first.members
    wrong = dataclasses.replace(first, members=(*members, dataclasses.replace(last, indices=last.indices.roll(1, 0))))
    verification = verify_qadg(model, ROW, dataclasses.replace(qadg, axes=(wrong, second)))
    assert not verification.holds
    assert list(verification.failures) == [first.name]
    assert verify_qadg(model, ROW, qadg).holds


@pytest.mark.parametrize(
    "operator", [lambda x: reverse(x), lambda x: add_twelve(x)], ids=["wrong numbers", "wrong shapes"]
)
def test_what_a_wrong_rule_promises_is_frozen_with_the_reason_and_the_rest_goes_on(operator, caplog):
    model = Layers(operator).eval()
    promised = build_qadg(model, ROW, verify=False)
    qadg = build_qadg(model, ROW)
    assert [axis.size for axis in promised.axes] == [12, 10]
    assert [axis.size for axis in qadg.axes] == [10]
    assert "tried and found wrong" in qadg.explain("first.weight")
    assert any(
        record.levelno == logging.WARNING and promised.axes[0].name in record.message for record in caplog.records
    )
    assert all(promised.axes[0].name not in operation.axes for operation in qadg.operations)
    assert verify_qadg(model, ROW, qadg).holds


def test_half_precision_is_tried_as_well(caplog):
    model, inputs = Layers(lambda x: reverse(x)).eval().bfloat16(), {"x": ROW["x"].bfloat16()}
    qadg = build_qadg(model, inputs)
    assert [axis.size for axis in qadg.axes] == [10]
    assert verify_qadg(model, inputs, qadg).holds
    assert "could not be tried" not in caplog.text


def test_a_model_that_cannot_be_tried_on_its_weights_is_tried_on_shapes_and_says_so(caplog):
    model = Layers(lambda x: add_twelve(x)).eval().to("meta")
    inputs = {"x": torch.empty(2, 7, 5, device="meta")}
    qadg = build_qadg(model, inputs, verify=True)
    assert [axis.size for axis in qadg.axes] == [10]
    assert "could not be tried on its weights" in caplog.text
    with pytest.raises(ValueError, match="on the meta device: load it with its weights"):
        verify_qadg(model, inputs, qadg)


class Large(nn.Module):
    """Has no memory where it computes with the numbers of what it `refuses`; a trace has none."""

    def __init__(self, refuses):
        super().__init__()
        self.refuses = refuses

    def forward(self, x):
        if self.refuses(x) and not (torch.compiler.is_compiling() or isinstance(x, FakeTensor)):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x


def test_a_trial_without_memory_for_a_pruned_copy_freezes_nothing_and_says_so(caplog):
    qadg = build_qadg(Layers(Large(lambda x: x.shape[-1] < 12)).eval(), ROW)
    assert [axis.size for axis in qadg.axes] == [12, 10]
    assert "could not be tried on its weights: OutOfMemoryError" in caplog.text


def test_a_trial_without_memory_for_a_copy_in_float32_does_not_blame_the_batch(caplog):
    held = []

    def refuses(x):
        if x.dtype == torch.float32:
            held.append(weakref.ref(x))
        return any(copied() is not None for copied in held)

    model, inputs = Layers(Large(refuses)).eval().bfloat16(), {"x": ROW["x"].bfloat16()}
    assert [axis.size for axis in build_qadg(model, inputs).axes] == [12, 10]
    assert "could not be tried on its weights: OutOfMemoryError" in caplog.text


def test_a_batch_without_memory_for_it_is_no_matter_of_the_groups():
    """Who finds a batch size by trying, as `auto_find_batch_size`, hears of it in torch's words."""
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        build_qadg(Layers(Large(lambda x: True)).eval(), ROW)


def test_shapes_are_tried_where_there_are_no_weights():
    with torch.device("meta"):
        model = Layers(lambda x: add_twelve(x)).eval()
    inputs = {"x": torch.empty(2, 7, 5, device="meta")}
    assert [axis.size for axis in build_qadg(model, inputs).axes] == [10]


def test_trying_leaves_the_model_as_it_is(family):
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
    versions = [parameter._version for parameter in family.model.parameters()]  # what a backward looks at
    generator = torch.get_rng_state()
    verify_qadg(family.model, family.inputs, family.qadg)
    after = family.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(generator, torch.get_rng_state())
    assert versions == [parameter._version for parameter in family.model.parameters()]


def test_failing_keeps_all_that_can_go_together():
    def law(names):
        return "wrong" if "b" in names or {"d", "f"} <= set(names) else ""

    failures = failing("abcdefg", law)
    assert set(failures) == {"b", "f"}
    assert failing("aceg", law) == {}


class Deciding(nn.Module):
    """Takes a branch by the numbers in a tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        hidden = self.up(x)
        hidden = hidden.relu() if (hidden.abs().sum() > 0).item() else hidden.sum(-1, keepdim=True).expand_as(hidden)
        return self.down(hidden)


def test_a_forward_that_decides_by_numbers_is_traced_along_its_path_and_says_so(caplog):
    model = Deciding().eval()
    qadg = build_qadg(model, ROW)
    assert [axis.size for axis in qadg.axes] == [12]
    assert "could not be exported" in caplog.text
    assert "the path that these inputs take" in caplog.text
    assert verify_qadg(model, ROW, qadg).holds


def test_a_path_is_traced_where_there_is_memory_for_the_batch_if_not_for_twice_as_much(caplog):
    model = nn.Sequential(Large(lambda x: len(x) > 2), Deciding()).eval()
    assert [axis.size for axis in build_qadg(model, {"input": ROW["x"]}).axes] == [12]
    assert "could not be tried on its weights: OutOfMemoryError" in caplog.text
    model[0].refuses = lambda x: len(x) > 1
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        build_qadg(model, {"input": ROW["x"]})


class Lengthy(Deciding):
    """Mixes the hidden entries of longer inputs only."""

    def forward(self, x):
        hidden = self.up(x)
        if (hidden.abs().sum() > 0).item() and len(x) > 2:
            hidden = hidden.softmax(-1)
        return self.down(hidden)


def test_a_path_is_tried_on_another_batch_before_it_is_trusted():
    assert build_qadg(Lengthy().eval(), ROW).axes == ()


def test_a_path_gives_the_axes_of_the_exported_graph(family, monkeypatch):
    def stop(*_):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(capture, "export", stop)
    found = build.build_qadg(family.model, family.inputs, verify=False)
    assert str(found) == str(family.qadg)
    assert found.operations == family.qadg.operations


class Steep(Layers):
    """Turns differences in the last bit of a float32 into other numbers."""

    def forward(self, x):
        return torch.sin(1e6 * super().forward(x))


def test_rounding_is_no_reason_to_freeze():
    model = Steep(nn.Identity()).eval()
    assert [axis.size for axis in build_qadg(model, ROW).axes] == [12, 10]


def test_a_model_traced_along_one_path_is_right_on_padded_batches_and_under_eager_attention():
    """Without a mask attention repeats the keys by itself, and no operator tells how many queries each has."""
    (case,) = (case for case in all_cases({"dbrx"}) if "Causal" in case.model_class)
    model = zoo_model(case)
    randomize_(model)
    inputs = {"input_ids": torch.randint(1, 20, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    qadg = build_qadg(model, inputs)
    removed = {axis.name: [0] for axis in qadg.axes}
    assert any("head" in axis.kind for axis in qadg.axes)
    masked, pruned = copy.deepcopy(model), qadg.prune(model, removed)
    qadg.zero_(masked, removed)
    inputs["attention_mask"][0, :3] = 0
    for implementation in ("sdpa", "eager"):
        for one in (masked, pruned):
            one.set_attn_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(pruned(**inputs).logits, masked(**inputs).logits, rtol=1e-4, atol=1e-4)
