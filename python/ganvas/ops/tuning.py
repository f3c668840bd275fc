"""Choice by measurement: a convolution, and a linear layer of 2^22 multiplications or more (its rows rounded down to a
power of two), runs in native kernels, of one family or another, or in torch's, whichever were the fastest ones here.

The first time that a chain meets a shape, all of them do the layer's share of a step on random values, in turns; the
fastest one is taken from then on (a native one within :data:`MARGIN`). Forward with batch statistics, forward without
them, and the gradients of input and weight are choices of their own. What was measured is remembered in a file for each
processor, instruction set, torch, ganvas and native module, so that the next process, and one that resumes a run bit
for bit, chooses alike: an entry that another process has written first counts. The file lies in ``$GANVAS_CACHE_DIR``,
else in ``$XDG_CACHE_HOME/ganvas``, else in ``~/.cache/ganvas``. One that cannot be read or written never stops a run:
the choices then last as long as the process, and the log says so once.

Similar shapes share a choice. A side above 64 counts as 64 (plus its remainder by 4), with as many more images as make
up for it; the batch as the next lower power of two, within 2^28 multiplications a thread, or 1024 pixels where that is
more, and 24 MiB a tensor. So the measuring takes some tens of milliseconds, and the last batch of an epoch seldom costs
anything.
Below 2^18 multiplications nothing is measured: the direct kernels run where both sides have 16 channels or more.

``GANVAS_AUTOTUNE=0`` measures nothing: with so many channels native kernels run at any size, Winograd's wherever they
can. It is read when a shape is first met.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import platform
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ganvas import __version__

try:
    from ganvas import _native as native
except ImportError:  # then nothing native is measured
    native = None  # type: ignore[assignment]

_log = logging.getLogger("ganvas")

MARGIN = 1.03
"""The native way is taken up to this multiple of torch's time: a chain of native kernels keeps less memory."""

_LEAST_TURNS = 3  # enough where a native way, the usual one, is clearly faster, or when the most time is over
_CLEAR = 2.0  # times
_MOST_SECONDS = 0.2
_TURNS = 5  # where neither is so
_LEAST_SECONDS = 0.003  # as many more turns as fit into it: the native ways differ by less
_MOST_DECISIONS = 4096
# Once a block of this size was freed, glibc keeps smaller ones, and twice as much at the heap's end. Otherwise fetching
# memory from the system, which may take longer than a kernel, would fall to one way or the other by chance.
_KEPT_BYTES = 31 * 2**20
_LOCK_SECONDS = 1.0


class Case(NamedTuple):
    """What a choice holds for."""

    direction: str  # of a Trial (ganvas.ops.backends.trial) or a raw gradient; of a linear layer forward or backward
    convolution: str  # or linear, of 1×1 maps
    dtype: str
    device: str  # cpu, or what the timings of a GPU hold for
    threads: int  # 0 on a GPU
    batch: int
    in_channels: int
    out_channels: int
    height: int  # of the input
    width: int


class Entry(NamedTuple):
    """What was measured, in milliseconds."""

    case: Case
    native_ms: float | None  # None: no native way gave the right result
    torch_ms: float
    configuration: str = ""  # of the native kernels, the fastest one; of a convolution on the CPU its family

    @property
    def native(self) -> bool:
        """Whether the native kernels run."""
        return self.native_ms is not None and self.native_ms <= MARGIN * self.torch_ms


Candidates = Callable[[], tuple[Mapping[str, Callable[[], object]], Callable[[], object]]]
"""Prepares the native ways, by name, and torch's, to be called as often as it takes."""

decisions: dict[Any, Any] = {}
"""What callers decided, by keys of their own: looking here is all that a call costs. Filled by :func:`decided`."""

generation = 0
"""Grows when decisions that were kept elsewhere no longer hold."""

_remembered: dict[Case, Entry] = {}
_said: set[str] = set()
_lock = threading.Lock()
_forked = False


def applies(threads: int) -> bool:
    """Whether choices are measured: ``GANVAS_AUTOTUNE`` is 1, empty or not set.

    Also False for several threads in a forked child. They are not there, and torch's convolution would wait for them.

    Raises:
        ValueError: ``GANVAS_AUTOTUNE`` is anything but 0 and 1.
    """
    value = os.environ.get("GANVAS_AUTOTUNE") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"GANVAS_AUTOTUNE must be 0 or 1; got {value!r}")
    return value == "1" and not (_forked and threads > 1)


def measured(case: Case, candidates: Candidates) -> Entry:
    """The entry of ``case``: remembered, found in the file, or measured now and written there.

    The state of torch's random numbers, gradient mode and autocast stay as they are.
    """

    def measure() -> Entry:
        natives, torchs = candidates()
        times = _time_in_turns({**natives, "": torchs})
        best = min(natives, key=times.__getitem__)
        return Entry(case, round(1000 * times[best], 6), round(1000 * times[""], 6), best)

    return remembered(case, measure)


def remembered(case: Case, measure: Callable[[], Entry]) -> Entry:
    """The same, by a way of measuring that is called without gradients, without autocast and out of inference mode."""
    with _lock:
        entry = _remembered.get(case) or _read_leniently().get(case)
        if entry is None:
            device = "cpu" if case.device == "cpu" else "cuda"
            # What is measured may be a backward pass, which tensors of inference mode do not have.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                entry = _write(measure())
        _remembered[case] = entry
        return entry


def power_of_two(count: int) -> int:
    """The next lower one, at least 1: counts between two of them share a choice."""
    return 1 << max(count.bit_length() - 1, 0)


def decided(key: Any, decision: Any) -> Any:
    """``decision``, kept in :data:`decisions` until there are too many or :func:`clear` is called."""
    if len(decisions) >= _MOST_DECISIONS:
        decisions.clear()
    decisions[key] = decision
    return decision


def entries() -> list[Entry]:
    """Everything remembered for this processor and these versions, in the file and in this process, in order."""
    with _lock:
        known = {**_remembered, **_read_leniently()}
        return [known[case] for case in sorted(known)]


def clear() -> None:
    """Forget every choice for this processor and these versions, in this process and in the file.

    Raises:
        OSError: the file is there and cannot be removed.
    """
    with _lock:
        _remembered.clear()
        _forget_decisions()
        _said.clear()
        path().unlink(missing_ok=True)


def _forget_decisions() -> None:
    global generation
    decisions.clear()
    generation += 1


def path() -> Path:
    """The file of this processor and these versions, which may not be there yet.

    Raises:
        OSError: there is no home folder to put it in.
    """
    words = "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", word).strip("-") for word in _key().values())
    return _folder() / f"tuning_{words}.json"


def _folder() -> Path:
    own, shared = os.environ.get("GANVAS_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    if shared and os.path.isabs(shared):  # the specification says to ignore others
        return Path(shared) / "ganvas"
    try:
        return Path.home() / ".cache" / "ganvas"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; set GANVAS_CACHE_DIR") from None


_key_of_process: dict[str, str] = {}


def _key() -> dict[str, str]:
    """What the timings are true for."""
    if not _key_of_process:
        _key_of_process.update(
            cpu=_processor(),
            isa=native.selected_isa() if native else "none",
            ganvas=__version__,
            torch=torch.__version__,
            build=f"{zlib.crc32(Path(native.__file__).read_bytes()):08x}" if native else "none",
        )
    return _key_of_process


def _processor() -> str:
    """Its name, and the numbers that tell generations of one name apart."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        first = ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    names = ("model name", "cpu family", "model", "CPU implementer", "CPU part", "CPU variant")
    return " ".join(fields[name] for name in names if fields.get(name)) or platform.processor() or platform.machine()


def _time_in_turns(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least seconds of a call of each, the machine's disturbances left out; torch's way has no name.

    They take turns call by call: each finds the caches as another operation has left them, as in a network.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8, device="cpu")
    for way in ways.values():
        way()
    begin, best, turns = time.perf_counter(), dict.fromkeys(ways, math.inf), 0
    while True:
        turns += 1
        for name, way in ways.items():
            best[name] = min(best[name], _seconds(way))
        spent = time.perf_counter() - begin
        clear = best[""] >= _CLEAR * min(best.values()) or spent > _MOST_SECONDS
        if turns >= (_LEAST_TURNS if clear else _TURNS) and spent > _LEAST_SECONDS:
            return best


def _seconds(call: Callable[[], object]) -> float:
    """Of this thread, which works or spins until the others are done; what other processes take does not count."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def _read_leniently() -> dict[Case, Entry]:
    """What the file holds; nothing where it cannot be read."""
    try:
        return _read(path())
    except (OSError, ValueError) as error:
        _say_once(f"measured choices of kernels cannot be read ({error})")
        return {}


def _read(file: Path) -> dict[Case, Entry]:
    try:
        found = [_entry(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))["entries"]]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return {entry.case: entry for entry in found}


def _entry(native_ms: Any, torch_ms: Any, configuration: Any, **fields: Any) -> Entry:
    case, times = Case(**fields), (torch_ms,) if native_ms is None else (native_ms, torch_ms)
    expected = (str,) * 4 + (int,) * 6
    if not all(isinstance(value, kind) for value, kind in zip((*case, configuration), (*expected, str))):
        raise ValueError(f"{case} has a value of another type")
    if not all(isinstance(value, (int, float)) and 0 < value < math.inf for value in times):
        raise ValueError(f"{times} are not times")
    return Entry(case, native_ms, torch_ms, configuration)


def _write(entry: Entry) -> Entry:
    """Adds ``entry`` to the file; returns what counts: another process may have been first."""
    try:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(file.with_suffix(".lock")):
            try:
                known = _read(file)
            except ValueError:  # damaged: begun anew
                known = {}
            if entry.case not in known:
                _replace(file, {**known, entry.case: entry})
            return known.get(entry.case, entry)
    except OSError as error:
        _say_once(f"measured choices of kernels are not kept for the next process ({error})")
        return entry


def _replace(file: Path, known: dict[Case, Entry]) -> None:
    """All in one step: a reader sees the old file or the new one."""
    rows = [
        json.dumps({**entry.case._asdict(), **{k: v for k, v in entry._asdict().items() if k != "case"}})
        for entry in map(known.get, sorted(known))
        if entry is not None
    ]
    head = json.dumps(_key())[:-1]
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(head + ', "entries": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _sole_writer(file: Path) -> Iterator[None]:
    """Among processes; OSError where another one does not come to an end."""
    with open(file, "w") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {file}") from None
                time.sleep(0.005)
        yield


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def _after_fork() -> None:
    """In the child: another thread of the parent may have held the lock, and what applied there may not here."""
    global _lock, _forked
    _lock, _forked = threading.Lock(), True
    _forget_decisions()


os.register_at_fork(after_in_child=_after_fork)
