"""``ganvas train classifier|gan|autoencoder``: every field of the job's config is an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from ganvas.training.config import AutoencoderConfig, ClassifierConfig, GANConfig, RunConfig
from ganvas.training.recipes import Recipe, recipe_config

# The options of a config are called by their names alone, without the field's before them.
_PLAIN_NAMES = arg(name="")


@dataclass(frozen=True, kw_only=True)
class _Train:
    config: RunConfig
    resume: FlagCreatePairsOff[bool] = False
    """Continue the run in --out where it stopped; give the other options as they were."""

    def execute(self) -> None:
        # Here and not above, so that a help page needs no torch.
        from ganvas.cli.job import run_job

        run_job(self.config, resume=self.resume)


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(_Train):
    """Train a network that tells classes of images apart."""

    config: Annotated[ClassifierConfig, _PLAIN_NAMES]
    recipe: Recipe = "standard"
    """Defaults of the options below: those that are shown, or fast's, which reach a good accuracy in the least time."""

    def with_defaults(self) -> TrainClassifier:
        """A command of the same recipe, data set and run folder with no other option given."""
        config = recipe_config(self.recipe, data=self.config.data, out=self.config.out)
        return TrainClassifier(config=config, recipe=self.recipe)


@dataclass(frozen=True, kw_only=True)
class TrainGAN(_Train):
    """Train a generator that makes images like those it is shown, against a discriminator that tells them apart."""

    config: Annotated[GANConfig, _PLAIN_NAMES]


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder(_Train):
    """Train a network that squeezes images into a few numbers and back."""

    config: Annotated[AutoencoderConfig, _PLAIN_NAMES]
