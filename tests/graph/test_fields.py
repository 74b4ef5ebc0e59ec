"""What the ints of a config state, found by building models on the meta device."""

import pytest
import transformers

from hf_geta.graph.fields import ConfigFields, connected, format_path

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
VIT |= {"image_size": 16, "patch_size": 8}
MLP = {f"vit.layers.{n}.mlp.{name}": dim for n in (0, 1) for name, dim in (("fc1.weight", 0), ("fc1.bias", 0))}
MLP |= {f"vit.layers.{n}.mlp.fc2.weight": 1 for n in (0, 1)}


@pytest.fixture(scope="module")
def vit():
    return ConfigFields(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=30)))


def test_a_field_states_the_dimensions_that_move_with_it(vit):
    assert vit.dims["intermediate_size",] == set(MLP.items())
    assert ("vit.embeddings.cls_token", 2) in vit.dims["hidden_size",]


def test_numbers_that_are_no_sizes_are_not_tried(vit):
    """Thirty labels with a number each, and numbers of layers, whose change is no change of sizes."""
    assert not any("label2id" in path for path in vit.values)
    assert ("num_hidden_layers",) not in vit.dims


def test_solving_finds_the_values_that_build_the_wanted_sizes(vit):
    changes = vit.solve(dict.fromkeys(MLP.items(), 9))
    assert changes == {("intermediate_size",): 9}
    assert vit.config_with(changes).intermediate_size == 9


def test_a_size_that_only_goes_together_with_others_is_stated_by_no_field(vit):
    with pytest.raises(ValueError, match=r"no field of ViTConfig states the size of vit\.layers\.0\.mlp\.fc1\.weight"):
        vit.solve({("vit.layers.0.mlp.fc1.weight", 0): 9})


def test_different_sizes_of_one_field_are_refused_with_all_of_them(vit):
    with pytest.raises(ValueError, match=r"at once, but they are .*layers\.0\.mlp.*\(9\), .*layers\.1\.mlp.*\(7\)"):
        vit.solve({(name, dim): 9 if ".0." in name else 7 for name, dim in MLP.items()})


def test_an_error_about_many_sizes_stays_short():
    values = VIT | {"num_hidden_layers": 6}
    deep = ConfigFields(transformers.ViTModel(transformers.ViTConfig(**values)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc2\.weight\[1\] \(11\), and 12 more\.$"):
        deep.solve({(name, dim): 10 + n for n in range(6) for name, dim in _mlp(n).items()})


def _mlp(layer):
    place = f"layers.{layer}.mlp"
    return {f"{place}.fc1.weight": 0, f"{place}.fc1.bias": 0, f"{place}.fc2.weight": 1}


def test_fields_of_inner_configs_and_lists_have_paths():
    inner = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = inner | {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8)
    stated = {format_path(path) for path in ConfigFields(transformers.CLIPModel(config)).dims}
    assert {"text_config.intermediate_size", "vision_config.intermediate_size", "projection_dim"} <= stated
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    stated = {format_path(path) for path in ConfigFields(transformers.ResNetModel(config)).dims}
    assert "hidden_sizes[1]" in stated


def test_the_size_of_a_head_is_written_out_where_the_code_reads_it():
    """So that fewer heads are not larger ones: ViT's code reads head_dim, which its config need not have."""
    values = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    vit = ConfigFields(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    assert vit.config_with({("num_attention_heads",): 2}).head_dim == 4
    bert = ConfigFields(transformers.BertModel(transformers.BertConfig(**values, vocab_size=32)))
    assert not hasattr(bert.config_with({("num_attention_heads",): 2}), "head_dim")


def test_what_owns_a_dimension_together_is_connected_also_by_way_of_others():
    a, b, c = (("t", 0), ("t", 1), ("u", 0))
    owned = {"p": frozenset([a]), "q": frozenset([b]), "r": frozenset([a, b]), "s": frozenset([c])}
    assert sorted(map(sorted, connected(owned))) == [["p", "q", "r"], ["s"]]
