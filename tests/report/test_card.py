"""Laws of the model card."""

import json
import re

import pytest
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_geta.report import load_report, metrics_table, render_card, save_report
from hf_geta.report.card import BEGIN, END
from hf_geta.report.metadata import TASKS, card_metadata

REPORT = {
    "architecture": "ViTForImageClassification",
    "base_model": "google/vit-base-patch16-224",
    "dataset": "uoft-cs/cifar10",
    "dense": {"accuracy": 0.9, "parameters": 1_000_000, "file_bytes": 4_000_000, "latency_ms": 3.0},
    "compressed": {
        "accuracy": 0.8954,
        "parameters": 500_000,
        "relative_bops": 0.0123,
        "file_bytes": 300_000,
        "mean_weight_bits": 4.5,
        "group_sparsity": 0.5,
        "latency_ms": None,
    },
    "geta": {"group_sparsity": 0.5, "weight_bits": [4, 8]},
    "versions": {"hf_geta": "0.1.0"},
}


def test_the_hub_reads_the_metadata():
    data = ModelCard(render_card(REPORT)).data
    assert data.library_name == "transformers"
    assert data.base_model == "google/vit-base-patch16-224"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.tags == ["geta", "pruned", "quantized"]
    assert data.get("base_model_relation") == "quantized"
    assert data.license is None


def test_a_model_that_is_only_pruned_is_a_finetune_of_its_base():
    report = REPORT | {"compressed": {"group_sparsity": 0.5, "mean_weight_bits": 32}}
    assert ModelCard(render_card(report)).data.get("base_model_relation") == "finetune"


def test_the_tags_name_the_widths_that_layers_have():
    row = {"name": "a", "macs": 1, "dense_macs": 1}
    widths = [("a", 2, 8), ("b", 6, 8), ("c", 32, 32), (None, 32, 32)]
    rows = [row | {"weight": w, "weight_bits": b, "activation_bits": a} for w, b, a in widths]
    tags = card_metadata(REPORT | {"operations": rows})["tags"]
    assert tags == ["geta", "pruned", "quantized", "2-to-6-bit-weights", "8-bit-activations"]


def test_the_results_are_a_model_index_that_the_hub_reads_back():
    index = card_metadata(REPORT)["model-index"]
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    (result,) = ModelCard(render_card(REPORT)).data.eval_results
    assert (result.task_type, result.dataset_type) == ("image-classification", "uoft-cs/cifar10")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.8954)


def test_without_a_data_set_of_the_hub_there_is_no_result_for_it():
    assert "model-index" not in card_metadata({key: REPORT[key] for key in REPORT if key != "dataset"})


def test_the_first_line_of_code_imports_hf_geta():
    code = re.search(r"```python\n(.*?)```", render_card(REPORT), re.S).group(1)
    assert code.splitlines()[0].startswith("import hf_geta")
    compile(code, "card", "exec")


def test_the_code_loads_from_where_the_model_is_published():
    assert 'from_pretrained("me/small")' in render_card(REPORT | {"repo_id": "me/small"})
    assert 'from_pretrained("path/to/this/folder")' in render_card(REPORT)


def test_the_section_says_all_that_a_reader_needs():
    training = {"hyperparameters": {"learning_rate": 0.003}, "schedule": {"warm-up": 10}}
    card = render_card(
        REPORT
        | {
            "evaluation": {"samples": 10_000},
            "training": training,
            "axes": [{"name": "a", "kind": "mlp", "kept": 1, "groups": 2}],
        }
    )
    for words in ("learning_rate: 0.003", "| warm-up | 10 |", "weight_bits:", "hf_geta 0.1.0", "(geta_layers.svg)"):
        assert words in card
    for words in ("to train it again, load it in float", "GETAQuantizationConfig(dequantize=True)", "AVX-512 VNNI"):
        assert words in card
    for words in ("### Limits", "@inproceedings", "2502.16638", "on `uoft-cs/cifar10`, 10,000 samples"):
        assert words in card


@pytest.mark.parametrize("path", ["/home/me/checkpoint", "./out", "outputs/run/best", "outputs/run", ""])
def test_a_local_path_never_enters_the_card(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    card = render_card(REPORT | {"base_model": path})
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert not path or path not in card


@pytest.mark.parametrize(
    ("architecture", "loaded_by", "tag"),
    [
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
        ("MarianMTModel", "AutoModelForSeq2SeqLM", None),
        ("LlavaForConditionalGeneration", "AutoModelForImageTextToText", "image-text-to-text"),  # the same ending
        ("Gemma3ForConditionalGeneration", "AutoModelForImageTextToText", "image-text-to-text"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq", None),
        ("Wav2Vec2ForCTC", "AutoModelForCTC", "automatic-speech-recognition"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("Wav2Vec2ForSequenceClassification", "AutoModelForAudioClassification", "audio-classification"),
        ("DeiTForImageClassificationWithTeacher", "AutoModelForImageClassification", "image-classification"),
        ("BertForMultipleChoice", "AutoModelForMultipleChoice", None),
        ("BertForPreTraining", "BertForPreTraining", None),
        ("BertModel", "AutoModel", None),
    ],
)
def test_a_card_loads_the_model_with_its_head(architecture, loaded_by, tag):
    scores = {"exact_match": 76.5, "f1": 85.25}
    text = render_card(REPORT | {"architecture": architecture, "compressed": scores})
    assert f"from transformers import {loaded_by}\n\nmodel = {loaded_by}.from_pretrained" in text
    assert ModelCard(text).data.pipeline_tag == tag
    assert ModelCard(text).data.metrics == ["exact_match", "f1"]
    assert re.search(r"Exact match .* 76\.50 ", text)


@pytest.mark.parametrize(
    ("sparsity", "bits", "tags"), [(0.0, 4.0, ["geta", "quantized"]), (0.5, 32.0, ["geta", "pruned"])]
)
def test_tags_say_only_what_was_done(sparsity, bits, tags):
    compressed = {"group_sparsity": sparsity, "mean_weight_bits": bits}
    card = ModelCard(render_card(REPORT | {"compressed": compressed}))
    assert card.data.tags == tags
    assert f"{tags[1].capitalize()} in one training run" in card.text


def test_an_architecture_alone_makes_a_card():
    card = render_card({"architecture": "SomethingNew"})
    assert "from my_module import SomethingNew" in card
    assert "SomethingNew.from_pretrained" in card
    assert ModelCard(card).data.pipeline_tag is None


def test_a_registered_class_is_loaded_by_its_auto_class_and_its_figures_have_a_task():
    class OwnConfig(PreTrainedConfig):
        model_type = "own_for_a_card"

    class OwnForImageClassification(PreTrainedModel):
        config_class = OwnConfig

    AutoModelForImageClassification.register(OwnConfig, OwnForImageClassification)
    report = REPORT | {"architecture": "OwnForImageClassification", "compressed": {"accuracy": 0.9}}
    text = render_card(report)
    assert "from transformers import AutoModelForImageClassification  # once your module defines Own" in text
    assert ModelCard(text).data.pipeline_tag == "image-classification"
    assert ModelCard(text).data.eval_results[0].metric_value == 0.9
    tagged = render_card(report | {"architecture": "SomethingNew", "pipeline_tag": "image-classification"})
    assert ModelCard(tagged).data.eval_results[0].task_type == "image-classification"


@pytest.mark.parametrize("auto_class", TASKS)
def test_an_auto_class_loads_the_classes_of_its_table(auto_class):
    table = getattr(modeling_auto, TASKS[auto_class][0])
    assert getattr(transformers, auto_class)._model_mapping._model_mapping is table


@pytest.mark.parametrize("name", ["BertForNextSentencePrediction", "BertForMultipleChoice", "BertForPreTraining"])
def test_the_code_of_a_card_loads_the_class_that_was_saved(name, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    getattr(transformers, name)(transformers.BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    save_report(tmp_path, {"architecture": name})
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S).group(1)
    exec(code.replace("path/to/this/folder", str(tmp_path)), names := {})
    assert type(names["model"]).__name__ == name


@pytest.mark.parametrize(
    ("auto_class", "tag"), [("AutoModelForCausalLM", "text-generation"), ("AutoModelForTextEncoding", None)]
)
def test_a_model_with_code_of_its_own_is_loaded_by_the_auto_class_that_runs_it(auto_class, tag, tmp_path):
    auto_map = {"AutoConfig": "configuring.MyConfig", auto_class: "me/code--modeling.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    save_report(tmp_path, {"architecture": "MyModel"})
    card = ModelCard.load(tmp_path / "README.md")
    assert f'{auto_class}.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card.text
    assert card.data.pipeline_tag == tag


def test_the_table_has_every_figure_that_one_of_the_models_has_and_no_other():
    table = metrics_table({"dense": REPORT["dense"], "compressed": REPORT["compressed"]})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["", "dense", "compressed"]
    assert ["Accuracy", "90.00%", "89.54%"] in lines
    assert ["Relative BOPs", "", "1.23%"] in lines
    assert ["Latency, batch of one (ms)", "3.00", ""] in lines
    assert "F1" not in table
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


MINE = """---
license: apache-2.0  # as my employer wants it
tags:
- mine
datasets:
- my/data
pipeline_tag: zero-shot-image-classification
model-index:
- name: Mine
  results:
  - task: {type: image-classification}
    dataset: {name: D, type: my/data}
    metrics:
    - {type: f1, value: 0.5}
---

# My model

What I have to say.
"""


def test_an_existing_card_keeps_its_text_and_its_metadata():
    card = ModelCard(render_card(REPORT, MINE))
    assert card.text.strip().startswith("# My model\n\nWhat I have to say.")
    assert card.text.count("# My model") == card.text.count(BEGIN) == card.text.count(END) == 1
    data = card.data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "zero-shot-image-classification")
    assert data.tags == ["mine", "geta", "pruned", "quantized"]
    assert data.datasets == ["my/data", "uoft-cs/cifar10"]
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {("f1", 0.5), ("accuracy", 0.8954)}


def test_the_next_save_replaces_what_the_last_one_wrote_and_nothing_else():
    first = render_card(REPORT, MINE)
    edited = first.replace("What I have", "What we have").replace("- mine", "- mine\n- ours")
    edited += "\n## After it\n"
    worse = {"group_sparsity": 0.0, "mean_weight_bits": 4, "accuracy": 0.7}
    second = render_card(REPORT | {"compressed": worse, "repo_id": "me/small"}, edited, REPORT)
    card = ModelCard(second)
    assert card.data.tags == ["mine", "ours", "geta", "quantized"]
    assert {r.metric_value for r in card.data.eval_results} == {0.5, 0.7}
    for words in ("What we have", "## After it", "70.00%", "me/small"):
        assert words in second
    assert "89.54%" not in second
    assert second.count(BEGIN) == 1


@pytest.mark.parametrize("existing", [None, "", "# Mine\n\nText without metadata.", MINE, "---\n---\nText"])
def test_rendering_twice_is_rendering_once(existing):
    once = render_card(REPORT, existing)
    assert render_card(REPORT, once, REPORT) == once
    assert ModelCard(once).data.tags[-3:] == ["geta", "pruned", "quantized"]


def test_a_value_that_the_user_changed_stays():
    changed = render_card(REPORT).replace("base_model_relation: quantized", "base_model_relation: finetune")
    data = ModelCard(render_card(REPORT, changed, REPORT)).data
    assert data.get("base_model_relation") == "finetune"


@pytest.mark.parametrize("head", ["---\ntags: [geta\n---\n", "---\njust words\n---\n"])
def test_metadata_that_is_no_yaml_stays_as_it_is(head, caplog):
    card = render_card(REPORT, head + "Text.\n")
    assert card.startswith(head)
    assert BEGIN in card
    assert "stays as it is" in caplog.text


def test_a_model_index_that_the_hub_could_not_read_is_replaced():
    existing = "---\nmodel-index: nonsense\n---\nText.\n"
    assert len(ModelCard(render_card(REPORT, existing)).data.eval_results) == 1


def test_a_byte_order_mark_hides_no_metadata():
    assert ModelCard(render_card(REPORT, "\ufeff" + MINE)).data.license == "apache-2.0"


def test_text_of_the_user_in_another_encoding_goes_back_as_it_was(tmp_path):
    (tmp_path / "README.md").write_bytes(b"Stra\xdfe\n")
    save_report(tmp_path, REPORT)
    assert b"Stra\xdfe\n" in (tmp_path / "README.md").read_bytes()


def test_a_report_is_read_as_it_was_written(tmp_path):
    save_report(tmp_path, REPORT)
    assert load_report(tmp_path) == REPORT
    assert (tmp_path / "README.md").read_text() == render_card(REPORT)


def test_a_folder_without_a_report_has_an_empty_one(tmp_path):
    assert load_report(tmp_path) == {}
