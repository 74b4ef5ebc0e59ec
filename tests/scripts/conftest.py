"""A tiny encoder with its tokenizer, on disk, as a pretrained model is."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "what", "is", "where", "good", "bad", "?", ".", "##a", "##b"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="session")
def word_tokenizer():
    """WordPiece over a few words: [CLS] text [SEP] pair [SEP]."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, model_input_names=inputs, **names)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, word_tokenizer):
    """A BERT of two layers without a head, beside its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def short_run():
    """The settings of a short run on a CPU, whatever the task: no model, no data."""
    return {
        "do_train": True,
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "logging_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "geta": {
            "group_sparsity": 0.5,
            "weight_bits": [4, 8],
            "activation_bits": [6, 8],
            "pruning_periods": 2,
            "warmup_steps": 4,
            "projection_steps": 6,
            "joint_steps": 8,
            "calibration_batches": 2,
        },
    }


@pytest.fixture(scope="session")
def text_run(short_run, encoder_folder):
    """A short run of the tiny encoder, without data."""
    return short_run | {"model_name_or_path": encoder_folder, "max_length": 16}
