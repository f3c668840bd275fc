"""The rows as JSON and as tables, and what they say about the claims."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from on_gpu.cases import Row
from on_gpu.sides import COMPILE_MODES

TORCH = ("eager", *COMPILE_MODES)
"""What ganvas is compared with."""
OURS = ("ganvas", "ganvas graph")
SIDES = ("eager", "eager graph", *COMPILE_MODES, *OURS)
COMPARED = ("eager", "compile", "best", "eager graph")
"""Names of :func:`ratios`."""
NARROW = 128
"""Channels up to which a layer counts in the geometric mean."""


class Report:
    """All rows by section and name, written to ``path`` after each.

    Args:
        path: of the JSON file; None for none.
        minutes: that the run may take.
        sections: in the order of the tables.
    """

    def __init__(self, path: Path | None, minutes: float, sections: Iterable[str]) -> None:
        self._path = path
        self._begin = time.monotonic()
        self._minutes = minutes
        self._date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.complete = False
        self.sections: dict[str, dict[str, Row]] = {section: {} for section in sections}

    def add(self, section: str, name: str, row: Row) -> None:
        """A row, or what a later stage adds to it: a failure then leaves it as it is, with a note."""
        rows = self.sections[section]
        before = rows.get(name)
        if before is not None and before["status"] == "measured" and row["status"] != "measured":
            before.setdefault("notes", []).append(f"with torch.compile {row['status']}: {row['reason']}")
        else:
            rows[name] = row
        self.write()

    def write(self) -> None:
        """All that there is."""
        if self._path is None:
            return
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps(_finite(self.as_dict()), indent=1, default=str, allow_nan=False) + "\n")
        os.replace(temporary, self._path)

    def as_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {
            "date": self._date,
            "minutes": self._minutes,
            "seconds": round(self.seconds(), 1),
            "complete": self.complete,
            "summary": self.summary(),
            "sections": {
                section: [{"name": name, **row} for name, row in rows.items()]
                for section, rows in self.sections.items()
            },
        }

    def seconds(self) -> float:
        """Since it was begun."""
        return time.monotonic() - self._begin

    @property
    def bandwidth(self) -> float | None:
        """Measured, in bytes read and written per second; None if it was not."""
        return self.sections.get("machine", {}).get("copy", {}).get("bytes_per_second")

    @property
    def peak(self) -> float | None:
        """Measured, in bfloat16 operations per second."""
        return self.sections.get("machine", {}).get("matmul", {}).get("operations_per_second")

    def floor_ms(self, row: Row, part: str) -> tuple[float | None, float | None]:
        """What memory and what arithmetic cannot be faster than."""
        floor = row["floor"][part]
        of_memory = None if self.bandwidth is None else 1000 * floor["bytes"] / self.bandwidth
        return of_memory, None if self.peak is None else 1000 * floor["operations"] / self.peak

    def of_bandwidth(self, row: Row, side: str, part: str) -> float | None:
        """The floor's bytes through the time, in parts of the measured bandwidth."""
        of_memory, milliseconds = self.floor_ms(row, part)[0], row["sides"].get(side, {}).get(f"{part}_ms")
        return None if of_memory is None or milliseconds is None else of_memory / milliseconds

    def summary(self) -> dict[str, Any]:
        """The numbers that the claims are about; None where nothing was measured for them."""
        shares = [
            self.of_bandwidth(row, "ganvas", part)
            for row in self._measured("kernels")
            for part in ("forward", "backward", "call")
            if part in row["floor"]
        ]
        errors = [error_ratio(row, side) for s in ("layers", "chains") for row in self._measured(s) for side in OURS]
        kept = [share(row, "kept_bytes") for row in self._measured("chains")]
        return {
            "least share of the bandwidth": _extreme(min, shares),
            **self._ratios("layers"),
            **self._ratios("chains"),
            "models": {
                name: {**ratios(row, "step"), "peak_bytes": share(row, "peak_bytes")}
                for name, row in self.sections.get("models", {}).items()
                if row["status"] == "measured"
            },
            "largest error, in eager's": _extreme(max, errors),
            "most bytes kept by a chain, in eager's": _extreme(max, kept),
            "not measured": [f"{name}: {reason}" for name, reason in self.missing()],
        }

    def missing(self) -> Iterator[tuple[str, str]]:
        """Every row, and every side of a row, without its numbers, and why."""
        for section, rows in self.sections.items():
            for name, row in rows.items():
                if row["status"] != "measured":
                    yield f"{section}, {name}", f"{row['status']}: {row['reason']}"
                for side, of_side in row.get("sides", {}).items():
                    if of_side["status"] != "measured":
                        yield f"{section}, {name}, {side}", f"{of_side['status']}: {of_side['reason']}"
                    elif "note" in of_side:
                        yield f"{section}, {name}, {side}", of_side["note"]
                for note in row.get("notes", ()):
                    yield f"{section}, {name}", note

    def _measured(self, section: str) -> list[Row]:
        return [row for row in self.sections.get(section, {}).values() if row["status"] == "measured"]

    def _ratios(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        rows = {name: row for name, row in self.sections.get(section, {}).items() if row["status"] == "measured"}
        for key in COMPARED:
            narrow = [r for row in rows.values() if row["channels"] <= NARROW and (r := ratios(row, "step").get(key))]
            every = {name: r for name, row in rows.items() if (r := ratios(row, "step").get(key))}
            worst = min(every, key=every.__getitem__, default=None)
            found[f"{section}: step against {key}"] = {
                f"geometric mean up to {NARROW} channels": statistics.geometric_mean(narrow) if narrow else None,
                "rows in it": len(narrow),
                "worst": None if worst is None else [worst, every[worst]],
                "rows": len(every),
            }
        return found


def ratios(row: Row, part: str) -> dict[str, float]:
    """How many times as fast as torch's ganvas is, the faster of its two sides.

    Against ``eager``, the better ``compile``, the ``best`` of the three (only where torch.compile was measured), and
    against ``eager graph``.
    """
    times = {name: side[f"{part}_ms"] for name, side in row["sides"].items() if f"{part}_ms" in side}
    ours = min((times[name] for name in OURS if name in times), default=None)
    if ours is None:
        return {}
    found = {name: times[name] / ours for name in ("eager", "eager graph") if name in times}
    compiled = [times[mode] / ours for mode in COMPILE_MODES if mode in times]
    if compiled:
        found["compile"] = min(compiled)
        if "eager" in found:
            found["best"] = min(found["eager"], found["compile"])
    return found


def error_ratio(row: Row, side: str) -> float | None:
    """Of the output's error to eager's; None where one of them was not measured."""
    error, of_eager = (row["sides"].get(name, {}).get("errors", {}).get("output") for name in (side, "eager"))
    return None if error is None or not of_eager else error / of_eager


def share(row: Row, key: str) -> float | None:
    """ganvas' bytes in parts of eager's."""
    values = row.get(key, {})
    return values["ganvas"] / values["eager"] if values.get("eager") and "ganvas" in values else None


def _extreme(of: Callable[..., float], values: Iterable[float | None]) -> float | None:
    return of((value for value in values if value is not None), default=None)


def _finite(value: Any) -> Any:
    """None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
