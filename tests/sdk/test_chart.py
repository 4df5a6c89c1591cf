"""A chart is well-formed XML that says what it shows, with points where they belong and no name that breaks it."""

import math
import re
from xml.etree import ElementTree

import pytest

from shoal.chart import Axis, Line, draw, log_ticks, ticks

SVG = "{http://www.w3.org/2000/svg}"
LINES = [
    Line("stack", ((10, 1000.0), (20, 100.0), (40, 10.0))),
    Line("int4", ((30, 31.6227766),)),
]


def drawn(lines=LINES, **names):
    labels = {"title": "T", "description": "D", "x_label": "MiB", "y_label": "perplexity"} | names
    return ElementTree.fromstring(draw(lines, **labels))


def marks(root):
    """Of each curve the places of its points, without the legend's."""
    curves = [group.findall(f"{SVG}path[@class='mark']") for group in root.findall(f"{SVG}g")]
    places = (re.findall(r"[\d.]+", mark.attrib["transform"]) for group in curves for mark in group)
    return [tuple(map(float, place)) for place in places]


def test_points_are_where_they_should_be():
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = marks(drawn())
    assert x2 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2), "bytes are linear"
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y1 > y0, "perplexity is logarithmic, more is higher"
    assert (x3, y3) == (pytest.approx((x1 + x2) / 2, abs=0.2), pytest.approx((y1 + y2) / 2, abs=0.2))


def test_a_tick_is_where_a_point_of_its_value_is():
    root = drawn()
    labels = {(text.attrib.get("text-anchor"), text.text): text.attrib for text in root.iter(f"{SVG}text")}
    (x0, y0), (_, y1), *_ = marks(root)
    assert float(labels["middle", "10"]["x"]) == pytest.approx(x0, abs=0.2)
    assert float(labels["end", "1,000"]["y"]) == pytest.approx(y0 + 4, abs=0.2)
    assert float(labels["end", "100"]["y"]) == pytest.approx(y1 + 4, abs=0.2)


def test_it_says_what_it_shows_and_draws_nothing_from_elsewhere():
    text = draw(LINES, title="T", description="D", x_label="x", y_label="y")
    root = ElementTree.fromstring(text)
    assert root.attrib["role"] == "img"
    said = {child.attrib.get("id"): child.text for child in root}
    assert [said[name] for name in root.attrib["aria-labelledby"].split()] == ["T", "D"]
    assert [group.find(f"{SVG}title").text for group in root.findall(f"{SVG}g")] == ["stack", "int4"]
    assert "<script" not in text and "href" not in text and "url(" not in text and "@import" not in text


def test_curves_can_be_told_apart_without_colour():
    root = drawn([Line(str(index), ((1, 1.0 + index), (2, 2.0 + index))) for index in range(6)])
    groups = root.findall(f"{SVG}g")
    strokes = [group.find(f"{SVG}path[@class='line']") for group in groups]
    assert len({stroke.attrib.get("stroke-dasharray") for stroke in strokes}) == 6
    assert len({stroke.attrib["stroke"] for stroke in strokes}) == 6
    assert len({group.find(f"{SVG}path[@class='mark']").attrib["d"] for group in groups}) == 6
    boxes = [text for text in root.iter(f"{SVG}text") if text.text in "012345" and text.attrib["x"] == "128"]
    assert len({text.attrib["y"] for text in boxes}) == 6, "a line of the legend for each"


@pytest.mark.parametrize("name", ['"><script>alert(1)</script>', "&amp;]]>", "\x00\x1b[31m", "\ud800", "é" * 5000, ""])
def test_names_cannot_break_it(name):
    text = draw([Line(name, ((1, 1.0),))], title=name, description=name, x_label=name, y_label=name)
    root = ElementTree.fromstring(text.encode())
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "text", "path", "g"
    }  # fmt: skip
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)


@pytest.mark.parametrize(
    "points",
    [
        ((5, 2.0),),
        ((0, 1e-9), (0, 1e300)),
        ((7, 3.0), (7, 3.0)),
        ((1 << 60, 31.270001), ((1 << 60) + 4096, 31.27)),
        tuple((x, math.exp(700 - x)) for x in range(700)),
    ],
    ids=lambda points: f"{len(points)} from {points[0]}",
)
def test_any_range_is_drawn_inside_the_picture(points):
    root = drawn([Line("a", points)])
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in marks(root))


@pytest.mark.parametrize("points", [(), ((1, 0.0),), ((1, -2.0),), ((math.nan, 1.0),), ((1, math.inf),)])
def test_what_cannot_be_drawn_is_refused(points):
    with pytest.raises(ValueError, match="points"):
        drawn([Line("a", points)])


def test_ticks_are_round_and_few():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(71.3, 209.8, 6) == [75, 100, 125, 150, 175, 200]
    assert log_ticks(1, 10_000) == [1, 10, 100, 1000, 10_000]
    assert log_ticks(20, 90) == [20, 30, 50, 70]
    for low, high in ((31.2, 31.3), (9, 1e300), (1e-9, 3)):
        found = log_ticks(low, high)
        assert 2 <= len(found) <= 10 and all(low <= tick <= high for tick in found)


def test_an_axis_is_exact_at_its_ends():
    axis = Axis(10, 1000, 400, 40, logarithmic=True)
    assert [axis.at(value) for value in (10, 100, 1000)] == [400, pytest.approx(220), 40]
