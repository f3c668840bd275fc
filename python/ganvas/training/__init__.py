"""Training: one loop per job, and around it run folders, checkpoints, metrics, reports.

    >>> from ganvas.training import GANConfig, train
    >>> train(GANConfig(data="digits", out="runs/digits"))

The loop of a job (:mod:`classifier`, :mod:`gan`, :mod:`autoencoder`) reads from top to bottom; :mod:`run` is what
happens between its lines, :mod:`faults` when a run counts as gone wrong, :mod:`inference` what can be done with a run
afterwards. :mod:`recipes` names settings of a classifier's config.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganvas.training.config import AutoencoderConfig, ClassifierConfig, GANConfig, RunConfig
from ganvas.training.recipes import recipe_config

if TYPE_CHECKING:
    from ganvas.training.autoencoder import train_autoencoder
    from ganvas.training.checkpoint import CheckpointError, CheckpointSaveError
    from ganvas.training.classifier import train_classifier
    from ganvas.training.faults import TrainingFailed
    from ganvas.training.gan import train_gan
    from ganvas.training.inference import Prediction, Run, evaluate, load_run, predict, sample
    from ganvas.training.interrupt import Interrupted
    from ganvas.training.progress import ProgressDisplay, SilentProgress
    from ganvas.training.run_folder import RunFolderError

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "CheckpointSaveError",
    "ClassifierConfig",
    "GANConfig",
    "Interrupted",
    "Prediction",
    "ProgressDisplay",
    "Run",
    "RunConfig",
    "RunFolderError",
    "SilentProgress",
    "TrainingFailed",
    "evaluate",
    "load_run",
    "predict",
    "recipe_config",
    "sample",
    "train",
    "train_autoencoder",
    "train_classifier",
    "train_gan",
]

_RECIPES = {
    ClassifierConfig: "train_classifier",
    GANConfig: "train_gan",
    AutoencoderConfig: "train_autoencoder",
}
# Imported when first asked for: the configs alone, which a help page is made of, need no torch.
_MODULES = {
    "train_autoencoder": "autoencoder",
    "CheckpointError": "checkpoint",
    "CheckpointSaveError": "checkpoint",
    "train_classifier": "classifier",
    "TrainingFailed": "faults",
    "train_gan": "gan",
    "Prediction": "inference",
    "Run": "inference",
    "evaluate": "inference",
    "load_run": "inference",
    "predict": "inference",
    "sample": "inference",
    "Interrupted": "interrupt",
    "ProgressDisplay": "progress",
    "SilentProgress": "progress",
    "RunFolderError": "run_folder",
}


def train(config: RunConfig, *, resume: bool = False, progress: ProgressDisplay | None = None) -> Path:
    """Run the recipe that belongs to the type of ``config``; arguments, result and errors as the recipe's.

    Raises:
        TypeError: no config of a job.
    """
    if type(config) not in _RECIPES:
        raise TypeError(f"config must be one of {', '.join(c.__name__ for c in _RECIPES)}; got {type(config).__name__}")
    return __getattr__(_RECIPES[type(config)])(config, resume=resume, progress=progress)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"ganvas.training.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ganvas.training' has no attribute {name!r}")
