"""The parts of several processes make up what one process would read."""

import itertools

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_geta import GETAConfig, GETATrainer
from hf_geta.first_batches import first_batches, without_labels


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(50))


@pytest.mark.parametrize("dataset", [list(range(50)), Stream()], ids=["shuffled", "stream"])
def test_the_parts_of_all_processes_are_the_batches_of_one(dataset):
    whole = first_batches(dataset, list, size=8, count=3, seed=0)
    parts = [first_batches(dataset, list, 2, 3, 0, processes=4, process=process) for process in range(4)]
    assert [[*itertools.chain(*part)] for part in zip(*parts, strict=True)] == whole
    assert len({sample for batch in whole for sample in batch}) == 24


def test_every_process_has_a_batch_of_few_samples():
    assert all(len(first_batches([7, 8, 9], list, 2, 1, 0, 4, process)[0]) == 2 for process in range(4))


T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
BART = BartConfig(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
)
WHISPER = WhisperConfig(
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    num_mel_bins=8,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    max_source_positions=20,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=3,
)
LABELS = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])


@pytest.mark.parametrize(
    ("model_class", "config", "inputs"),
    [
        (T5ForConditionalGeneration, T5, {"input_ids": torch.ones(2, 3, dtype=torch.int64)}),
        (BartForConditionalGeneration, BART, {"input_ids": torch.ones(2, 3, dtype=torch.int64)}),
        (WhisperForConditionalGeneration, WHISPER, {"input_features": torch.ones(2, 8, 40)}),
    ],
    ids=["t5", "bart", "whisper"],
)
def test_a_decoder_gets_what_the_model_makes_of_labels(model_class, config, inputs):
    model = model_class(config).eval()
    batch = without_labels({**inputs, "labels": LABELS}, model, ["labels"])
    assert set(batch) == {*inputs, "decoder_input_ids"}
    torch.testing.assert_close(model(**batch).logits, model(**inputs, labels=LABELS).logits)
    assert set(without_labels(batch, model, ["labels"])) == set(batch)


def test_labels_of_classes_feed_no_decoder():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.zeros(2, dtype=torch.int64)}
    assert set(without_labels(batch, BartForSequenceClassification(BART), ["labels"])) == {"input_ids"}


def test_a_model_that_makes_its_decoder_inputs_of_labels_is_trained(tmp_path):
    data = [{"input_ids": torch.tensor([3, 4, 5]), "labels": LABELS[0]}] * 8
    args = TrainingArguments(tmp_path, max_steps=40, report_to="none", use_cpu=True, save_strategy="no")
    trainer = GETATrainer(
        T5ForConditionalGeneration(T5), args, train_dataset=data, geta_config=GETAConfig(group_sparsity=0.5)
    )
    trainer.train()
    trainer.save_model()
    small = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert small.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4).shape[0] == 1
