import json

from benchmark_graph import main


def test_a_model_on_the_meta_device_is_measured_without_its_weights(tmp_path, capsys):
    (figures,) = main(["--models", "llama-8b", "--output", str(tmp_path / "graph.json")])
    assert figures == json.loads((tmp_path / "graph.json").read_text())[0]
    assert figures["axes"] == 2 * 32
    assert figures["bytes"] < 0.1 * figures["parameters"]  # with weights it would be four times their number
    assert "llama-8b" in capsys.readouterr().out
