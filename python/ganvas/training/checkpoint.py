"""Checkpoints that survive a kill at any moment and never unpickle.

A checkpoint is a folder ``save-000017`` of three files:

    tensors.safetensors   every tensor of the training state
    state.json            the rest of the state (:mod:`ganvas.training.state`)
    manifest.json         SHA-256 and size of the two, step, epoch, ganvas version, what run it belongs to

It is written under a temporary name, the manifest last, each file fsynced, then renamed, then the parent folder is
fsynced. So a folder named ``save-…`` is complete, and older ones are removed only after that. Kept are the newest two
(should the newest be damaged) and the newest *good* one, to which a run returns after a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from ganvas.training import durable, state

_PREFIX = "save-"
_TEMPORARY_PREFIX = ".writing-"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, or of another run."""


class CheckpointSaveError(OSError):
    """A checkpoint could not be written (full disk, no permission); those before it are intact."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state and where in the run it was taken."""

    state: Any
    """Nested dicts of tensors and plain values."""
    step: int
    epoch: int
    good: bool
    """Taken when nothing was wrong with the run: it can be returned to after a fault."""
    identity: dict[str, Any]
    """What run this belongs to, as plain JSON values; compared on loading."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they are; made when the first is saved.
        version: of ganvas, written into the manifests.
    """

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        self._version = version

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; when this returns it is on the disk, and only then older ones are removed.

        Raises:
            CheckpointSaveError: it could not be written; nothing of it is left, the older ones are untouched.
        """
        tensors, tree = state.flatten(checkpoint.state)
        files = {
            _TENSORS: safetensors.torch.save(tensors),
            _STATE: json.dumps(tree, allow_nan=False).encode(),
        }
        manifest = {
            "format": _FORMAT,
            "ganvas": self._version,
            "step": checkpoint.step,
            "epoch": checkpoint.epoch,
            "good": checkpoint.good,
            "identity": checkpoint.identity,
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
            },
        }
        files[_MANIFEST] = json.dumps(manifest, indent=1, allow_nan=False).encode()
        final = self._next_path()
        temporary = self.folder / f"{_TEMPORARY_PREFIX}{final.name}"
        try:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                durable.write_bytes(temporary / name, data)
            durable.sync_folder(temporary)
            os.rename(temporary, final)
            durable.sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointSaveError(
                error.errno,
                f"the checkpoint of step {checkpoint.step} could not be written ({error.strerror}); "
                f"{self._what_is_left()}. Make room, then continue with --resume",
                str(self.folder),
            ) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._remove_superseded()
        return final

    def load(self, identity: dict[str, Any], *, good: bool = False) -> tuple[Checkpoint, list[str]] | None:
        """The newest whole checkpoint (with ``good``: the newest good one), and a line on each damaged newer one.

        ``None`` if none was ever saved.

        Raises:
            CheckpointError: every checkpoint is damaged, or the newest whole one is of another run than ``identity``.
        """
        complaints: list[str] = []
        for path in reversed(self.paths()):
            try:
                checkpoint = _read(path)
            except CheckpointError as error:
                complaints.append(str(error))
                continue
            _check_identity(path, checkpoint.identity, identity)
            if checkpoint.good or not good:
                return checkpoint, complaints
        if complaints:
            raise CheckpointError(f"no usable checkpoint in {self.folder}: " + "; ".join(complaints))
        return None

    def paths(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return sorted(self.folder.glob(f"{_PREFIX}[0-9]*"), key=lambda path: (len(path.name), path.name))

    def remove_leftovers(self) -> None:
        """Remove what a killed process had not finished writing."""
        for path in self.folder.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _next_path(self) -> Path:
        paths = self.paths()
        number = int(paths[-1].name.removeprefix(_PREFIX)) + 1 if paths else 1
        return self.folder / f"{_PREFIX}{number:06d}"

    def _remove_superseded(self) -> None:
        paths = self.paths()
        keep = set(paths[-2:])
        newest_good = next((path for path in reversed(paths) if _is_good(path)), None)
        for path in paths:
            if path not in keep and path != newest_good:
                shutil.rmtree(path, ignore_errors=True)

    def _what_is_left(self) -> str:
        for path in reversed(self.paths()):
            try:
                return f"the one of step {_read_manifest(path)['step']} is intact"
            except CheckpointError:
                continue
        return "there is no earlier one"


def _is_good(path: Path) -> bool:
    try:
        return bool(_read_manifest(path)["good"])
    except CheckpointError:
        return False


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} was written by ganvas {manifest['ganvas']} in format {manifest['format']}; "
                f"this version reads format {_FORMAT}"
            )
        for key in ("ganvas", "step", "epoch", "good", "identity", "files"):
            manifest[key]
        return manifest
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {_MANIFEST} cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {_MANIFEST} is no manifest") from error


def _read(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    data = {name: _read_file(path, name, manifest["files"]) for name in (_TENSORS, _STATE)}
    try:
        tree = state.unflatten(safetensors.torch.load(data[_TENSORS]), json.loads(data[_STATE]))
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: its files do not belong together ({error})") from error
    return Checkpoint(tree, manifest["step"], manifest["epoch"], manifest["good"], manifest["identity"])


def _read_file(path: Path, name: str, files: dict[str, Any]) -> bytes:
    try:
        data = (path / name).read_bytes()
        expected = files[name]
        if len(data) != expected["bytes"]:
            raise CheckpointError(f"{path} is damaged: {name} has {len(data)} bytes instead of {expected['bytes']}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: the SHA-256 of {name} is not the manifest's")
        return data
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {name} cannot be read ({error.strerror})") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its manifest does not describe {name}") from error


def _check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differences = difference(found, expected)
    if differences:
        raise CheckpointError(f"{path} is of another run: {differences}")


def difference(found: dict[str, Any], expected: dict[str, Any], limit: int = 4) -> str:
    """'key: found …, expected …' for the keys whose values differ, at most ``limit`` of them; '' if none does."""
    missing = object()
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        ours, theirs = found.get(key, missing), expected.get(key, missing)
        if ours != theirs:
            shown = ["nothing" if value is missing else repr(value) for value in (ours, theirs)]
            lines.append(f"{key} was {shown[0]}, now {shown[1]}")
    more = f" and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more
