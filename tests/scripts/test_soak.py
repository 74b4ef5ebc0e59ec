from types import SimpleNamespace

import pytest
import torch
from soak import CONFIG, Stage, Watch, broken, growth, main
from transformers import ViTConfig, ViTForImageClassification

from hf_geta import create_optimizer, prepare_model
from hf_geta.optim.qasso import QASSO


def test_a_short_run_violates_nothing(tmp_path, capsys):
    assert main(["--steps", "120", "--output_dir", str(tmp_path)]) == 0
    assert "120 steps, 0 violations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "said"),
    [("_zero_removed", "groups are zero, not"), ("_projection_step", "bits, not in [")],
)
def test_a_run_without_one_of_its_rules_is_told_of(rule, said, tmp_path, capsys, monkeypatch):
    """Groups that are not held at zero grow again; widths that are not projected leave their bounds."""
    monkeypatch.setattr(QASSO, rule, lambda self: self.base.step() if rule == "_projection_step" else None)
    assert main(["--steps", "60", "--output_dir", str(tmp_path)]) == 1
    assert said in capsys.readouterr().out


def test_a_parameter_that_is_not_finite_is_told_of():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))
    prepare_model(model, CONFIG, {"pixel_values": torch.randn(2, 1, 8, 8)})
    qasso = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), 100)
    trainer = SimpleNamespace(model=model, qasso=qasso, stage=Stage.PROJECTION)
    qasso.step_count = 10
    assert broken(trainer) == []
    model.classifier.bias.data[0] = torch.inf
    assert broken(trainer) == ["classifier.bias is not finite"]


def test_growing_time_and_memory_are_told_of():
    flat, rising = [1.0] * 1000, [1.0 + step / 1000 for step in range(1000)]
    megabytes = [(100 + step / 100) * 1e6 for step in range(1000)]
    quiet = Watch(None, [], {Stage.JOINT: flat}, {Stage.JOINT: [10**8] * 1000})
    assert growth(quiet)[1] == []
    (slower, larger) = growth(Watch(None, [], {Stage.JOINT: rising}, {Stage.JOINT: megabytes}))[1]
    assert "the time" in slower
    assert "grew by" in larger
    short = Watch(None, [], {Stage.JOINT: rising[::10]}, {Stage.JOINT: megabytes[::10]})
    assert growth(short)[1] == []
