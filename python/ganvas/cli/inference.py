"""``ganvas sample``, ``predict`` and ``evaluate``: what can be done with a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ganvas.cli.errors import InputError, suggestion
from ganvas.cli.output import say, say_pairs

_RunPath = Annotated[Positional[Path], arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a trained GAN into one PNG."""

    run: _RunPath
    """The run folder, as given to `ganvas train gan --out`."""
    out: Path
    """The PNG file to write."""
    count: int = 64
    """How many images."""
    labels: Annotated[tuple[str, ...], arg(metavar="LABEL ...")] = ()
    """Classes to draw, by name, in turn; all of them if not given. Only for a GAN that was told the classes."""
    seed: int = 0
    """The same seed draws the same images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: a GPU where there is one."""

    def execute(self) -> None:
        _require_run(self.run)
        _require_png(self.out)
        if self.count < 1:
            raise InputError(f"--count must be at least 1, got {self.count}")
        from ganvas import training
        from ganvas.training.grids import save_grid

        run = training.load_run(self.run, device=self.device)
        classes = [_class_number(label, run.class_names) for label in self.labels]
        labels = [classes[index % len(classes)] for index in range(self.count)] if classes else None
        images = training.sample(run, self.count, labels=labels, seed=self.seed)
        num_classes = len(classes) or getattr(run.model, "num_classes", None) or 1
        save_grid(self.out, images, _columns(self.count, num_classes))
        say(f"{self.count} images in {self.out}")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Tell the class of image files with a trained classifier, and how sure it is (the softmax probability)."""

    run: _RunPath
    """The run folder, as given to `ganvas train classifier --out`."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE ...")]
    """PNG, JPEG or WebP files; they are resized and cropped as the training images were."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: a GPU where there is one."""

    def execute(self) -> None:
        _require_run(self.run)
        if not self.images:
            raise InputError("ganvas predict needs image files after the run folder")
        for image in self.images:
            if not image.is_file():
                raise InputError(f"{image} is no file{_close_sibling(image)}")
        from ganvas import training

        for path, class_name, probability in training.predict(
            training.load_run(self.run, device=self.device), self.images
        ):
            say(f"{path}  {class_name}  {probability:.3f}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's best weights on the test images."""

    run: _RunPath
    """The run folder, as given to `ganvas train ... --out`."""
    root: Path | None = None
    """Folder of the data files, if it is elsewhere now."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: a GPU where there is one."""

    def execute(self) -> None:
        _require_run(self.run)
        from ganvas import training

        run = training.load_run(self.run, device=self.device)
        if self.root is not None:
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, root=self.root))
        say_pairs({name: f"{value:.6g}" for name, value in training.evaluate(run).items()})


def _require_run(path: Path) -> None:
    # Before torch is loaded: most mistakes are here.
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no run folder{_close_sibling(path)}; ganvas train makes one")


def _require_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, got {path}")
    if path.is_dir():
        raise InputError(f"--out is a folder, name a file: {path}")
    if not path.parent.is_dir():
        raise InputError(f"--out: there is no folder {path.parent}; make it first")


def _close_sibling(path: Path) -> str:
    siblings = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    return suggestion(str(path), siblings)


def _class_number(label: str, class_names: tuple[str, ...]) -> int:
    if label in class_names:
        return class_names.index(label)
    raise InputError(
        f"--labels: this run has no class {label!r}{suggestion(label, class_names)}; it has {', '.join(class_names)}"
    )


def _columns(count: int, num_classes: int) -> int:
    """About a square, and a class a column where the classes come in turn."""
    square = max(1, math.ceil(math.sqrt(count)))
    return min(count, num_classes * max(1, round(square / num_classes))) if num_classes <= 2 * square else square
