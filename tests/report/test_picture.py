"""Laws of the picture of what is left."""

import re
from xml.etree import ElementTree

from hf_geta.report import load_report
from hf_geta.report.picture import Kept, Widths, draw_layers, draw_report

SVG = "{http://www.w3.org/2000/svg}"


def titles(svg):
    return [title.text for title in ElementTree.fromstring(svg).iter(f"{SVG}title")][1:]


def test_every_axis_and_every_layer_has_its_place(compressed_folder):
    report = load_report(compressed_folder)
    found = titles(draw_report(report))
    weights = {row["weight"] for row in report["operations"] if row["weight"]}
    assert len(found) == len(report["axes"]) + len(weights)
    assert "vit.layers.1.mlp.hidden: 21 of 24 groups" in found
    assert any(text.startswith("vit.layers.0.mlp.fc1: weights ") for text in found)


def test_it_stands_beside_the_card(compressed_folder):
    assert (compressed_folder / "geta_layers.svg").read_text() == draw_report(load_report(compressed_folder))
    assert "(geta_layers.svg)" in (compressed_folder / "README.md").read_text()


def test_a_bar_is_as_high_as_the_share_that_is_kept():
    svg = ElementTree.fromstring(draw_layers([Kept("a", "mlp", 3, 12)], []))
    frame, bar = svg.find(f"{SVG}g").iter(f"{SVG}rect")
    assert float(bar.get("height")) == float(frame.get("height")) * 3 / 12
    assert float(bar.get("y")) + float(bar.get("height")) == float(frame.get("y")) + float(frame.get("height"))


def test_nothing_in_it_needs_a_style_sheet_a_script_or_another_file(compressed_folder):
    svg = draw_report(load_report(compressed_folder))
    assert not re.search(r"style|class=|<script|href|url\(", svg)
    assert set(re.findall(r"https?://[^\"]*", svg)) == {"http://www.w3.org/2000/svg"}


def test_names_are_text_and_never_markup():
    name = '"><script>alert(1)</script>&'
    svg = draw_layers([Kept(name, "mlp", 1, 2)], [Widths(name, 4, 32)])
    assert "<script" not in svg
    assert titles(svg) == [f"{name}: 1 of 2 groups", f"{name}: weights 4 bits, inputs float"]


def test_hundreds_of_layers_stay_inside_the_picture():
    layers = [Widths(f"model.layers.{n}.mlp.experts.{n}.up_proj", 2 + n % 15, 8) for n in range(700)]
    svg = ElementTree.fromstring(draw_layers([], layers))
    width = float(svg.get("width"))
    assert width < 1200
    assert all(float(rect.get("x", 0)) + float(rect.get("width")) <= width for rect in svg.iter(f"{SVG}rect"))


def test_a_report_without_layers_has_no_picture():
    assert draw_report({"architecture": "X"}) is None
