"""What is asked of the inputs, and what a capture leaves behind (nothing)."""

import pytest
import torch
from torch import nn

from hf_geta.graph.capture import capture
from hf_geta.graph.integers import Attribute, SizeOf, expression_of


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.calls = 2, 0
        self.project = nn.Linear(6, 6)

    def forward(self, hidden_states, scale=1.0):
        self.calls += 1
        self.last_length = hidden_states.shape[1]
        split = self.project(hidden_states).view(hidden_states.shape[0], -1, self.heads, 3)
        return split[:, : hidden_states.shape[1]] * scale


INPUTS = {"hidden_states": torch.randn(2, 4, 6)}


def test_ints_given_to_an_operator_say_where_they_come_from():
    captured = capture(Attention(), INPUTS)
    size, rest, heads, three = captured.integers["view"]
    assert (size, rest, heads, three) == (2, -1, 2, 3)
    assert expression_of(size) == SizeOf("hidden_states", 0)
    assert expression_of(heads) == Attribute("heads")
    assert (expression_of(rest), expression_of(three)) == (-1, 3)
    assert captured.attributes[Attribute("project.in_features")] == 6


def test_placeholders_are_told_apart():
    captured = capture(Attention(), INPUTS)
    assert sorted(captured.sources.values()) == ["an input of the model", "project.bias", "project.weight"]


def test_what_the_forward_writes_stays_off_the_model():
    model = Attention()
    before = dict(vars(model))
    capture(model, INPUTS)
    assert vars(model) == before
    assert model.calls == 0


def test_tied_parameters_are_one_tensor():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(capture(model, {"input": torch.randn(1, 4)}).tensors) == ["0.weight"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": torch.randn(1, 4)}, "Attention.forward does not take pixel_values; it takes hidden_states"),
        ({}, "write a dict with arguments of Attention.forward: hidden_states, scale"),
        (torch.randn(2, 4, 6), "write a dict with arguments of Attention.forward: hidden_states, scale"),
        (
            {"hidden_states": torch.randn(2, 4, 5)},
            r"Attention.forward cannot be traced with inputs {hidden_states: torch.float32 \(2, 4, 5\)}",
        ),
        ({"scale": 2.0}, "Attention.forward cannot be traced with inputs {scale: 2.0}: .*hidden_states"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_would(inputs, message):
    with pytest.raises(ValueError, match=message):
        capture(Attention(), inputs)


def test_a_function_that_a_copy_would_not_take_along_is_refused_with_the_module_that_has_it():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    original = model[1].forward
    model[1].forward = lambda x: original(x)
    with pytest.raises(ValueError, match="^1 has a function as its own forward"):
        capture(model, {"input": torch.randn(3, 4)})


def test_a_compiled_model_is_refused_before_it_compiles():
    with pytest.raises(ValueError, match="compiled._orig_mod"):
        capture(torch.compile(nn.Linear(4, 2)), {"input": torch.randn(3, 4)})
