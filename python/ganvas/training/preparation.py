"""What happens before a run's first step: folder checked, data loaded, networks built, folder made.

In this order, so that a mistake is reported before anything is created.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

import ganvas
from ganvas import data, models, ops
from ganvas.data import Augmentation, BatchLoader, ImageDataset
from ganvas.training.checkpoint import difference
from ganvas.training.config import RunConfig, config_from_json
from ganvas.training.presets import with_presets
from ganvas.training.progress import ProgressDisplay
from ganvas.training.random_state import choose_device
from ganvas.training.run_folder import RunFolder, RunFolderError
from ganvas.training.step_graph import CudaRecorder, cuda_recorder

EVALUATION_BATCH = 500
"""Images a forward without gradients takes at once."""

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Job(Generic[Config]):
    """Everything a recipe starts from."""

    config: Config
    """With presets and the images' size filled in."""
    folder: RunFolder
    train: ImageDataset
    test: ImageDataset
    device: torch.device
    float_range: tuple[float, float]
    resume: bool

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)

    @property
    def capturable(self) -> bool:
        """Whether optimisers are made for CUDA graphs: on a GPU in any case, so that the numbers are the same without
        them."""
        return self.device.type == "cuda"

    def recorder(self, *generators: torch.Generator) -> CudaRecorder | None:
        """What records steps that draw from ``generators``; None where they are run as they are."""
        return cuda_recorder(self.device, *generators) if self.config.cuda_graph else None

    def training_loader(self, augmentation: Augmentation | None = None) -> BatchLoader:
        """Shuffled whole batches: batch normalisation cannot train on a last batch of one image."""
        batch_size = min(self.config.batch_size, len(self.train))
        return BatchLoader(
            self.train,
            batch_size,
            seed=self.config.seed,
            drop_last=True,
            device=self.device,
            augmentation=augmentation,
            float_range=self.float_range,
        )

    def evaluation_loader(self, dataset: ImageDataset) -> BatchLoader:
        """All images in their order."""
        return BatchLoader(dataset, EVALUATION_BATCH, shuffle=False, device=self.device, float_range=self.float_range)

    def autocast(self) -> torch.autocast:
        # A CUDA graph must not find the cast weights of another step; without one the numbers are to be the same.
        cache = self.device.type != "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config.bf16), cache_enabled=cache)

    @contextmanager
    def run_folder(self, model: BuiltModel, progress: ProgressDisplay) -> Iterator[None]:
        """Make the run folder (or see that it is this run's) and keep other processes out of it."""
        description = self._description(model)
        if self.resume:
            stored = self.folder.read_description()
            _check_same_run(self.folder, stored, description)
            changed = difference(stored.get("environment", {}), description["environment"])
            if changed:
                progress.message(f"the last bits of the numbers may differ from an undisturbed run: {changed}")
        with self.folder.lock():
            self.folder.create(description)
            for path, reason in (*self.train.skipped, *self.test.skipped):
                progress.message(f"left out {path}: {reason}")
            yield

    def _description(self, model: BuiltModel) -> dict[str, Any]:
        return {
            "ganvas": ganvas.__version__,
            "job": self.config.job,
            "config": self.config.to_json(),
            "model": {"name": model.name, "registered": model.registered, "options": model.options},
            "data": {
                "name": self.config.data,
                "class_names": list(self.train.class_names),
                "channels": self.train.channels,
                "size": self.train.size,
                "train_images": len(self.train),
                "test_images": len(self.test),
            },
            "environment": {
                "torch": torch.__version__,
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "backend": os.environ.get("GANVAS_BACKEND", "auto"),
            },
        }


@dataclass(frozen=True)
class BuiltModel:
    """A network or a pair of them, and how it was made."""

    network: Any
    name: str
    registered: bool
    options: dict[str, Any]


def prepare(
    config: Config,
    *,
    train_data: Dataset | None,
    test_data: Dataset | None,
    float_range: tuple[float, float],
    resume: bool,
    min_classes: int = 1,
) -> Job[Config]:
    """Check the folder, load the data (unless given), fill in the config. Creates nothing.

    Raises:
        RunFolderError: see :meth:`RunFolder.check`.
        ValueError: GANVAS_BACKEND or GANVAS_CPU_ISA asks for what cannot run here.
        ValueError, TypeError, FileNotFoundError: what the data layer refuses; only one of the two sets given.
    """
    folder = RunFolder(config.out)
    folder.check(resume=resume)
    device = choose_device(config.device)
    check_kernels(device)
    if (train_data is None) != (test_data is None):
        raise ValueError("train_data and test_data must be given together, or neither of them")
    if train_data is None:
        config = with_presets(config)
        train = load_split(config, "train", min_classes)
        test = load_split(config, "test", min_classes)
    else:
        train, test = (data.as_image_dataset(dataset) for dataset in (train_data, test_data))
        config = with_presets(dataclasses.replace(config, size=train.size))
    _check_match(train, test)
    # The data's own size becomes the config's, so that config.json says what was used.
    config = dataclasses.replace(config, size=train.size)
    if config.bf16 is None:
        config = dataclasses.replace(config, bf16=_stored_bf16(folder) if resume else ops.prefers_bfloat16(device))
    return Job(config, folder, train, test, device, float_range, resume)


def _stored_bf16(folder: RunFolder) -> bool:
    """Of the run in the folder, which may have been begun on another device."""
    return bool(folder.read_description()["config"].get("bf16"))


def check_kernels(device: torch.device) -> None:
    """Run each fused operation once, on next to nothing, so that what the first step would raise is raised now.

    Raises:
        ValueError: GANVAS_BACKEND or GANVAS_CPU_ISA asks for what does not exist, or cannot run on ``device``.
    """
    image, logits = torch.zeros(2, 1, 4, 4, device=device), torch.zeros(2, device=device)
    try:
        ops.batch_norm_leaky_relu(image, None, None, None, None, training=True)
        ops.discriminator_loss(logits, logits)
        ops.generator_loss(logits)
    except ValueError as error:
        raise ValueError(str(error)) from error  # as ganvas' own: native code may have raised it


def load_split(config: RunConfig, split: str, min_classes: int = 1) -> ImageDataset:
    """The ``train`` or ``test`` images that a config names. Raises what the data layer raises."""
    return data.load(
        config.data,
        root=config.root,
        split=split,
        size=config.size,
        skip_unreadable=config.skip_unreadable,
        min_classes=min_classes,
    )


def _check_match(train: ImageDataset, test: ImageDataset) -> None:
    for attribute in ("size", "channels", "class_names"):
        ours, theirs = getattr(train, attribute), getattr(test, attribute)
        if ours != theirs:
            raise ValueError(f"train_data and test_data must have the same {attribute}; got {ours} and {theirs}")
    if len(train) < 2:
        raise ValueError(f"at least 2 training images are needed, got {len(train)}")


def build_model(name: str, kind: str, wanted: dict[str, Any]) -> BuiltModel:
    """The registry's network of this name; of the ``wanted`` options those that it has.

    Raises:
        ValueError: no such network, one of another kind, or an option's value that it does not accept.
    """
    if models.kind(name) != kind:
        raise ValueError(
            f"model {name!r} is a {models.kind(name)}; this job takes one of {', '.join(models.names(kind))}"
        )
    options = {option: value for option, value in wanted.items() if option in models.defaults(name)}
    return BuiltModel(models.create(name, **options), name, True, options)


def given_model(network: Any) -> BuiltModel:
    """A network that the caller made; the run folder can't rebuild it, only load weights into it."""
    first = network[0] if isinstance(network, tuple) else network
    return BuiltModel(network, type(first).__name__, False, {})


def _check_same_run(folder: RunFolder, stored: dict[str, Any], description: dict[str, Any]) -> None:
    stored_config = config_from_json(stored["job"], stored["config"])
    sections = (
        ("job", {"job": stored["job"]}, {"job": description["job"]}),
        (
            "settings",
            stored_config.identity(),
            config_from_json(description["job"], description["config"]).identity(),
        ),
        ("model", stored["model"], description["model"]),
        ("data", stored["data"], description["data"]),
    )
    for what, before, now in sections:
        differences = difference(before, now)
        if differences:
            raise RunFolderError(
                f"out: {folder.path} holds a run with other {what}: {differences}; resume it as it was"
            )
