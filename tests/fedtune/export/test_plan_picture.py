"""The picture of a plan's ranks: every matrix has a cell that says what it is."""

from __future__ import annotations

from xml.etree import ElementTree

from fedtune.export.plan_picture import Panel, plan_picture, rank_grid

SVG = "{http://www.w3.org/2000/svg}"
RANKS = {
    "model.layers.0.mlp.up": 2,
    "model.layers.0.q": 0,
    "model.layers.10.q": 8,
    "model.layers.2.q": 4,
}


def test_ranks_are_laid_out_by_kind_and_by_layer_in_its_order() -> None:
    grid = rank_grid(RANKS)
    assert grid.layers == ("0", "2", "10")
    assert set(grid.kinds) == {"mlp.up", "q"}
    assert grid.ranks == {("mlp.up", "0"): 2, ("q", "0"): 0, ("q", "2"): 4, ("q", "10"): 8}


def test_a_cell_is_the_stronger_the_higher_its_rank() -> None:
    picture = ElementTree.fromstring(plan_picture("Ranks", [Panel("till", "2 devices", RANKS)]))
    cells = {
        title.text: rect
        for rect in picture.iter(f"{SVG}rect")
        for title in rect.iter(f"{SVG}title")
    }
    assert set(cells) == {
        "till, layer 0, mlp.up: rank 2",
        "till, layer 0, q: frozen",
        "till, layer 2, q: rank 4",
        "till, layer 10, q: rank 8",
    }
    assert cells["till, layer 0, q: frozen"].get("class") == "frozen"
    opacities = [
        float(str(cells[f"till, layer {layer}"].get("fill-opacity")))
        for layer in ("0, mlp.up: rank 2", "2, q: rank 4", "10, q: rank 8")
    ]
    assert opacities == sorted(opacities)
    assert opacities[-1] == 1.0


def test_names_of_devices_and_classes_cannot_break_out_of_the_picture() -> None:
    bad = '</svg><script>alert("x")</script>'
    text = plan_picture(bad, [Panel(bad, bad, {f"model.layers.0.{bad}": 1})])
    picture = ElementTree.fromstring(text)
    assert not list(picture.iter(f"{SVG}script"))
    assert "<script" not in text


def test_the_text_alternative_says_what_the_panels_show() -> None:
    picture = ElementTree.fromstring(plan_picture("Ranks", [Panel("till", "2 devices", RANKS)]))
    assert picture.get("role") == "img"
    (words,) = picture.iter(f"{SVG}desc")
    assert words.text == (
        "Ranks. till (2 devices) trains 3 of 4 matrices over 3 layers; ranks: mlp.up 2, q 0 to 8."
    )
