"""One frozen dataclass per job: the command line, ``config.json`` and the Python API are this same object.

``None`` in ``epochs``, ``size``, ``width``, ``shift`` or ``evaluate_every`` means "what suits the data set", and in
``bf16`` "what suits the device": they are filled in when a run starts (:mod:`ganvas.training.presets`,
:mod:`ganvas.training.preparation`), and ``config.json`` holds the values that were used.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

MAX_THREADS = 1024
"""More than a machine has cores for. OpenMP ends the process where the system refuses it a thread, so it is not asked
for any number."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every job has in common."""

    data: str
    """Where the images come from: digits, mnist, cifar10 or folder."""
    out: Path
    """The run folder to make; it must not hold a run yet (or --resume continues it)."""
    root: Path | None = None
    """Folder of the data files; not needed for digits."""
    epochs: int | None = None
    """Passes over the training set; what suits the data set if not given."""
    batch_size: int = 128
    """Images a step."""
    seed: int = 0
    """Of parameters, data order, augmentation, noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: a GPU where there is one."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    keep_memory: bool = True
    """Keep memory that a step frees for the next one, rather than have the system clear it anew each time (Linux with
    glibc; --no-keep-memory where other programs need it)."""
    bf16: bool | None = None
    """bfloat16 autocast (parameters, optimiser state and statistics stay float32); if not given, on for GPUs that have
    bfloat16 and for CPUs with AMX, off for others, and as it was when a run is resumed."""
    cuda_graph: bool = True
    """On a GPU, record a training step as a CUDA graph and replay it: the same numbers without the time that starting
    each kernel takes. A step that can't be recorded runs as it is, and the reason is said. A network of your own whose
    forward takes another course in Python from step to step needs --no-cuda-graph."""
    deterministic: bool = True
    """On a GPU, convolutions of cuDNN that give the same bits each time; --no-deterministic has it measure, once for
    each shape, which is fastest, and the last bits differ from run to run."""
    gradient_clip: float | None = None
    """Bound on the norm of all gradients together."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is written at least this often, and after every epoch."""
    log_every: int = 50
    """Steps that one line of metrics.jsonl averages over."""
    max_recoveries: int = 3
    """How often a run gone wrong returns to its last good checkpoint, with half the learning rate each time."""
    size: int | None = None
    """Side of the square images in pixels; the data's own (or the model's) if not given."""
    skip_unreadable: bool = False
    """Leave out image files that cannot be read (they are listed) rather than stop."""

    job: ClassVar[str]
    """The word after `ganvas train`."""
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {
            "out", "root", "device", "threads", "keep_memory", "cuda_graph", "deterministic", "checkpoint_seconds",
            "max_recoveries",
        }
    )  # fmt: skip
    """Fields that do not change the steps taken so far, but for their last bits; every other must stay as it was when a
    run is resumed."""

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for a value that no run could use."""
        object.__setattr__(self, "out", Path(self.out))
        if self.root is not None:
            object.__setattr__(self, "root", Path(self.root))
        for name, minimum in _MINIMA.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value >= minimum):
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise ValueError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        for name in _POSITIVE:
            value = getattr(self, name, None)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value}")
        for name in _SHARES:
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, paths as strings."""
        fields = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}

    def identity(self) -> dict[str, Any]:
        """The fields on which the numbers of a run depend."""
        return {name: value for name, value in self.to_json().items() if name not in self.free_on_resume}


_MINIMA = {
    "epochs": 1, "batch_size": 2, "seed": 0, "threads": 1, "checkpoint_seconds": 0, "log_every": 1, "max_recoveries": 0,
    "size": 4, "weight_decay": 0, "shift": 0, "width": 1, "latent_size": 1, "discriminator_steps": 1, "r1_gamma": 0,
    "r1_every": 1, "evaluate_every": 1, "evaluation_samples": 16, "samples": 1, "stuck_after": 1, "cas_every": 0,
    "cas_samples": 1, "extractor_epochs": 1,
}  # fmt: skip
_POSITIVE = (
    "learning_rate", "generator_learning_rate", "discriminator_learning_rate", "gradient_clip",
)  # fmt: skip
_SHARES = ("label_smoothing", "beta1", "ema_decay", "diversity_floor", "target_accuracy")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Trains an image classifier; the defaults are the recipe ``standard`` of :mod:`ganvas.training.recipes`."""

    job: ClassVar[str] = "classifier"

    model: str = "resnet"
    """Name in the registry: `ganvas info --models`."""
    width: int | None = None
    """Channels of a network that has them as an option; the network's own if not given."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 4e-3
    """Peak of the one-cycle schedule."""
    weight_decay: float = 0.02
    label_smoothing: float = 0.0
    flip: bool = False
    """Mirror images at random."""
    shift: int | None = None
    """Move images at random by up to this many pixels; what suits the data set if not given."""
    evaluate_every: int = 1
    """Epochs between two measurements on the test set, the best network by which is kept; the last epoch always has
    one."""
    mirror_views: bool = False
    """Measure and predict by the mean probabilities of an image and its mirror image."""
    target_accuracy: float | None = None
    """Stop after the measurement that reaches this share of the test images."""


@dataclass(frozen=True, kw_only=True)
class GANConfig(RunConfig):
    """Trains a generative adversarial network."""

    job: ClassVar[str] = "gan"
    # No schedule counts on the number of epochs, so a run can be made longer.
    free_on_resume: ClassVar[frozenset[str]] = RunConfig.free_on_resume | {"epochs"}

    model: str = "dcgan"
    """Name in the registry: `ganvas info --models`."""
    conditional: bool = True
    """Tell both networks the label, so that a class can be asked for."""
    width: int | None = None
    """Channels of the networks' widest-image layer; what suits the data set if not given."""
    latent_size: int = 100
    loss: Literal["bce", "non_saturating", "lsgan", "hinge", "wgan", "relativistic"] = "bce"
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    generator_learning_rate: float = 4e-4
    discriminator_learning_rate: float = 4e-4
    beta1: float = 0.5
    discriminator_steps: int = 1
    """Discriminator steps for each generator step."""
    label_smoothing: float = 0.0
    r1_gamma: float = 1.0
    """Weight of the R1 gradient penalty, which keeps the generator from collapsing; 0 leaves it out."""
    r1_every: int = 4
    """Steps between two R1 penalties."""
    ema_decay: float = 0.999
    """Of the averaged generator, which is the one that is sampled and kept."""
    flip: bool = False
    evaluate_every: int | None = None
    """Epochs between two measurements of quality, the best generator by which is kept; what suits the data set if not
    given."""
    evaluation_samples: int = 2000
    """Generated images that a measurement of quality compares with as many real ones."""
    extractor_epochs: int | None = None
    """Epochs of the network whose features quality is measured in; enough to see 60,000 images, at most 20, if not
    given."""
    cas_every: int = 0
    """Epochs between two classification accuracy scores (of a conditional generator); 0: only at the end of the run."""
    cas_samples: int | None = None
    """Generated images for that score; as many as there are training images, within 2,000 and 20,000, if not given."""
    samples: int = 64
    """Images in a sample grid."""
    stuck_after: int = 1000
    """Steps without one mistake of the discriminator after which the run counts as stuck."""
    diversity_floor: float = 0.2
    """Share of the real images' diversity below which the generator counts as collapsed."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(RunConfig):
    """Trains an autoencoder."""

    job: ClassVar[str] = "autoencoder"
    free_on_resume: ClassVar[frozenset[str]] = RunConfig.free_on_resume | {"epochs"}

    model: str = "conv_autoencoder"
    """Name in the registry: `ganvas info --models`."""
    latent_size: int = 64
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.0
    samples: int = 32
    """Images in a grid of originals and reconstructions."""


CONFIGS: dict[str, type[RunConfig]] = {
    config.job: config for config in (ClassifierConfig, GANConfig, AutoencoderConfig)
}


def config_from_json(job: str, fields: dict[str, Any]) -> RunConfig:
    """The config that :meth:`RunConfig.to_json` described.

    Raises:
        ValueError: an unknown job or field.
    """
    if job not in CONFIGS:
        raise ValueError(f"job must be one of {', '.join(CONFIGS)}; got {job!r}")
    known = {field.name for field in dataclasses.fields(CONFIGS[job])}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"{job} has no setting {', '.join(unknown)}; was the run made by a newer ganvas?")
    return CONFIGS[job](**fields)
