"""The folder of one run: what is in it, when it may be used, and how its files are written.

config.json            the job's config with every default filled in, the model and data it was made for
metrics.jsonl          one JSON object a line
*.safetensors          weights
checkpoint/            to resume from
samples/*.png          image grids
report.html            curves and grids in one file
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ganvas.training import durable

_OWN_NAMES = ("config.json", "metrics.jsonl", "checkpoint", "samples", "report.html")
_LOCK = ".lock"


class RunFolderError(ValueError):
    """The output folder cannot be used; one line that says what to do."""


class RunFolder:
    """Paths and files of a run. Making this object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoint"
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"

    def check(self, *, resume: bool) -> None:
        """Raise unless a run can be started (``resume=False``) or continued here. Creates nothing.

        Raises:
            RunFolderError: a run is here already; there is none to resume; no folder; no permission.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"out: {self.path} is a file; name a folder for the run")
        if resume:
            if not self.config.is_file():
                raise RunFolderError(f"out: {self.path} holds no run to resume; leave out --resume to start one there")
        elif self.config.exists():
            raise RunFolderError(
                f"out: {self.path} already holds a run; continue it with --resume, or name another folder"
            )
        else:
            self._refuse_foreign_files()
        self._check_writable()

    def _refuse_foreign_files(self) -> None:
        for name in _OWN_NAMES:
            if (self.path / name).exists():
                raise RunFolderError(
                    f"out: {self.path} holds {name}, which a run would overwrite; name another folder or move it away"
                )

    def _check_writable(self) -> None:
        folder = self.path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise RunFolderError(f"out: {self.path} cannot be made, {folder} is no folder; name another one")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RunFolderError(f"out: no permission to write in {folder}; name another folder")

    def create(self, description: dict[str, Any]) -> None:
        """Write ``config.json``, which is what makes the (locked) folder a run.

        It comes first: whatever a run writes stands beside a config.json, so a killed one can always be resumed.
        """
        durable.replace_file(self.config, json.dumps(description, indent=2, allow_nan=False).encode() + b"\n")
        self.samples.mkdir(exist_ok=True)

    def read_description(self) -> dict[str, Any]:
        """What :meth:`create` wrote.

        Raises:
            RunFolderError: no run here, or its config.json is damaged.
        """
        try:
            description = json.loads(self.config.read_bytes())
            for key in ("ganvas", "job", "config", "model", "data"):
                description[key]
            return description
        except OSError as error:
            raise RunFolderError(
                f"{self.path} holds no run: {self.config} cannot be read ({error.strerror})"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{self.config} is damaged: it does not describe a run ({error})") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from training into the same folder. The kernel lets go when the process dies, however.

        Raises:
            RunFolderError: another process holds the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunFolderError(
                    f"out: another process is training into {self.path}; wait for it to end"
                ) from error
            yield

    def save_weights(self, name: str, module: nn.Module, **about: object) -> None:
        """Write ``name.safetensors`` in one step, with ``about`` as its metadata (step, metric, ...)."""
        tensors = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in module.state_dict().items()
        }
        metadata = {key: str(value) for key, value in about.items()}
        durable.replace_file(self.path / f"{name}.safetensors", safetensors.torch.save(tensors, metadata))

    def load_weights(self, name: str, module: nn.Module) -> None:
        """Load ``name.safetensors`` into ``module``.

        Raises:
            RunFolderError: no such file, a damaged one, or the weights of another model; the first difference is named.
        """
        path = self.path / f"{name}.safetensors"
        try:
            tensors = safetensors.torch.load(path.read_bytes())
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
        except safetensors.SafetensorError as error:
            raise RunFolderError(f"{path} is damaged ({error})") from error
        problem = weights_mismatch(module, tensors)
        if problem:
            raise RunFolderError(f"{path} does not fit the model: {problem}")
        module.load_state_dict(tensors)

    def has_weights(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()


def weights_mismatch(module: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    """How ``tensors`` differ from the module's own state in keys and shapes, the first difference; '' if they fit."""
    own = module.state_dict()
    for key in own.keys() | tensors.keys():
        if key not in tensors:
            return f"the model has {key}, the file has not"
        if key not in own:
            return f"the file has {key}, the model has not"
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            return f"{key} is {tuple(tensors[key].shape)} in the file, {tuple(value.shape)} in the model"
    return ""
