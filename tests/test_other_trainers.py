"""`class Mine(GETATrainer, Other)`: another trainer's data and loss, and a small model in the end."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_geta import GETAConfig, GETATrainer

WORDS = ["[PAD]", "<s>", "</s>", "[UNK]", *(f"word{number}" for number in range(16))]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GETA = GETAConfig(group_sparsity=0.3, weight_bits=(4, 8), activation_bits=(8, 8), initial_bits=8, pruning_periods=2)
# trl trains in bfloat16 by default: a process has one precision, and other tests run in this one
RUN = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 6}
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **tokens)


def llama(kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return kind(LlamaConfig(**sizes, **heads, **SPECIAL, vocab_size=len(WORDS), **options))


def texts(**columns):
    """16 rows; a column (start, stop) has the words in these places of a sentence, which differs from row to row."""

    def text(start, stop, turn):
        return "".join(f"{word} " for word in (WORDS[4 + turn % 8 :] + WORDS[4:])[start:stop])

    return Dataset.from_dict({name: [text(*part, turn) for turn in range(16)] for name, part in columns.items()})


def sft(folder, **options):
    trl = pytest.importorskip("trl")
    Mine = type("Mine", (GETATrainer, trl.SFTTrainer), {})
    return Mine(
        llama(), trl.SFTConfig(folder, **RUN, **QUIET), geta_config=GETA, processing_class=tokenizer(),
        train_dataset=texts(prompt=(0, 4), completion=(4, 9)), **options,
    )  # fmt: skip


def dpo(folder):
    trl = pytest.importorskip("trl")
    Mine = type("Mine", (GETATrainer, trl.DPOTrainer), {})
    llama().save_pretrained(f"{folder}/start")  # the reference is read from there
    return Mine(
        AutoModelForCausalLM.from_pretrained(f"{folder}/start"), args=trl.DPOConfig(folder, **RUN, **QUIET),
        geta_config=GETA, processing_class=tokenizer(),
        train_dataset=texts(prompt=(0, 4), chosen=(4, 9), rejected=(6, 10)),
    )  # fmt: skip


def reward(folder):
    trl = pytest.importorskip("trl")
    Mine = type("Mine", (GETATrainer, trl.RewardTrainer), {})
    return Mine(
        llama(LlamaForSequenceClassification, num_labels=1), trl.RewardConfig(folder, **RUN, **QUIET), geta_config=GETA,
        processing_class=tokenizer(), train_dataset=texts(chosen=(0, 9), rejected=(3, 10)),
    )  # fmt: skip


def seq2seq(folder):
    Mine = type("Mine", (GETATrainer, Seq2SeqTrainer), {})
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": len(WORDS)}
    model, tokens = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), tokenizer()
    data = texts(source=(0, 6), target=(2, 8))
    data = data.map(lambda row: tokens(row["source"]) | {"labels": tokens(row["target"])["input_ids"]})
    arguments = Seq2SeqTrainingArguments(
        folder, **RUN, **QUIET, predict_with_generate=True, generation_max_length=8, eval_strategy="epoch"
    )

    def lengths(predictions):
        return {"length": predictions.predictions.shape[1]}

    return Mine(
        model, arguments, geta_config=GETA, data_collator=DataCollatorForSeq2Seq(tokens, model), train_dataset=data,
        eval_dataset=data, processing_class=tokens, compute_metrics=lengths,
    )  # fmt: skip


@pytest.mark.parametrize("make", [sft, dpo, reward, seq2seq])
def test_another_trainer_trains_and_ends_with_a_small_model_of_its_own(make, tmp_path):
    trainer = make(str(tmp_path))
    trainer.train()
    trainer.save_model()
    assert int(trainer.qasso.removed.sum()) == round(0.3 * trainer.qasso.space.num_groups) > 0
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    small, kind = trainer.finalize(), type(trainer.model)
    ids = {"input_ids": torch.arange(4, 16).view(2, 6)}
    if kind is T5ForConditionalGeneration:
        ids["decoder_input_ids"] = ids["input_ids"]
        lengths = [row["eval_length"] for row in trainer.state.log_history if "eval_length" in row]
        assert len(lengths) == 3, lengths  # of generated texts, once an epoch
    with torch.no_grad():
        expected = kind.from_pretrained(tmp_path).eval()(**ids).logits
        for parameter in trainer.model.parameters():  # of which nothing may be left in it
            parameter.zero_()
        torch.testing.assert_close(small.eval()(**ids).logits, expected, rtol=0, atol=0)


def test_a_run_of_trl_resumes_where_it_stopped(tmp_path):
    whole, resumed = sft(str(tmp_path)), sft(str(tmp_path))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_of_trl_follows_a_teacher(tmp_path):
    trainer = sft(str(tmp_path), teacher_model=llama())
    trainer.train()
    losses = [row["distillation_loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == RUN["max_steps"]
    assert min(losses) > 0
