"""What is sent to the Hub, at the boundary of its client: the very files and bytes, and never a token."""

import io
import json
import logging
import zipfile
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load as load_tensors
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.checkpoint.saving import HINT
from hf_geta.report import load_report, save_report
from tests.test_trainer import digits, make_trainer

TOKEN, ENVIRONMENT_TOKEN = "hf_thisIsTheTokenOfTheArguments", "hf_thisIsTheTokenOfTheEnvironment"
FILES = {"README.md", "config.json", "geta_layers.svg", "geta_report.json", "model.safetensors"}
PROCESSOR = "preprocessor_config.json"
STEPS, SAVE_STEPS = 20, 5  # the cool-down begins with step 12
CONFIG = GETAConfig(
    group_sparsity=0.5, weight_bits=[2, 6], activation_bits=[4, 8], pruning_periods=2, initial_bits=8, joint_steps=0.3
)


class FakeHub:
    """Stands in for the client's calls that reach the network, and remembers what they were given."""

    def __init__(self, monkeypatch):
        self.commits = []  # (message, {path in the repository: bytes}) in the order of the calls
        self.tokens = set()
        self.there = {}  # (repository, file) -> its path
        for name in ("create_repo", "upload_folder", "create_commit"):
            call = getattr(self, name)
            monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, *a, call=call, **k: call(*a, **k))
        for module in (huggingface_hub.repocard, huggingface_hub):
            monkeypatch.setattr(module, "hf_hub_download", self.download)

    def create_repo(self, repo_id, token=None, **_):
        self.tokens.add(token)
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, token, path_in_repo="", run_as_future=False, **k):
        files = {str(p.relative_to(folder_path)): p for p in sorted(Path(folder_path).rglob("*")) if p.is_file()}
        names = filter_repo_objects(list(files), ignore_patterns=k.get("ignore_patterns"))
        sent = {str(Path(path_in_repo) / name): files[name].read_bytes() for name in names}
        return self.commit(commit_message, sent, token, run_as_future)

    def create_commit(self, repo_id, operations, commit_message, token=None, **_):
        return self.commit(
            commit_message, {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}, token
        )

    def commit(self, message, files, token, run_as_future=False):
        self.tokens.add(token)
        self.commits.append((message, files))
        done = Future()
        done.set_result(message)
        return done if run_as_future else message

    def download(self, repo_id, filename, token=None, **_):
        self.tokens.add(token)
        if (repo_id, filename) not in self.there:
            raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        return str(self.there[repo_id, filename])


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT_TOKEN)
    return FakeHub(monkeypatch)


def processor():
    return ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5])


def trained(folder, config=CONFIG, **changes):
    trainer = make_trainer(folder, config=config, max_steps=STEPS, **changes)
    trainer.processing_class = processor()
    trainer.train()
    return trainer


def assert_is_compressed(files):
    """Packed weights, pruned, and nothing of the training."""
    config = json.loads(files["config.json"])
    assert config["transformers_weights"] == HINT
    config = config["quantization_config"]
    assert config["quant_method"] == "geta"
    tensors = load_tensors(files["model.safetensors"])
    assert {tensors[f"{name}.weight"].dtype for name in config["layers"]} == {torch.uint8}
    assert not any("quantizer" in name for name in tensors)
    assert len(files["model.safetensors"]) < 20_000  # dense: 43 kB of numbers
    recorded = json.loads(files["geta_report.json"])["files"]["model.safetensors"]
    assert recorded["bytes"] == len(files["model.safetensors"])


def content(data):
    """The bytes of a file, those inside an archive (torch.save) as well."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        archive = zipfile.ZipFile(io.BytesIO(data))
        return data + b"".join(archive.read(name) for name in archive.namelist())
    return data


def assert_no_token(*texts):
    for text in texts:
        found = content(text if isinstance(text, bytes) else text.encode())
        assert TOKEN.encode() not in found
        assert ENVIRONMENT_TOKEN.encode() not in found


@pytest.mark.parametrize(
    ("strategy", "models", "checkpoints"),
    [
        ("end", [], []),
        ("every_save", [15, 20], []),
        ("checkpoint", [15, 20], ["last-checkpoint"] * 4),
        ("all_checkpoints", [15, 20], [f"checkpoint-{step}" for step in (5, 10, 15, 20)]),
    ],
)
def test_only_compressed_models_are_sent_as_models(strategy, models, checkpoints, hub, tmp_path, caplog, capfd):
    """And checkpoints where they are asked for, in folders of theirs; the token is used, and written nowhere."""
    caplog.set_level(logging.DEBUG)
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_token": TOKEN, "hub_model_id": "me/small"}
    trainer = trained(tmp_path / "out", save_strategy="steps", save_steps=SAVE_STEPS, **options)
    sent_as_model = [(message, files) for message, files in hub.commits if "checkpoint" not in message]
    assert [message for message, _ in sent_as_model] == [f"Training in progress, step {step}" for step in models]
    for _, files in sent_as_model:
        assert set(files) == {*FILES, PROCESSOR}
        assert_is_compressed(files)
    sent_as_checkpoint = [files for message, files in hub.commits if "checkpoint" in message]
    assert [{Path(name).parts[0] for name in files} for files in sent_as_checkpoint] == [{c} for c in checkpoints]
    assert all(any(name.endswith("optimizer.pt") for name in files) for files in sent_as_checkpoint)

    trainer.save_model()  # as scripts do; with push_to_hub=True Trainer publishes then
    message, files = hub.commits[-1]
    assert message == "Model save"
    assert set(files) == {*FILES, PROCESSOR}
    assert_is_compressed(files)

    assert hub.tokens <= {TOKEN, None}
    assert TOKEN in hub.tokens
    assert_no_token(*(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()))
    assert_no_token(*(data for _, files in hub.commits for data in files.values()))
    assert_no_token(caplog.text, *capfd.readouterr(), str(trainer.args))


def test_the_pushes_of_a_run_change_nothing_in_it(hub, tmp_path):
    """Finalizing in the midst of a run draws no random number and leaves the model as it is."""
    pushed = trained(tmp_path / "a", save_strategy="steps", save_steps=SAVE_STEPS, push_to_hub=True)
    plain = trained(tmp_path / "b", save_strategy="steps", save_steps=SAVE_STEPS)
    assert hub.commits
    state = plain.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pushed.model.state_dict().items())


def test_a_run_without_compression_pushes_as_trainer_does_but_for_the_token(hub, tmp_path):
    options = {"push_to_hub": True, "hub_token": TOKEN, "save_strategy": "steps", "save_steps": STEPS}
    trainer = trained(tmp_path / "out", config=None, **options)
    trainer.push_to_hub()
    assert {"training_args.bin", "model.safetensors"} <= set(hub.commits[0][1])
    assert_no_token(*(data for _, files in hub.commits for data in files.values()))
    assert trainer.args.hub_token == TOKEN


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that has not been saved or published; its folder has the user's own card."""
    folder = tmp_path_factory.mktemp("run") / "small"
    trainer = trained(folder, save_strategy="steps", save_steps=STEPS)
    return trainer, folder


def test_trainer_publishes_what_it_saved(run, hub):
    trainer, folder = run
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n")
    trainer.push_to_hub(commit_message="Ready", tags=["digits"], token=TOKEN)
    ((message, files),) = hub.commits
    assert message == "Ready"
    assert files == {name: (folder / name).read_bytes() for name in {*FILES, PROCESSOR}}
    assert_is_compressed(files)
    assert_no_token(*files.values())
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("me/small")' in card.text
    assert "My words." in card.text
    assert "hf_geta" in card.text
    assert card.data.license == "mit"
    assert {"digits", "geta", "pruned", "quantized"} <= set(card.data.tags)


def test_what_was_measured_is_still_on_the_card_that_is_published(run, hub):
    trainer, folder = run
    trainer.save_model()
    report = load_report(folder)
    save_report(folder, report | {"compressed": report["compressed"] | {"accuracy": 0.625}})
    trainer.push_to_hub()
    assert "62.50%" in hub.commits[-1][1]["README.md"].decode()


def test_the_licence_of_the_base_model_is_asked_for_once_it_is_published(run, hub, tmp_path):
    trainer, folder = run
    (tmp_path / "base.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    hub.there["them/base", "README.md"] = tmp_path / "base.md"
    (folder / "README.md").unlink(missing_ok=True)
    trainer.push_to_hub(finetuned_from="them/base", dataset_tags="them/digits", model_name="Small")
    card = ModelCard(hub.commits[-1][1]["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("bsd-3-clause", "them/base")
    assert card.data.datasets == ["them/digits"]


def test_a_finalized_model_publishes_itself_with_processor_report_and_card(run, hub):
    trainer, _ = run
    small = trainer.finalize()
    small.push_to_hub("me/other", tags=["digits"], token=TOKEN)
    ((_, files),) = hub.commits
    assert set(files) == {*FILES, PROCESSOR}
    assert_is_compressed(files)
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("me/other")' in card.text
    assert "More Information Needed" not in card.text  # transformers' form
    assert {"digits", "geta", "pruned", "quantized"} <= set(card.data.tags)
    assert_no_token(*files.values())


def test_a_loaded_model_publishes_itself_with_what_lay_beside_it(run, hub, tmp_path):
    trainer, folder = run
    trainer.save_model()
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nthumbnail: mine.png\n", 1) + "\nWritten by hand.\n")
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    loaded.push_to_hub("me/again", token=TOKEN)
    loaded.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/again", token=TOKEN)
    for _, files in hub.commits:
        assert set(files) == {*FILES, PROCESSOR}
        assert_is_compressed(files)
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        card = ModelCard(files["README.md"].decode())
        assert "Written by hand." in card.text
        assert 'from_pretrained("me/again")' in card.text
        assert card.data.to_dict()["thumbnail"] == "mine.png"
        assert "thumbnail" not in card.text  # the metadata of the source is metadata
        assert_no_token(*files.values())


def test_a_loaded_model_with_other_weights_is_published_without_the_report_of_the_first(run, hub):
    trainer, folder = run
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        loaded.vit.layernorm.bias += 1
    loaded.push_to_hub("me/changed")
    ((_, files),) = hub.commits
    assert set(files) == {"README.md", "config.json", "model.safetensors"}


def test_a_tokenizer_that_only_the_collator_has_is_saved_and_published(run, hub, monkeypatch):
    trainer, folder = run
    monkeypatch.setattr(trainer, "processing_class", None)
    monkeypatch.setattr(trainer.data_collator, "tokenizer", processor(), raising=False)
    (folder / PROCESSOR).unlink(missing_ok=True)
    trainer.push_to_hub()
    trainer.finalize().push_to_hub("me/other")
    assert all(PROCESSOR in files for _, files in hub.commits)


def small_model(config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=28, patch_size=14, num_channels=1, num_labels=10))
    inputs = {"pixel_values": torch.stack([item["pixel_values"] for item in digits()[:2]])}
    prepare_model(model.eval(), config, inputs)
    model.geta.qadg.zero_(model, {"vit.layers.0.mlp.hidden": [3]})
    return finalize_model(model)


@pytest.mark.parametrize("config", [GETAConfig(), GETAConfig(weight_bits=None)])
def test_a_model_of_a_loop_of_ones_own_publishes_report_and_card(config, hub, tmp_path):
    hub.there["me/small", "README.md"] = tmp_path / "there.md"
    (tmp_path / "there.md").write_text("---\nlicense: mit\n---\n\nOn the Hub already.\n")
    small = small_model(config)
    small.push_to_hub("me/small")
    small.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="me/small")
    assert len(hub.commits) == 2
    for _, files in hub.commits:
        assert set(files) == FILES
        assert json.loads(files["config.json"])["transformers_weights"] == HINT
        card = ModelCard(files["README.md"].decode())
        assert "On the Hub already." in card.text
        assert card.data.license == "mit"
        assert "geta" in card.data.tags


def test_publishing_again_replaces_what_the_first_time_had_said(hub, tmp_path):
    small_model(GETAConfig(weight_bits=(4, 4), activation_bits=None)).push_to_hub("me/small")
    for name in ("README.md", "geta_report.json"):
        (tmp_path / name).write_bytes(hub.commits[-1][1][name])
        hub.there["me/small", name] = tmp_path / name
    small_model(GETAConfig(weight_bits=(6, 6), activation_bits=None)).push_to_hub("me/small")
    first, second = (ModelCard(files["README.md"].decode()).data.tags for _, files in hub.commits)
    assert "4-bit-weights" in first
    assert second == [tag.replace("4-bit", "6-bit") for tag in first]


def test_a_model_that_publishes_itself_is_copied_and_pickled_as_any_other(tmp_path):
    small = small_model(GETAConfig())
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    inputs = digits()[0]["pixel_values"][None]
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, small(inputs).logits)
