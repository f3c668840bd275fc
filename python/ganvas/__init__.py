"""ganvas: trains image classifiers and GANs fast, with the numbers plain PyTorch gives.

``ganvas.ops`` holds the fused operations, ``ganvas.nn`` the modules over them and :func:`convert`, ``ganvas.models``
the networks; ``ganvas.data``, ``ganvas.metrics`` and ``ganvas.training`` the rest of a run. The ``ganvas`` command
drives them. Each is imported when it is first asked for: ``import ganvas`` and ``ganvas --help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ganvas import data, losses, metrics, models, nn, ops, training
    from ganvas.nn.convert import convert, revert

__version__ = "0.1.0"

_MODULES = ("data", "losses", "metrics", "models", "nn", "ops", "training")
_FUNCTIONS = {"convert": "ganvas.nn", "revert": "ganvas.nn"}

__all__ = ["__version__", "convert", "data", "losses", "metrics", "models", "nn", "ops", "revert", "training"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ganvas.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'ganvas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
