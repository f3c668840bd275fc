"""The report is one page that stands on its own, and shows the run that was kept."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from ganvas.training.charts import svg_chart
from ganvas.training.grids import grid_labels, make_grid, save_grid
from ganvas.training.report import surviving

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("job", ["classifier", "gan", "autoencoder"])
def test_report_needs_nothing_but_itself(job, undisturbed):
    text = (undisturbed(job) / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?:|<script|@import|url\(", text)


def test_report_of_a_gan_shows_curves_grids_numbers_and_settings(undisturbed):
    text = (undisturbed("gan") / "report.html").read_text()
    page = Page(text)
    for words in ("Finished: 9 steps", "FD[tiny-cnn@", "test/cas", "Precision and recall", "discriminator_steps"):
        assert words in page.text
    pictures = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    assert pictures == [
        (undisturbed("gan") / "samples" / f"{name}.png").read_bytes()
        for name in ("best", "epoch-0003", "epoch-0002", "epoch-0001")
    ]
    charts = re.findall(r"<svg.*?</svg>", text)
    assert len(charts) >= 4
    for chart in charts:
        ElementTree.fromstring(chart)


def test_report_of_a_classifier_shows_the_confusion_matrix(undisturbed):
    text = (undisturbed("classifier") / "report.html").read_text()
    assert "Confusion matrix" in text
    counts = [
        int(count) for count in re.findall(r"<td>(\d+)</td>", text.partition("Confusion")[2].partition("<h2>")[0])
    ]
    assert sum(counts) == 48
    assert len(counts) == 16


def test_curve_follows_the_recovery_and_not_what_it_took_back():
    lines = [
        {"step": 5, "epoch": 1, "train/loss": 1.0},
        {"step": 9, "epoch": 2, "train/loss": "nan"},
        {"step": 9, "epoch": 2, "event": "fault", "message": ""},
        {"step": 5, "epoch": 2, "event": "recovery", "message": ""},
        {"step": 9, "epoch": 2, "train/loss": 0.5},
    ]
    assert [line["train/loss"] for line in surviving(lines)] == [1.0, 0.5]


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.0)],
        [(1, 2.0), (2, 2.0)],
        [(i, math.sin(i)) for i in range(5000)],
        [(0, 1e-7), (9, 3e4)],
        [(0, 1.0), (1, 20.01)],
    ],
)
def test_chart_stays_inside_its_frame(points):
    svg = ElementTree.fromstring(svg_chart({"a <b>": points}, "title & more"))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    drawn = [tuple(map(float, point.split(","))) for point in svg.find("polyline").attrib["points"].split()]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in drawn)
    assert 1 <= len(drawn) <= 400


def test_names_in_a_legend_are_parts_of_one_text():
    """Which a browser sets one after the other: nobody here knows how wide its font is."""
    svg = ElementTree.fromstring(svg_chart({"a/one": [(1, 0.5)], "<two>": [(1, 0.25)]}, ""))
    legend = [parts for text in svg.findall("text") if (parts := text.findall("tspan"))]
    assert [[part.text for part in parts] for parts in legend] == [["a/one", "<two>"]]
    assert float(legend[0][1].attrib["dx"]) > 0


def test_small_images_are_enlarged_without_smoothing(tmp_path):
    images = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    save_grid(tmp_path / "grid.png", images, columns=1)
    picture = Image.open(io.BytesIO((tmp_path / "grid.png").read_bytes()))
    assert picture.mode == "L"
    assert min(picture.size) >= 48
    assert {value for _, value in picture.getcolors()} == {0, 255, 128}


def test_grid_has_one_class_a_column():
    labels, columns = grid_labels(10, 64)
    assert columns == 10
    assert labels.view(-1, columns).tolist() == [list(range(10))] * 6


def test_grid_of_many_classes_shows_evenly_chosen_ones():
    labels, columns = grid_labels(100, 32)
    assert columns == 16
    assert (labels[0], labels[15]) == (0, 99)
    assert len(labels) == 32


def test_grid_places_images_row_by_row():
    images = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 64, 64)
    grid = make_grid(images, columns=2)
    assert grid.shape == (3, 131, 131)
    assert [int(grid[0, y, x]) for y in (10, 100) for x in (10, 100)] == [0, 85, 170, 255]
