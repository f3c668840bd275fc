"""Seeds, threads and random states: what must be equal for two runs to be equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class RandomState:
    """The states of torch's global generators (which dropout draws from) and of ``generators``, as a checkpoint part.

    Data order and augmentation need none: they are functions of (seed, epoch, batch). Python's and NumPy's generators
    are not used anywhere in training.
    """

    def __init__(self, device: torch.device, **generators: torch.Generator) -> None:
        self._device = device
        self._generators = generators

    def state_dict(self) -> dict[str, Any]:
        state = {name: generator.get_state() for name, generator in self._generators.items()}
        state["torch"] = torch.get_rng_state()
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, generator in self._generators.items():
            generator.set_state(state[name])
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)


@contextmanager
def reproducible(seed: int, threads: int | None, device: torch.device, *, deterministic: bool = True) -> Iterator[None]:
    """Seed torch, set its CPU threads and how cuDNN chooses its convolutions; put everything back afterwards.

    ``deterministic``: the same bits each time. Without it cuDNN measures its algorithms once for every shape, of which
    a training has few, and takes the fastest.
    """
    previous_threads = torch.get_num_threads()
    previous_cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            # cuDNN's default weight gradient adds with atomics, and a measured choice differs from run to run.
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
            yield
        finally:
            torch.set_num_threads(previous_threads)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = previous_cudnn


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        ValueError: a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device
