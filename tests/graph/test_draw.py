"""The table, the picture and its page: nothing of the search space is left out, and nothing comes from elsewhere."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from hf_geta.graph.blocks import Block, Row, fold_blocks
from hf_geta.graph.draw import draw_svg, place_tracks, rows_dots
from hf_geta.graph.folding import unfold_name
from hf_geta.graph.page import draw_html
from hf_geta.graph.qadg import QADG, Axis, Frozen, Member
from hf_geta.graph.table import (
    Tensors,
    axis_rows,
    explain_missing_rules,
    format_count,
    format_table,
    prunable_parameters,
    to_dict,
)


def make_axis(name: str, kind: str, size: int, *members: tuple[str, int, int]) -> Axis:
    made = (Member(tensor, dim, torch.arange(size * k).reshape(size, k)) for tensor, dim, k in members)
    return Axis(name, kind, size, tuple(made))


def stack(sizes: list[int], prefix: str = "net.layers") -> tuple[QADG, Tensors]:
    """Layers with a hidden axis of their own, of these sizes, and one residual axis over all of them."""
    shapes, axes = {}, []
    for number, size in enumerate(sizes):
        path = f"{prefix}.{number}"
        shapes |= {f"{path}.up.weight": (size, 8), f"{path}.up.bias": (size,), f"{path}.down.weight": (8, size)}
        shapes |= {f"{path}.norm.weight": (8,)}
        up, down = (f"{path}.up.weight", 0, 1), (f"{path}.down.weight", 1, 1)
        axes.append(make_axis(f"{path}.hidden", "mlp", size, up, (f"{path}.up.bias", 0, 1), down))
    residual = [(name, len(shape) - 1 if "up.w" in name else 0, 1) for name, shape in shapes.items() if 8 in shape]
    residual = [one for one in residual if "bias" not in one[0]]
    axes.append(make_axis(f"{prefix}.channels", "channel", 8, *residual))
    return QADG(tuple(axes), (), (), (), {}), Tensors(shapes)


def all_cells(block: Block):
    return [cell for row in block.rows() for cell in row.cells]


def named(qadg: QADG, tie) -> set[str]:
    return {qadg.axes[number].name for number in tie}


# tables


def test_every_axis_is_in_exactly_one_row(family):
    rows = axis_rows(family.qadg, Tensors.of(family.model))
    assert sorted(name for row in rows for name in row.axes) == sorted(axis.name for axis in family.qadg.axes)
    for row in rows:
        assert sorted(unfold_name(row.name)) == sorted(row.axes)


def test_parameters_of_a_group_are_what_pruning_it_saves(family):
    axis = family.qadg.axes[0]
    row = next(row for row in axis_rows(family.qadg, Tensors.of(family.model)) if axis.name in row.axes)
    small = family.qadg.prune(family.model, {axis.name: [0]})
    saved = sum(p.numel() for p in family.model.parameters()) - sum(p.numel() for p in small.parameters())
    assert row.group_parameters == saved


def test_prunable_parameters_are_those_that_masking_all_groups_sets_to_zero(family):
    masked = family.copy()
    for parameter in masked.parameters():
        parameter.data.fill_(1.0)
    for rest in (0, 1):  # all but one, twice: zero_ keeps one group
        removed = {axis.name: [n for n in range(axis.size) if n != rest] for axis in family.qadg.axes}
        family.qadg.zero_(masked, removed)
    zeros = sum(int((parameter == 0).sum()) for parameter in masked.parameters())
    assert prunable_parameters(family.qadg, Tensors.of(family.model)) == zeros


def test_alike_layers_are_one_row_and_others_are_not():
    qadg, tensors = stack([4, 4, 6, 4])
    rows = {row.name: row.size for row in axis_rows(qadg, tensors)}
    assert rows == {"net.layers.{0..1,3}.hidden": 4, "net.layers.2.hidden": 6, "net.layers.channels": 8}


def test_ties_are_told_in_words():
    qadg, tensors = stack([4, 4])
    rows = axis_rows(qadg, tensors)
    assert rows[0].ties == "up rows; down columns"
    assert rows[1].ties == "layers.{0..1}.up columns; layers.{0..1}.down rows; layers.{0..1}.norm entries"


def test_the_table_says_what_is_frozen_and_why(family):
    tensors = Tensors.of(family.model)
    text = format_table(family.qadg, tensors)
    for frozen in family.qadg.frozen:
        of_buffers = all(name.rpartition("[")[0] in tensors.buffers for name in frozen.dimensions)
        assert of_buffers or frozen.reason in text
    assert f"{sum(axis.size for axis in family.qadg.axes):,} groups" in text


def test_an_operator_without_a_rule_is_named_with_its_module_and_the_way_out():
    qadg, tensors = stack([4])
    reason = "no rule for my_library.rotate.default"
    lost = Frozen(reason, "my_library.rotate", "net.rotary", ("net.layers.0.norm.weight[0]",))
    text = format_table(QADG(qadg.axes, (lost,), (), (), {}), tensors)
    assert "my_library.rotate.default" in text
    assert "net.rotary" in text
    assert "only costs compression" in text
    assert '@rule("my_library::rotate")' in text
    assert "--rules" in text
    assert explain_missing_rules(qadg) == ""


def test_json_holds_everything_unfolded(family):
    found = json.loads(json.dumps(to_dict(family.qadg, Tensors.of(family.model))))
    assert [axis["name"] for axis in found["axes"]] == [axis.name for axis in family.qadg.axes]
    members = [(m["tensor"], m["dim"]) for axis in found["axes"] for m in axis["members"]]
    assert members == [(m.tensor, m.dim) for axis in family.qadg.axes for m in axis.members]
    assert found["parameters"] == sum(parameter.numel() for parameter in family.model.parameters())


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (64, "64"),
        (999, "999"),
        (1234, "1.23 k"),
        (999_999, "1.00 M"),
        (86_567_656, "86.6 M"),
        (7e9, "7.00 B"),
    ],
)
def test_counts_are_short(number, text):
    assert format_count(number) == text


# folding into blocks


def check_folding(qadg: QADG, tensors: Tensors) -> None:
    picture = fold_blocks(qadg, tensors)
    drawn = [name for cell in all_cells(picture.root) for name in cell.names]
    owned = {member.tensor for axis in qadg.axes for member in axis.members}
    assert sorted(drawn) == sorted(name for name in tensors.shapes if name not in tensors.buffers or name in owned)
    numbers = [number for tie in picture.ties for number in tie]
    assert sorted(numbers) == list(range(len(qadg.axes)))  # each axis in one tie
    found = {
        (name, dim, tie)
        for cell in all_cells(picture.root)
        for name in cell.names
        for dim, dimension in enumerate(cell.dimensions)
        for tie, _ in dimension.ties
    }
    tie_of = {number: tie for tie, axes in enumerate(picture.ties) for number in axes}
    assert found == {
        (member.tensor, member.dim, tie_of[number]) for number, axis in enumerate(qadg.axes) for member in axis.members
    }
    for cell in all_cells(picture.root):
        if not cell.tied_to:
            sizes = list(zip(*(dimension.sizes for dimension in cell.dimensions), strict=True)) or [()]
            assert sizes == [tuple(tensors.shapes[name]) for name in cell.names] or not cell.dimensions


def test_folding_loses_no_tensor_and_no_tie(family):
    check_folding(family.qadg, Tensors.of(family.model))


@pytest.mark.parametrize("sizes", [[4], [4, 4, 4], [4, 6, 5], list(range(1, 13))])
def test_layers_fold_though_the_sizes_of_their_own_axes_differ(sizes):
    qadg, tensors = stack(sizes)
    check_folding(qadg, tensors)
    picture = fold_blocks(qadg, tensors)
    (block,) = picture.root.items
    assert isinstance(block, Block)
    assert block.copies == len(sizes)
    own, shared = sorted(picture.ties, key=len, reverse=True) if len(sizes) > 1 else picture.ties
    assert (len(own), len(shared)) == (len(sizes), 1)


def test_layers_that_are_tied_otherwise_do_not_fold():
    qadg, tensors = stack([4, 4, 4])
    odd = make_axis("odd", "mlp", 4, ("net.layers.1.up.weight", 0, 1))  # without its bias and columns
    qadg = QADG((qadg.axes[0], odd, *qadg.axes[2:]), (), (), (), {})
    check_folding(qadg, tensors)
    assert [block.path for block in fold_blocks(qadg, tensors).root.items] == ["net.layers.{0,2}", "net.layers.1"]


def test_tied_names_are_shown_as_tied():
    tensors = Tensors({"emb.weight": (9, 4), "head.weight": (9, 4)}, {"head.weight": "emb.weight"})
    rows = list(fold_blocks(QADG((), (), (), (), {}), tensors).root.rows())
    assert [row.cells[0].tied_to for row in rows] == [None, "emb.weight"]


def test_no_two_lines_meet(family):
    picture = fold_blocks(family.qadg, Tensors.of(family.model))
    tracks = place_tracks([rows_dots(row) for row in picture.root.rows()])
    assert sorted(track.tie for track in tracks) == list(range(len(picture.ties)))
    taken = [(track.lane, row) for track in tracks for row in range(track.dots[0][0], track.dots[-1][0] + 1)]
    assert len(taken) == len(set(taken))


# the page


def page_of(family) -> str:
    return draw_html(family.qadg, Tensors.of(family.model), family.name)


def test_every_axis_and_member_is_on_the_page(family):
    text = html.unescape(page_of(family))
    for tag, wanted in (
        ("code", {axis.name for axis in family.qadg.axes}),
        ("code", {member.tensor for axis in family.qadg.axes for member in axis.members}),
    ):
        shown = {name for folded in re.findall(f"<{tag}>(.*?)</{tag}>", text) for name in unfold_name(folded)}
        assert wanted <= shown


def test_the_page_refers_to_nothing_outside(family):
    text = page_of(family).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(|<link|<img|<iframe|fetch\(", text)


def test_the_picture_is_well_formed(family):
    tensors = Tensors.of(family.model)
    picture = fold_blocks(family.qadg, tensors)
    svg = draw_svg(family.qadg, tensors, picture)
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    ties = [one for one in root if one.get("class", "").startswith("tie")]
    assert sorted(int(one.get("data-t")) for one in ties) == list(range(len(picture.ties)))
    for element in root.iter():
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        assert 0 <= x + float(element.get("width", 0)) <= width + 1 or element is root
        assert 0 <= y + float(element.get("height", 0)) <= height + 1 or element is root


def test_frozen_dimensions_carry_their_reason(family):
    svg = draw_svg(family.qadg, Tensors.of(family.model), fold_blocks(family.qadg, Tensors.of(family.model)))
    shown = html.unescape(" ".join(re.findall(r"<title>frozen: (.*?)</title>", svg)))
    buffers = Tensors.of(family.model).buffers
    for frozen in family.qadg.frozen:
        if any(name.rpartition("[")[0] not in buffers for name in frozen.dimensions):
            assert frozen.reason in shown


def test_names_are_escaped():
    evil = "net.<script>alert('x')</script>&\""
    qadg, tensors = stack([4, 4], prefix=evil)
    lost = Frozen(evil, evil, evil, (f"{evil}.0.up.weight[1]",))
    text = draw_html(QADG(qadg.axes, (lost,), (), (), {}), tensors, evil)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_sizes_that_differ_are_shown_as_bars():
    qadg, tensors = stack([4, 6, 5])
    svg = draw_svg(qadg, tensors, fold_blocks(qadg, tensors))
    assert svg.count('class="bar"') == 3
    assert "4 to 6 hidden units" in svg
    assert "bar" not in draw_svg(*stack([4, 4]), fold_blocks(*stack([4, 4])))


def test_a_model_without_axes_is_drawn_too():
    tensors = Tensors({"weight": (3, 4), "scale": ()})
    text = draw_html(QADG((), (), (), (), {}), tensors, "nothing")
    assert "0 groups on 0 axes" in text
    assert "not used by the traced forward" in text
    assert all(isinstance(item, Row) for item in fold_blocks(QADG((), (), (), (), {}), tensors).root.items)
