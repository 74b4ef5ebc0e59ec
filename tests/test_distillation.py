"""A student follows its teacher: the terms of the loss as laws, and GETATrainer with a teacher on real digits."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from hf_geta import GETAConfig, GETATrainer
from hf_geta.distillation import (
    counted_labels,
    distillation_loss,
    paired_hidden_states,
    relative_distance,
    shifts_labels,
    soft_target_loss,
    teacher_inputs,
)
from tests.test_trainer import different_tensors, digits, tiny_vit

STEPS = 12
WEIGHTS_ONLY = {"group_sparsity": 0.5, "weight_bits": [4, 8], "initial_bits": 8, "pruning_periods": 2}
LOGITS = GETAConfig(**WEIGHTS_ONLY, distillation_weight=0.75, distillation_temperature=3.0)
BOTH = GETAConfig(**WEIGHTS_ONLY, distillation_weight=0.75, distillation_hidden_weight=0.5)
OFF = GETAConfig(**WEIGHTS_ONLY, distillation_weight=0.0)
SMALL_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


# -- the terms ----------------------------------------------------------------------------------------------------


def test_equal_logits_have_no_loss_and_no_gradient():
    student = randn(4, 5, 7).requires_grad_()
    loss = soft_target_loss(student, student.detach(), 2.0)
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() < 1e-16  # softmax - softmax, in float64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_divergence_written_out(temperature):
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    q = (teacher / temperature).exp() / (teacher / temperature).exp().sum(-1, keepdim=True)
    p = (student / temperature).exp() / (student / temperature).exp().sum(-1, keepdim=True)
    by_hand = temperature**2 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature), by_hand, rtol=1e-12, atol=0)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_the_logits():
    """Hinton et al. 2015, Eq. 4: (z - v) / N for logits of zero mean, once T^2 is taken in."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (randn(1, 5), randn(1, 5, seed=1)))
    student.requires_grad_()
    soft_target_loss(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5, rtol=1e-3, atol=1e-5)


def test_half_precision_is_compared_in_float32():
    student, teacher = randn(8, 50).bfloat16(), randn(8, 50, seed=1).bfloat16()
    assert torch.equal(soft_target_loss(student, teacher, 2.0), soft_target_loss(student.float(), teacher.float(), 2.0))


def test_positions_that_are_not_counted_do_not_count():
    student, teacher = randn(2, 4, 5).requires_grad_(), randn(2, 4, 5, seed=1)
    counted = torch.tensor([[True, True, False, False], [True, False, False, False]])
    loss = soft_target_loss(student, teacher, 1.0, counted)
    loss.backward()
    torch.testing.assert_close(loss, soft_target_loss(student[counted], teacher[counted], 1.0))
    assert student.grad[~counted].abs().max() == 0
    assert soft_target_loss(student, teacher, 1.0, torch.zeros_like(counted)) == 0


def test_the_hidden_distance_is_relative_to_the_teachers_energy():
    teacher = randn(3, 4, 6)
    torch.testing.assert_close(relative_distance(1.5 * teacher, teacher), torch.tensor(0.25, dtype=torch.float64))
    student = randn(3, 4, 6, seed=1)
    torch.testing.assert_close(relative_distance(7 * student, 7 * teacher), relative_distance(student, teacher))
    halves = (relative_distance(student[:1], teacher[:1]) + 2 * relative_distance(student[1:], teacher[1:])) / 3
    torch.testing.assert_close(relative_distance(student, teacher), halves)


def test_the_hidden_states_of_padding_do_not_count():
    student, teacher, mask = randn(2, 4, 6), randn(2, 4, 6, seed=1), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    changed = torch.where(mask.unsqueeze(-1), student, 9.0)
    assert relative_distance(changed, teacher, mask) == relative_distance(student, teacher, mask)
    assert relative_distance(changed, teacher) != relative_distance(student, teacher)


def test_a_causal_model_leaves_out_the_positions_before_an_ignored_label():
    labels = torch.tensor([[-100, 5, 6, -100], [1, -100, 3, 4]])
    shifted = [[True, True, False, False], [False, True, True, False]]
    assert counted_labels({"labels": labels}, shifted=True).tolist() == shifted
    assert counted_labels({"labels": labels}, shifted=False).tolist() == (labels != -100).tolist()
    assert counted_labels({"labels": labels, "shift_labels": labels}, shifted=True).tolist() == (labels > 0).tolist()


def test_labels_of_classes_are_never_shifted():
    assert counted_labels({"labels": torch.tensor([3, -100, 1])}, shifted=True).tolist() == [True, False, True]


def test_the_models_that_shift_their_labels_are_known():
    small = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 0}
    assert shifts_labels(tiny_llama())
    assert shifts_labels(GPT2LMHeadModel(GPT2Config(**small)))
    assert not any(map(shifts_labels, (tiny_vit(), tiny_t5(0), tiny_bert(BertForQuestionAnswering))))


def test_both_logits_of_question_answering_are_followed():
    student, teacher = (
        QuestionAnsweringModelOutput(start_logits=randn(2, 8, seed=s), end_logits=randn(2, 8, seed=s + 1))
        for s in (0, 2)
    )
    starts = soft_target_loss(student.start_logits, teacher.start_logits, 3.0)
    ends = soft_target_loss(student.end_logits, teacher.end_logits, 3.0)
    loss = distillation_loss(student, teacher, {"attention_mask": torch.ones(2, 8)}, False, LOGITS)
    torch.testing.assert_close(loss, 0.75 * (starts + ends) / 2)


def test_without_a_label_for_each_position_the_attention_mask_counts():
    student, teacher = (TokenClassifierOutput(logits=randn(2, 4, 5, seed=s)) for s in (0, 1))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    loss = distillation_loss(student, teacher, {"attention_mask": mask, "labels": torch.tensor([0, 1])}, False, LOGITS)
    torch.testing.assert_close(loss, 0.75 * soft_target_loss(student.logits, teacher.logits, 3.0, mask.bool()))


def test_an_encoder_with_a_decoder_is_followed_where_it_has_labels():
    student, teacher = tiny_t5(0), tiny_t5(1)
    inputs = {"input_ids": torch.randint(1, 20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    inputs["labels"] = torch.tensor([[3, 4, 5, -100], [6, 7, -100, -100]])  # T5 makes the decoder's inputs of them
    seen = teacher_inputs(inputs, ["labels"], teacher)
    ours, theirs = (model(**seen, output_hidden_states=True) for model in (student, teacher))
    names = [name for name, _, _ in paired_hidden_states(ours, theirs)]
    assert names == ["encoder_hidden_states"] * 2 + ["decoder_hidden_states"] * 2
    loss = distillation_loss(ours, theirs, inputs, shifts_labels(student), BOTH)
    counted = inputs["labels"] != -100
    encoders = zip(ours.encoder_hidden_states, theirs.encoder_hidden_states)
    decoders = zip(ours.decoder_hidden_states, theirs.decoder_hidden_states)
    hidden = [relative_distance(*pair) for pair in encoders] + [relative_distance(*pair, counted) for pair in decoders]
    expected = 0.75 * soft_target_loss(ours.logits, theirs.logits, 2.0, counted) + 0.5 * torch.stack(hidden).mean()
    torch.testing.assert_close(loss, expected)


def test_a_deeper_teacher_is_followed_at_the_same_depth():
    student, teacher = (
        TokenClassifierOutput(hidden_states=tuple(torch.full((1, 2, 3), float(i)) for i in range(n))) for n in (3, 5)
    )
    assert [float(t[0, 0, 0]) for _, _, t in paired_hidden_states(student, teacher)] == [0, 2, 4]


def test_logits_that_only_one_of_them_has_are_left_alone():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = DeiTConfig(image_size=28, patch_size=14, num_labels=4, **shape)
    student, teacher = DeiTForImageClassification(config), DeiTForImageClassificationWithTeacher(config)
    ours, theirs = (model.eval()(torch.ones(2, 3, 28, 28)) for model in (student, teacher))
    expected = 0.75 * soft_target_loss(ours.logits, theirs.logits, 3.0)
    torch.testing.assert_close(distillation_loss(ours, theirs, {}, False, LOGITS), expected)
    assert distillation_loss(theirs, theirs, {}, False, LOGITS) == 0


# -- the trainer --------------------------------------------------------------------------------------------------


def tiny_llama(**changes):
    torch.manual_seed(changes.pop("seed", 0))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = shape | {"intermediate_size": 32, "vocab_size": 40, "max_position_embeddings": 16} | changes
    return LlamaForCausalLM(LlamaConfig(**values))


def tiny_t5(seed):
    torch.manual_seed(seed)
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape)).eval()


def tiny_bert(cls, seed=0, **changes):
    torch.manual_seed(seed)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return cls(BertConfig(vocab_size=40, max_position_embeddings=16, **SMALL_BERT | dropout | changes))


def teacher_vit(**changes):
    """Not the student's weights: another seed."""
    config = copy.deepcopy(tiny_vit().config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    return ViTForImageClassification(config)


def make_trainer(folder, config=LOGITS, model=None, teacher=None, data=None, callbacks=None, **changes):
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    data = data or digits()
    return GETATrainer(
        model=model or tiny_vit(),
        args=TrainingArguments(output_dir=str(folder), **values | changes),
        geta_config=config,
        teacher_model=teacher,
        train_dataset=data[:200],
        eval_dataset=data[200:],
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A whole run without a teacher."""
    trainer = make_trainer(tmp_path_factory.mktemp("alone"), OFF)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run with a teacher, logits and hidden states, and its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, BOTH, teacher=teacher_vit(), save_strategy="steps", save_steps=6)
    trainer.train()
    return trainer, folder


def test_without_weight_a_teacher_changes_no_bit(alone, tmp_path):
    followed = make_trainer(tmp_path, OFF, teacher=teacher_vit())
    followed.train()
    assert different_tensors(followed.model, alone.model) == []
    assert not any("distillation_loss" in log for log in followed.state.log_history)


def test_a_teacher_draws_nothing_from_the_random_streams(tmp_path):
    trainer = make_trainer(tmp_path, BOTH, teacher=teacher_vit())
    batch = trainer._first_batches(1)[0]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    trainer.try_teacher(batch)
    trainer._teacher_outputs(batch)
    assert torch.rand(1) == expected


@pytest.fixture(scope="module")
def only_followed(tmp_path_factory):
    """A whole run in which the task has no part, in half-batches."""
    config = GETAConfig(**WEIGHTS_ONLY, distillation_weight=1.0)
    options = {"logging_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path_factory.mktemp("followed"), config, teacher=teacher_vit(), **options)
    trainer.train()
    return trainer


def test_the_student_follows_its_teacher(alone, only_followed):
    images = torch.stack([item["pixel_values"] for item in digits()[200:]])
    with torch.no_grad():
        taught, untaught, teacher = (
            model.eval()(images).logits for model in (only_followed.model, alone.model, only_followed.teacher_model)
        )
    assert soft_target_loss(taught, teacher, 1.0) < 0.5 * soft_target_loss(untaught, teacher, 1.0)


def test_the_logs_tell_the_teachers_part_of_the_loss(only_followed):
    logs = [log for log in only_followed.state.log_history if "loss" in log]
    assert len(logs) == STEPS // 3
    for log in logs:  # all of it; float32
        assert log["distillation_loss"] == pytest.approx(log["loss"], rel=1e-5)


def test_evaluation_is_that_of_the_task(tmp_path):
    taught, untaught = make_trainer(tmp_path / "a", BOTH, teacher=teacher_vit()), make_trainer(tmp_path / "b", BOTH)
    assert taught.evaluate()["eval_loss"] == untaught.evaluate()["eval_loss"]


def test_a_resumed_run_with_a_teacher_equals_the_uninterrupted_run(finished, tmp_path):
    trainer, folder = finished
    resumed = make_trainer(tmp_path, BOTH, teacher=teacher_vit())
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert different_tensors(resumed.model, trainer.model) == []
    assert resumed.state.log_history[-2]["distillation_loss"] == trainer.state.log_history[-2]["distillation_loss"]


def test_the_teacher_is_frozen_and_in_no_checkpoint(finished):
    trainer, folder = finished
    assert different_tensors(trainer.teacher_model, teacher_vit()) == []
    assert not trainer.teacher_model.training
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher_model.parameters())
    assert trainer.teacher_model not in list(trainer.model.modules())
    saved = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert set(saved) <= set(trainer.model.state_dict())
    trainer.save_model(str(folder / "small"))
    assert sum(x.nbytes for x in load_file(folder / "small" / "model.safetensors").values()) < sum(
        p.nbytes for p in tiny_vit().parameters()
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step and ends the run."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def tokens():
    """Eight rows, one with many more labels: however they are halved, a mean of means is not the mean."""
    ids = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1:, 2:] = -100
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y} for x, y in zip(ids, labels)]


def answers():
    ids = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "start_positions": int(x[0]) % 10, "end_positions": int(x[1]) % 10} for x in ids]


def quiet_vit(seed):
    model = teacher_vit(hidden_dropout_prob=0.0)  # masks would be drawn in another order
    return model if seed else model.apply(model._init_weights)


@pytest.mark.parametrize(
    ("make", "data", "config"),
    [
        (quiet_vit, lambda: digits()[:8], BOTH),
        (lambda seed: tiny_llama(seed=seed, initializer_range=0.5), tokens, LOGITS),  # logits that differ by their size
        (lambda seed: tiny_bert(BertForQuestionAnswering, seed), answers, BOTH),
    ],
    ids=["classes", "language", "answers"],
)
def test_accumulating_half_batches_gives_the_gradient_of_the_batch(tmp_path, make, data, config):
    found = []
    for size in (8, 4):
        kept = Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_grad_norm": 0}
        trainer = make_trainer(tmp_path, config, make(0), make(1), data(), [kept], **options)
        trainer.train()
        found.append(kept.values)
    assert found[0].keys() == found[1].keys()
    for name, whole in found[0].items():  # sums of float32 in another order
        torch.testing.assert_close(found[1][name], whole, rtol=1e-3, atol=1e-6, msg=name)


def test_a_name_is_loaded_with_the_models_own_class(tmp_path):
    teacher_vit().save_pretrained(tmp_path / "teacher")
    for name in (tmp_path / "teacher", str(tmp_path / "teacher")):
        trainer = make_trainer(tmp_path / "out", teacher=name)
        assert type(trainer.teacher_model) is ViTForImageClassification
        assert different_tensors(trainer.teacher_model, teacher_vit()) == []


def test_a_name_whose_checkpoint_has_no_head_is_refused(tmp_path):
    teacher_vit().vit.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias, classifier\.weight"):
        make_trainer(tmp_path / "out", teacher=tmp_path / "teacher")


def other_order():
    return teacher_vit(id2label={i: f"LABEL_{9 - i}" for i in range(10)})


@pytest.mark.parametrize(
    ("teacher", "config", "message"),
    [
        (teacher_vit, None, "teacher_model without geta_config"),
        (lambda: 3, LOGITS, "teacher_model is a int"),
        (lambda: teacher_vit(num_labels=12), LOGITS, r"logits \(8, 10\), the teacher_model logits \(8, 12\)"),
        (lambda: teacher_vit().vit, LOGITS, "the teacher_model none"),
        (lambda: tiny_bert(BertForSequenceClassification), LOGITS, "does not take a batch of ViT"),
        (other_order, LOGITS, "another order"),
        (lambda: teacher_vit(hidden_size=12), BOTH, r"\(8, 17, 24\) and \(8, 17, 12\)"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_the_first_step(tmp_path, teacher, config, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, config, model, teacher()).train()
    assert different_tensors(model, tiny_vit()) == []
    assert set(model.state_dict()) == set(tiny_vit().state_dict())


def test_the_model_itself_is_no_teacher(tmp_path):
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        make_trainer(tmp_path, model=model, teacher=model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("vocabulary", "message"), [(30, "30 tokens, the model one of 40"), (48, r"\(8, 10, 48\)")])
def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, LOGITS, tiny_llama(), tiny_llama(vocab_size=vocabulary), tokens()).train()


@pytest.mark.parametrize(("labels", "message"), [(1, "logits of one class"), (3, "multi_label_classification")])
def test_logits_that_are_no_distribution_are_refused(tmp_path, labels, message):
    data = [{"input_ids": x["input_ids"], "labels": [0.5] * labels} for x in tokens()]
    model, teacher = (tiny_bert(BertForSequenceClassification, seed, num_labels=labels) for seed in (0, 1))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, LOGITS, model, teacher, data).train()
