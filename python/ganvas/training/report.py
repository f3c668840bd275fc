"""``report.html``: the curves, grids and settings of a run in one file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from typing import Any

from ganvas.training import durable
from ganvas.training.charts import Series, svg_chart
from ganvas.training.metrics_log import read_metrics
from ganvas.training.run_folder import RunFolder

_MOST_GRIDS = 6

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.charts, .grids { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .85rem; opacity: .75; }
svg { width: 36rem; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
svg .axis { stroke: currentColor; stroke-opacity: .2; }
img { image-rendering: pixelated; max-width: 100%; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
table.counts td, table.counts th { padding: .15rem .5rem; text-align: right; font-variant-numeric: tabular-nums; }
td.number { font-variant-numeric: tabular-nums; } .fault { color: #c33; }
"""

# Metric names end in words that say which chart they belong to; the first match decides.
_CHARTS = (
    ("Fréchet distance (lower is better)", lambda name: name.startswith("FD[")),
    ("Accuracy", lambda name: name.endswith("accuracy")),
    ("Classification accuracy score", lambda name: name.endswith("/cas")),
    ("Precision and recall", lambda name: name.endswith(("/precision", "/recall"))),
    ("Diversity relative to real images", lambda name: name.endswith("/diversity")),
    ("Loss", lambda name: name.endswith("loss")),
    ("Mean logit", lambda name: name.endswith("logit")),
    ("Learning rate", lambda name: name.endswith("learning_rate")),
    ("Images per second", lambda name: name.endswith("images_per_second")),
    ("Other", lambda name: True),
)


_SHARES = ("Accuracy", "Classification accuracy score", "Precision and recall", "Diversity relative to real images")


def write_report(folder: RunFolder) -> None:
    """Write the report from what is in the run folder; the old one is replaced in one step."""
    durable.replace_file(folder.report, render(folder).encode())


def render(folder: RunFolder) -> str:
    """The page as text."""
    description = folder.read_description()
    lines = read_metrics(folder.metrics)
    title = f"{description['job']} {description['model']['name']} on {description['data']['name']}"
    return "\n".join(
        (
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            _status(lines),
            _section("Latest numbers", _latest(lines)),
            _section("Samples", _grids(folder)),
            _section("Curves over the steps", _curves(lines)),
            _section("Confusion matrix of the test set (rows: true class)", _confusion(lines, description)),
            _section("Events", _events(lines)),
            _section("Settings", _settings(description)),
            "</body></html>",
        )
    )


def _section(heading: str, content: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>\n{content}" if content else ""


def _status(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return "<p>Nothing measured yet.</p>"
    last = lines[-1]
    state = "Finished" if last.get("event") == "finished" else "Up to now"
    return f"<p>{state}: {last['step']:,} steps, epoch {last['epoch']}.</p>"


def surviving(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the run's final course: a recovery went back to its step and took those after it away."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == "recovery":
            kept = [earlier for earlier in kept if earlier["step"] <= line["step"]]
        elif line.get("event") != "fault":
            kept.append(line)
    return kept


def _series(lines: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """Points (step, value) by metric; values that are not finite stand as strings in the file and are left out."""
    series: dict[str, Series] = {}
    for line in surviving(lines):
        for name, value in line.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(name, []).append((line["step"], value))
    return series


def _latest(lines: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{points[-1][1]:.5g}</td></tr>'
        for name, points in sorted(_series(lines).items())
        if not name.startswith("train/")
    )
    return f"<table>{rows}</table>" if rows else ""


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    charts: dict[str, dict[str, Series]] = {}
    for name, points in _series(lines).items():
        if len(points) > 1:
            title = next(title for title, belongs in _CHARTS if belongs(name))
            charts.setdefault(title, {})[name] = points
    figures = []
    for title, _ in _CHARTS:
        if title in charts:
            chart = svg_chart(charts[title], title, is_share=title in _SHARES)
            figures.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _grids(folder: RunFolder) -> str:
    paths = sorted(folder.samples.glob("epoch-*.png"))
    if len(paths) > _MOST_GRIDS:
        # The last one and evenly spaced ones before it: how it came about, in a page of bounded size.
        paths = [paths[round(i * (len(paths) - 1) / (_MOST_GRIDS - 1))] for i in range(_MOST_GRIDS)]
    figures = [
        f'<figure><img alt="{html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        for path in (*folder.samples.glob("best.png"), *reversed(paths))
    ]
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def _confusion(lines: Sequence[dict[str, Any]], description: dict[str, Any]) -> str:
    matrix = next((line["confusion_matrix"] for line in reversed(lines) if "confusion_matrix" in line), None)
    names = description["data"]["class_names"]
    if matrix is None or len(names) > 40:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{count}</td>" for count in row) + "</tr>"
        for name, row in zip(names, matrix)
    )
    return f'<table class="counts"><tr><th></th>{head}</tr>{rows}</table>'


def _events(lines: Sequence[dict[str, Any]]) -> str:
    items = "".join(
        f'<li class="{line["event"]}">step {line["step"]:,}: {html.escape(line["message"])}</li>'
        for line in lines
        if "event" in line and "message" in line
    )
    return f"<ul>{items}</ul>" if items else ""


def _settings(description: dict[str, Any]) -> str:
    rows = {"ganvas": description["ganvas"], **description["config"], "model options": description["model"]["options"]}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in rows.items()}
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in texts.items()
    )
    return f"<table>{cells}</table>"
