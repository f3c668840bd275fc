"""A report as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from on_gpu.cases import Row
from on_gpu.report import COMPARED, NARROW, OURS, SIDES, Report, error_ratio, ratios, share
from on_gpu.sides import COMPILE_MODES

_NONE = "–"
_KERNELS_SHOWN = 6
_RATIOS = tuple(f"vs {key}" for key in COMPARED)
_MEMORY = ("eager MiB", "ganvas MiB", "ratio")
_CLAIMS = {
    "least share of the bandwidth": "≥ 0.85 on arrays of 256 MiB and more",
    "largest error, in eager's": "≤ 2",
    "most bytes kept by a chain, in eager's": "≤ 0.5",
}


def lines(report: Report) -> Iterator[str]:
    """Every section that has rows, then what the claims are about, then what was not measured."""
    for section, rows in report.sections.items():
        measured = {name: row for name, row in rows.items() if row["status"] == "measured"}
        if measured:
            yield f"\n## {section}\n"
            yield from _SECTIONS[section](report, measured)
    yield "\n## summary\n"
    yield from _summary(report.summary())
    missing = list(report.missing())
    if missing:
        yield "\n## not measured, and remarks\n"
        yield from (f"- {name}: {reason}" for name, reason in missing)


def _machine(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    yield from _header(["what", "value"])
    for name, value in rows.get("versions", {}).items():
        if name != "status":
            yield _line([name, str(value)])
    if report.bandwidth is not None:
        yield _line(["copy, read and written", f"{report.bandwidth / 1e9:.0f} GB/s"])
    if report.peak is not None:
        yield _line(["product of bfloat16 matrices", f"{report.peak / 1e12:.0f} TFLOP/s"])


def _kernels(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    yield "`of bandwidth`: the bytes that have to move, through the time, in parts of the copy's.\n"
    compared = ["eager ms", "ganvas ms", "ganvas vs eager", "eager of bandwidth", "ganvas of bandwidth"]
    yield from _header(["kernel", "part", "MiB", "backend", *compared])
    for name, row in rows.items():
        for part in row["floor"]:
            times = [row["sides"].get(side, {}).get(f"{part}_ms") for side in ("eager", "ganvas")]
            shares = [report.of_bandwidth(row, side, part) for side in ("eager", "ganvas")]
            ratio = times[0] / times[1] if None not in times else None
            cells = [*(_number(t, 3) for t in times), _number(ratio, 2), *(_percent(value) for value in shares)]
            yield _line([name, part, f"{row['bytes'] / 2**20:.0f}", row["backend"], *cells])


def _networks(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    for part in ("forward", "step"):
        yield f"\n### {part}, ms\n"
        yield from _header(["input → channels", *SIDES, "memory floor", "arithmetic floor", *_RATIOS])
        for name, row in rows.items():
            times = [_milliseconds(row, side, part) for side in SIDES]
            bounds = [_number(floor, 3) for floor in report.floor_ms(row, part)]
            yield _line([name, *times, *bounds, *_ratios(row, part)])
    yield "\n### error of the output to float64, and of ganvas' worst gradient, in eager's; a step's MiB; first calls\n"
    memory = [f"{what}: {column}" for what in ("kept", "peak") for column in _MEMORY]
    errors = ["eager's error", *OURS, "gradient"]
    yield from _header(["input → channels", *errors, *memory, "ready: ganvas s", "compile s"])
    for name, row in rows.items():
        errors = [f"{row['sides']['eager']['errors']['output']:.1e}"]
        errors += [_number(ratio, 2) for ratio in (*(error_ratio(row, side) for side in OURS), _worst_gradient(row))]
        ready = [row["sides"].get(side, {}).get("ready_seconds") for side in ("ganvas", "max-autotune")]
        memory = [*_memory(row, "kept_bytes"), *_memory(row, "peak_bytes")]
        yield _line([name, *errors, *memory, *(_number(seconds, 1) for seconds in ready)])


def _models(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    yield "Images per second, and the peak of memory over what lives between steps; compile's with its CUDA graphs'.\n"
    yield from _header(["model", *SIDES, *_RATIOS, *_MEMORY, "compile MiB"])
    for name, row in rows.items():
        rates = [row["sides"].get(side, {}).get("images_per_second") for side in SIDES]
        cells = [*(_number(rate, 0) for rate in rates), *_ratios(row, "step"), *_memory(row, "peak_bytes")]
        of_compile = next((row["peak_bytes"][mode] for mode in COMPILE_MODES if mode in row["peak_bytes"]), None)
        yield _line([name, *cells, _mebibytes(of_compile)])


def _choices(report: Report, rows: dict[str, Row]) -> Iterator[str]:
    for operation, refusals in rows.get("backends", {}).get("operations", {}).items():
        chosen = next((name for name, refusal in refusals.items() if refusal is None), "none")
        why = "; ".join(f"not {name}: {refusal}" for name, refusal in refusals.items() if refusal is not None)
        yield f"- {operation}: {chosen}" + (f" ({why})" if why else "")
    entries = rows.get("tuning", {}).get("entries", [])
    if entries:
        yield ""
        columns = [*entries[0]["case"], *(name for name in entries[0] if name != "case")]
        yield from _header(columns)
        for entry in entries:
            yield _line([str(value) for value in [*entry["case"].values(), *list(entry.values())[1:]]])
    of_shapes = {name: row["kernels"] for name, row in rows.items() if "kernels" in row}
    if of_shapes:
        yield "\nKernels of ganvas' step, ms:\n"
    for name, kernels in of_shapes.items():
        shown = [f"{kernel[:70]} {milliseconds:.3f}" for kernel, milliseconds in kernels.items()][:_KERNELS_SHOWN]
        rest = len(kernels) - len(shown)
        yield f"- {name}: {'; '.join(shown)}" + (f"; {rest} more" if rest else "")


def _summary(summary: dict[str, Any]) -> Iterator[str]:
    yield from _header(["claim", "wanted", "measured"])
    for name, wanted in _CLAIMS.items():
        yield _line([name, wanted, _number(summary[name], 2)])
    for section, wanted in (("layers", "≥ 1.5, worst ≥ 1.0"), ("chains", _NONE)):
        for key in COMPARED:
            found = summary[f"{section}: step against {key}"]
            mean, count = found[f"geometric mean up to {NARROW} channels"], found["rows in it"]
            worst = _NONE if found["worst"] is None else f"{found['worst'][1]:.2f} ({found['worst'][0]})"
            text = f"geometric mean up to {NARROW} channels {_number(mean, 2)} ({count} rows); "
            text += f"worst of {found['rows']}: {worst}"
            yield _line([f"{section}: step against {key}", wanted if key == "best" else _NONE, text])
    for name, found in summary["models"].items():
        text = ", ".join(f"{found[key]:.2f} × {key}" for key in COMPARED if key in found)
        memory = found["peak_bytes"]
        yield _line([name, "≥ 2 × eager, ≥ 1.3 × compile, memory ≤ 0.5", f"{text}, memory {_number(memory, 2)}"])


_SECTIONS: dict[str, Callable[[Report, dict[str, Row]], Iterator[str]]] = {
    "machine": _machine,
    "kernels": _kernels,
    "layers": _networks,
    "chains": _networks,
    "models": _models,
    "choices": _choices,
}


def _ratios(row: Row, part: str) -> list[str]:
    found = ratios(row, part)
    return [_number(found.get(key), 2) for key in COMPARED]


def _milliseconds(row: Row, side: str, part: str) -> str:
    of_side = row["sides"].get(side)
    if of_side is None:
        return _NONE
    if of_side["status"] != "measured":
        return of_side["status"]
    return _number(of_side.get(f"{part}_ms"), 3)


def _worst_gradient(row: Row) -> float | None:
    ours, torchs = (row["sides"].get(side, {}).get("errors", {}) for side in ("ganvas", "eager"))
    found = [ours[name] / torchs[name] for name in ours if name != "output" and torchs.get(name)]
    return max(found, default=None)


def _memory(row: Row, key: str) -> list[str]:
    values = row.get(key, {})
    return [*(_mebibytes(values.get(side)) for side in ("eager", "ganvas")), _number(share(row, key), 2)]


def _mebibytes(size: int | None) -> str:
    return _NONE if size is None else f"{size / 2**20:.0f}"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0%}"


def _header(names: Sequence[str]) -> Iterator[str]:
    yield _line(names)
    yield "|" + "---|" * len(names)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
