"""fp16: where gradients overflow, the scaler skips the optimizer; QASSO's time stands still for that step."""

import copy

import pytest
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer, create_optimizer, prepare_model
from hf_geta.optim.schedule import Stage

STEPS = 30
CONFIG = GETAConfig(
    group_sparsity=0.5, weight_bits=[3, 6], activation_bits=[4, 8], pruning_periods=3, projection_steps=6, joint_steps=9
)
# 3 steps of warm-up, 6, 9, and 12 of cool-down: more skipped steps than these are too many


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))


def batch(step):
    draw = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 2, (6,), generator=draw)
    return {"pixel_values": torch.randn(6, 1, 8, 8, generator=draw) + labels.view(-1, 1, 1, 1), "labels": labels}


def run(model, scaler=None, overflows=()):
    """QASSO after STEPS steps of AdamW; before some of them a batch overflows."""
    model = copy.deepcopy(model)
    optimizer = create_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), STEPS)
    for step in range(STEPS):
        if scaler is None:
            model(**batch(step)).loss.backward()
            optimizer.step()
        else:
            for factor in [torch.inf] * (step in overflows) + [1]:
                optimizer.zero_grad()
                scaler.scale(model(**batch(step)).loss * factor).backward()
                scaler.step(optimizer)
                scaler.update()
        optimizer.zero_grad()
    return model, optimizer


def test_a_step_that_a_scaler_skips_is_no_step_of_qasso_bit_for_bit():
    """In every stage: at the first step of the projection, of a period, inside one, and as widths are fixed."""
    model = prepare_model(tiny_vit(), CONFIG, {"pixel_values": batch(0)["pixel_values"]})
    expected, plain = run(model)
    # powers of two, which scale without rounding
    actual, scaled = run(model, torch.amp.GradScaler("cpu", init_scale=2.0**10), overflows=(1, 3, 9, 10, 12, 18, 25))
    assert scaled.step_count == plain.step_count == STEPS
    assert torch.equal(scaled.removed, plain.removed)
    assert torch.equal(scaled.final_bits, plain.final_bits)
    for (name, one), other in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


class OverflowingTrainer(GETATrainer):
    """Its first losses overflow; accelerate scales on GPUs only, so that the scaler is put in by hand."""

    def __init__(self, overflows, **kwargs):
        super().__init__(**kwargs)
        self.left = overflows
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.left -= 1
        return loss * torch.inf if self.left >= 0 else loss


@pytest.mark.parametrize(("overflows", "is_whole"), [(4, True), (15, False)])
def test_the_cooldown_makes_up_for_skipped_steps_or_the_run_says_what_is_missing(overflows, is_whole, tmp_path, caplog):
    samples = [{name: value[0] for name, value in batch(step).items()} for step in range(24)]
    trainer = OverflowingTrainer(
        overflows,
        model=tiny_vit(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=6,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        geta_config=CONFIG,
        train_dataset=samples,
    )
    trainer.train()
    qasso = trainer.qasso
    assert qasso.step_count == STEPS - overflows
    assert trainer.state.global_step == STEPS
    small = trainer.finalize()
    assert (trainer.stage is Stage.COOLDOWN) == is_whole
    assert (qasso.removed.sum() == qasso.groups_to_remove) == is_whole
    warned = f"after {STEPS - overflows} of {STEPS} planned optimizer steps ({overflows} were skipped,"
    assert (warned in caplog.text) != is_whole
    assert small(pixel_values=batch(0)["pixel_values"]).logits.isfinite().all()
