"""Laws of the bytes that are counted without numbers."""

import itertools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_geta.plan.memory import LiveBytes, measure_optimizer, measure_pass, tensor_bytes

SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=100))


def tokens(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(batch, 32, dtype=torch.long, device="meta")}


def test_live_bytes_count_storages_once_and_forget_them():
    x = torch.zeros(1000)
    with LiveBytes([x]) as ledger:
        y = x + 1
        view = y[10:].view(-1)
        x.add_(1)
        assert ledger.now == 4000
        del y
        assert ledger.now == 4000
        del view
    assert (ledger.now, ledger.peak) == (0, 4000)


def test_a_linear_layer_keeps_its_input():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return torch.tanh(self.linear(x * 2))

    one = measure_pass(Layer(), {"x": torch.zeros(16, 8)})
    kept = 4 * 16 * (8 + 4)  # the input of the layer, the output of tanh
    loss = 4 * 16 * 4 + 2 * 4 + 8 * 16  # log softmax, the loss and its weight, targets
    assert one.activations == kept + loss
    assert one.peak > one.activations


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_pass_holds_what_a_real_one_does(autocast):
    """But for the mask and the repeated keys and values that an unpadded batch does without."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=1000))
    ids = torch.randint(0, 1000, (8, 64))
    planned = measure_pass(model, {"input_ids": ids}, autocast)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert planned.peak == pytest.approx(max(held), rel=0.1)


def test_activations_grow_with_the_batch(model):
    one, three = (measure_pass(model, tokens(batch)) for batch in (2, 6))
    assert three.activations == pytest.approx(3 * one.activations, rel=0.05)  # less what no batch changes: masks, RoPE


def test_mixed_precision_and_checkpointing_keep_less(model):
    full = measure_pass(model, tokens(8))
    assert measure_pass(model, tokens(8), autocast=torch.bfloat16).activations < 0.8 * full.activations
    checkpointed = measure_pass(model, tokens(8), checkpointing={})
    assert checkpointed.activations < full.activations / 3
    assert checkpointed.activations < checkpointed.peak < full.peak


def test_measuring_leaves_the_model_alone(model):
    before = dict(model.named_parameters())
    measure_pass(model, tokens(1), checkpointing={})
    assert dict(model.named_parameters()) == before
    assert all(p.grad is None and p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("optim", "states"), [("adamw_torch_fused", 2), ("adamw_torch", 2), ("sgd", 0), ("adagrad", 1)]
)
def test_optimizers_hold_their_moments(optim, states, model):
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", optim=optim, use_cpu=True), model)
    memory = measure_optimizer(kind, options, model.parameters())
    counters = 4 * len(list(model.parameters()))
    assert memory.state - states * tensor_bytes(model.parameters()) in (0, counters)


def test_an_optimizer_over_all_tensors_at_once_holds_more_for_a_step(model):
    fused, at_once = (
        measure_optimizer(torch.optim.AdamW, {"fused": fused}, model.parameters()) for fused in (True, False)
    )
    assert fused.state == at_once.state
    assert fused.temporary < at_once.temporary / 2
