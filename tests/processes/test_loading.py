"""Compressed checkpoints in processes of their own: used as users do, and without hf_geta."""

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.config import GETAConfig
from hf_geta.graph.build import build_qadg
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from tests.zoo.cases import Case
from tests.zoo.cases import build as build_case
from tests.zoo.inputs import make_inputs
from tests.zoo.law import distance, outputs, randomize_
from tests.zoo.test_zoo import FAST

WORDS = ["[PAD]", "<s>", "</s>", "[UNK]", "the", "a", "cat", "sat", "on", "mat", "good", "bad"]
TEXT = {"vocab_size": len(WORDS), "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(12).view(2, 6)


def run(program, *arguments):
    command = [sys.executable, *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def pack_(model, activation_bits=8):
    config = GETAConfig(weight_bits=(2, 16), activation_bits=(activation_bits, activation_bits))
    quantize_modules_(model, config)
    for i, layer in enumerate(quantized_layers(model).values()):
        layer.weight_quantizer.set_bits_(3 + i % 6)
        layer.input_quantizer.set_range_(3.0, activation_bits)
    return pack_model_(model)


@torch.no_grad()
def save(model, inputs, removed, folder, processor):
    randomize_(model)
    qadg = build_qadg(model, {model.main_input_name: inputs})
    small = pack_(qadg.prune(model, removed(qadg)))
    small.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save((inputs, small(inputs).logits), folder / "due.pt")


def one_of_each(qadg):
    return {axis.name: [0] for axis in qadg.axes}


def more_in_later_layers(qadg):
    """One key-value group of the first layer, two of the second, three of the third; and some hidden units."""
    layer = {axis.name: int(axis.name.split(".")[2]) for axis in qadg.axes}
    return {axis.name: range(layer[axis.name] + 1) for axis in qadg.axes}


def test_checkpoints_work_in_auto_classes_pipelines_caches_and_compile_without_a_warning(tmp_path):
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
    llama = transformers.LlamaConfig(
        **TEXT | {"num_attention_heads": 8}, **special, num_hidden_layers=3, num_key_value_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    language = transformers.LlamaForCausalLM(llama).eval()
    save(language, IDS, more_in_later_layers, tmp_path / "language", tokenizer)
    bert = transformers.BertConfig(**TEXT, num_hidden_layers=1, max_position_embeddings=32, num_labels=3)
    texts = transformers.BertForSequenceClassification(bert).eval()
    save(texts, IDS, one_of_each, tmp_path / "texts", tokenizer)
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_hidden_layers=1, num_labels=3))
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    save(vit.eval(), torch.randn(2, 3, 16, 16), one_of_each, tmp_path / "images", processor)
    run([Path(__file__).parent / "use_checkpoints.py"], tmp_path)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A packed checkpoint of every architecture of the fast zoo, with what its model computed."""
    folder = tmp_path_factory.mktemp("families")
    due = {}
    for model_type, model_class in FAST.items():
        model = build_case(Case("", model_type, model_class))
        inputs = make_inputs(model)
        randomize_(model)
        pack_(model).save_pretrained(folder / model_type)
        due[model_type] = (inputs, outputs(model, inputs), model.state_dict())
    return folder, due


@pytest.mark.parametrize("model_type", FAST)
def test_packed_models_of_all_kinds_of_architectures_load_bit_for_bit_and_save_the_same(model_type, families, tmp_path):
    folder, due = families
    inputs, expected, state = due[model_type]
    model_class = getattr(transformers, FAST[model_type])
    loaded, info = model_class.from_pretrained(folder / model_type, output_loading_info=True)
    assert not any(info.values()), info
    assert any(isinstance(module, PackedLayer) for module in loaded.modules())
    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path)
    names = [path.name for path in (folder / model_type).iterdir()]
    assert filecmp.cmpfiles(folder / model_type, tmp_path, names, shallow=False) == (names, [], [])
    assert distance(outputs(loaded, inputs), expected) < 1e-6  # one alignment of memory may sum in another order


WITHOUT = """
import json, sys
from pathlib import Path
import transformers
transformers.logging.set_verbosity_error()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    for model_class in (getattr(transformers, name), transformers.AutoModel):
        for mismatches in (False, True):
            try:
                model_class.from_pretrained(folder, ignore_mismatched_sizes=mismatches)
            except ValueError as error:
                assert "import hf_geta" in str(error), error
            else:
                print(folder.name, model_class.__name__)
assert "hf_geta" not in sys.modules
"""


def test_without_hf_geta_no_architecture_gives_a_model_and_each_says_what_to_do(families):
    assert run(["-c", WITHOUT], families[0]) == ""
