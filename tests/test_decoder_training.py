"""GETATrainer on a decoder: what saves memory changes nothing else, compression itself takes little of it, and
massive activations are no obstacle.
"""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from hf_geta import GETAConfig, GETATrainer, create_optimizer, prepare_model
from hf_geta.optim.schedule import Stage
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.report.check import check_folder

STEPS = 20
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = GETAConfig(
    group_sparsity=0.25,
    weight_bits=[4, 8],
    activation_bits=[8, 8],
    granularity="channel",
    quantize_embeddings=8,
    pruning_periods=2,
)


def llama(**changes):
    torch.manual_seed(0)
    values = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True, "use_cache": False} | changes
    return LlamaForCausalLM(LlamaConfig(**values))


def blocks():
    ids = torch.randint(0, 32, (64, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 1::2] = ids[:, ::2]  # every token twice: something to learn
    return [{"input_ids": row, "labels": row} for row in ids]


def train(folder, model, config=CONFIG, **changes):
    """(the trainer after its run, its losses)"""
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(folder), **values | changes)
    trainer = GETATrainer(
        model=model, args=args, geta_config=config, train_dataset=blocks(), data_collator=default_data_collator
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), llama())


def assert_targets_are_met(trainer):
    cost = trainer.measure_compression()
    assert trainer.qasso.step_count == STEPS
    assert cost.group_sparsity == pytest.approx(0.25, abs=0.01)
    assert trainer.qasso.final_bits.min() >= 4
    assert trainer.qasso.final_bits.max() <= 8


def test_gradient_checkpointing_gives_the_same_losses(plain, tmp_path):
    trainer, losses = train(tmp_path, llama(), gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    assert losses == plain[1]
    assert_targets_are_met(trainer)


def test_accumulated_gradients_take_the_steps_of_whole_batches(plain, tmp_path):
    trainer, losses = train(tmp_path, llama(), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_targets_are_met(trainer)
    # Sums of floats in another order, through twenty steps; calibration sees a quarter of the blocks.
    assert losses == pytest.approx(plain[1], rel=0.05)
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.usefixtures("own_compiler_settings")
def test_a_compiled_run_learns_the_same_and_its_loaded_model_writes_what_the_one_in_memory_does(tmp_path):
    one_layer = {"num_hidden_layers": 1, "intermediate_size": 50}  # tracing takes a while
    _, expected = train(tmp_path, llama(**one_layer))
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer, losses = train(tmp_path, llama(**one_layer), **compiled)
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert losses == pytest.approx(expected, rel=3e-3)  # sums in another order, roundings that flip
    assert_targets_are_met(trainer)
    small, ids = trainer.finalize().eval(), blocks()[0]["input_ids"][None, :4]
    trainer.save_model()
    texts = []
    for model in (small, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.manual_seed(0)
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=True, use_cache=True, eos_token_id=None))
    assert torch.equal(*texts)
    assert len(set(texts[0][0, 4:].tolist())) > 3  # it says more than one thing


def test_a_bfloat16_model_trains_with_float32_quantizers_and_loads_alike(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)  # rotations stay in float32
    trainer, losses = train(tmp_path, model.train())
    assert_targets_are_met(trainer)
    assert losses[-1] < 0.85 * losses[0]
    quantizers = [module for module in trainer.model.modules() if isinstance(module, Quantizer)]
    owned = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    for parameter in trainer.model.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in owned else torch.bfloat16)
    small, ids = trainer.finalize().eval(), blocks()[0]["input_ids"][None]
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(input_ids=ids).logits, small(input_ids=ids).logits)


def test_a_massive_activation_gets_the_bits_that_it_needs(tmp_path):
    """One hidden unit of one layer answers one token, and 10,000 times louder than any other unit."""
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        embeddings, mlp = model.model.embed_tokens.weight, model.model.layers[0].mlp
        embeddings[:, 0] = 0
        embeddings[7], embeddings[7, 0] = 0, 1
        for projection in (mlp.up_proj, mlp.gate_proj):
            projection.weight[5] = 0
            projection.weight[5, 0] = 20
    config = dataclasses.replace(CONFIG, quantize_embeddings=None, outlier_activation_bits=16)
    trainer, losses = train(tmp_path, model, config, learning_rate=1e-3)
    assert all(torch.isfinite(torch.tensor(losses)))
    trainer.save_model()
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), blocks()[0]["input_ids"][None]
    widths = {
        name.removeprefix("model.layers."): module.manifest.activation_bits
        for name, module in loaded.named_modules()
        if hasattr(module, "manifest")
    }
    assert {name for name, bits in widths.items() if bits == 16} == {"0.mlp.down_proj"}
    assert set(widths.values()) == {8, 16}
    assert torch.equal(loaded(input_ids=ids).logits, trainer.finalize().eval()(input_ids=ids).logits)
    assert [check for check in check_folder(tmp_path) if not check.holds] == []


# As the configs of decoders and of encoders ask for.
A_FIFTH = {"group_sparsity": 0.2, "granularity": "block", "quantize_embeddings": 8, "outlier_activation_bits": 16}
HALF = {"group_sparsity": 0.5, "granularity": "channel"}


@pytest.mark.parametrize("shares", [A_FIFTH, HALF], ids=["a fifth", "half"])
def test_compression_keeps_at_most_a_twentieth_of_the_models_bytes(shares):
    """In every step; so no copy of the weights is among it."""
    model = llama(hidden_size=256, intermediate_size=512, vocab_size=512).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    config = GETAConfig(weight_bits=[4, 4], activation_bits=[8, 8], **shares)
    prepare_model(model, config, {"input_ids": ids})
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=1e-3), total_steps=STEPS * 2)
    stages = set()
    for _ in range(STEPS * 2):
        stages.add(optimizer.schedule.stage_at(optimizer.step_count))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = tensors_in(optimizer) | tensors_in([m for m in model.modules() if isinstance(m, Quantizer)])
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in kept.values())}
        extra = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)
        assert 0 < extra <= 0.05 * model_bytes
    assert stages == set(Stage)


def tensors_in(value, seen=None):
    """Every tensor that can be reached from an object's attributes and items, by identity."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return {}
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        return {id(value): value}
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    else:
        inner = [vars(value)] if hasattr(value, "__dict__") and type(value).__module__ != "builtins" else []
    found = {}
    for each in inner:
        found |= tensors_in(each, seen)
    return found
