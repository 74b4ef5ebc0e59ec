"""The fast subset of the zoo: one model class of architectures that differ; `scripts/zoo.py` takes all of them."""

from __future__ import annotations

import time

import pytest
import torch

from tests.zoo.cases import Case, all_cases, run_case
from tests.zoo.configs import tiny_config
from tests.zoo.law import Record, distance, float_tensors
from tests.zoo.sweep import READY, sweep
from tests.zoo.table import markdown, markdown_by_type, one_line, read_lines, summary, write_line

FAST = {
    "vit": "ViTForImageClassification",
    "beit": "BeitForImageClassification",
    "swin": "SwinForImageClassification",
    "pvt_v2": "PvtV2ForImageClassification",
    "cvt": "CvtForImageClassification",
    "segformer": "SegformerForSemanticSegmentation",
    "convnext": "ConvNextForImageClassification",
    "resnet": "ResNetForImageClassification",
    "regnet": "RegNetForImageClassification",
    "dpt": "DPTForDepthEstimation",
    "detr": "DetrForObjectDetection",
    "owlvit": "OwlViTForObjectDetection",
    "sam": "SamModel",
    "videomae": "VideoMAEForVideoClassification",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "bert": "BertForSequenceClassification",
    "deberta-v2": "DebertaV2ForTokenClassification",
    "modernbert": "ModernBertForMaskedLM",
    "albert": "AlbertForQuestionAnswering",
    "xlnet": "XLNetForTokenClassification",
    "layoutlm": "LayoutLMForTokenClassification",
    "gpt2": "GPT2LMHeadModel",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "mamba": "MambaForCausalLM",
    "bamba": "BambaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "wav2vec2": "Wav2Vec2ForCTC",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "idefics": "IdeficsForVisionText2Text",
    "patchtst": "PatchTSTForPrediction",
    "autoformer": "AutoformerForPrediction",
}


@pytest.mark.parametrize("model_type", FAST)
def test_masked_equals_pruned_equals_saved_and_loaded(model_type):
    record = run_case(Case("fast subset", model_type, FAST[model_type]))
    assert record.lawful, f"{record.stage}: {record.reason}"
    assert record.axes
    assert record.share > 0


def test_every_class_of_the_auto_mappings_is_one_case():
    cases = all_cases()
    assert len({case.model_class for case in cases}) == len(cases) > 1000
    by_type = all_cases(one_per_type=True)
    assert len({case.model_type for case in by_type}) == len(by_type) > 600


def test_tiny_configs_keep_what_belongs_together():
    config = tiny_config("qwen2_vl")
    assert config.vision_config.hidden_size == config.text_config.hidden_size  # the merger ends in the text
    assert config.text_config.hidden_size % config.text_config.num_attention_heads == 0
    assert config.image_token_id < config.text_config.vocab_size
    hybrid = tiny_config("gemma3_text")
    assert set(hybrid.layer_types) == {"sliding_attention", "full_attention"}
    assert len(hybrid.layer_types) == hybrid.num_hidden_layers <= 4


def test_masks_that_a_forward_writes_do_not_count_as_scale():
    lowest = torch.finfo(torch.float32).min
    one = dict(float_tensors({"logits": torch.tensor([1.0, 2.0, lowest]), "cache": None}))
    other = dict(float_tensors({"logits": torch.tensor([1.0, 2.5, lowest]), "cache": None}))
    assert distance(one, other) == pytest.approx(0.25)
    assert distance(one, dict(float_tensors({"logits": torch.tensor([1.0, 2.0, 0.0])}))) == float("inf")


def test_a_case_that_cannot_be_built_is_a_record(tmp_path):
    record = run_case(Case("none", "bert", "NoSuchModel"))
    assert not record.built
    assert "NoSuchModel" in record.reason
    write_line(record, tmp_path / "zoo.jsonl")
    assert read_lines(tmp_path / "zoo.jsonl") == [record]
    assert "not built" in markdown([record])
    assert "built 0 of 1" in summary([record])
    assert "| bert | 0 of 1 |" in markdown_by_type([record])
    assert "NoSuchModel" in one_line(record)


@pytest.mark.parametrize("task", ["crash", "hang"])
def test_a_worker_that_is_lost_costs_one_case_only(task):
    cases = [Case(task, "bert", "BertModel"), Case("", "bert", "BertModel")]
    records = list(sweep(cases, workers=1, timeout=5, work=lossy_work))
    assert [record.stage for record in records] == ["lost", "done"]


def lossy_work(pipe) -> None:
    pipe.send(READY)
    while (case := pipe.recv()) is not None:
        if case.task == "crash":
            raise SystemExit(3)
        if case.task == "hang":
            time.sleep(1000)
        pipe.send(Record(case.model_class, case.model_type, case.task, stage="done"))
