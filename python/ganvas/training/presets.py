"""What ``None`` in a config stands for: settings that suit a data set, found by trying on two CPU cores.

Data sets that are passed as objects, and folders, get the row ``folder``. Sizes are those that the default models can
do and that lose nothing: dcgan makes 16, 32, 64 or 128 pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from ganvas.training.config import RunConfig

Config = TypeVar("Config", bound=RunConfig)

# job -> data set -> field -> value; size None: the data's own.
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "classifier": {
        "digits": {"epochs": 30, "size": None, "shift": 1},
        "mnist": {"epochs": 8, "size": None, "shift": 2},
        "cifar10": {"epochs": 20, "size": None, "shift": 4},
        "folder": {"epochs": 20, "size": None, "shift": 0},
    },
    "gan": {
        "digits": {"epochs": 100, "size": 16, "width": 32, "evaluate_every": 5},
        "mnist": {"epochs": 20, "size": 32, "width": 32, "evaluate_every": 1},
        "cifar10": {"epochs": 60, "size": 32, "width": 64, "evaluate_every": 1},
        "folder": {"epochs": 60, "size": 64, "width": 64, "evaluate_every": 1},
    },
    "autoencoder": {
        "digits": {"epochs": 40, "size": None},
        "mnist": {"epochs": 8, "size": None},
        "cifar10": {"epochs": 15, "size": None},
        "folder": {"epochs": 20, "size": 64},
    },
}
# Models whose architecture knows one size only.
_MODEL_SIZES = {"mlp_conv_gan": 28}


def with_presets(config: Config) -> Config:
    """``config`` with every field that is None and has a preset filled in (``size`` may stay None: the data's own)."""
    presets = _PRESETS[config.job]
    values = dict(presets.get(config.data, presets["folder"]))
    values["size"] = _MODEL_SIZES.get(getattr(config, "model", ""), values["size"])
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)
