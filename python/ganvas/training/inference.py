"""What can be done with a run afterwards: sample, predict, evaluate. Only ``evaluate`` needs the data again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ganvas import data, models
from ganvas.metrics import evaluate_classifier
from ganvas.training.autoencoder import reconstruction_error
from ganvas.training.config import RunConfig, config_from_json
from ganvas.training.extractor import obtain_extractor
from ganvas.training.preparation import EVALUATION_BATCH, Job, check_kernels, load_split
from ganvas.training.quality import GeneratorQuality, classification_score, generate, reference_set
from ganvas.training.random_state import choose_device
from ganvas.training.run_folder import RunFolder, RunFolderError
from ganvas.training.views import measured_network


@dataclass(frozen=True)
class Run:
    """A run folder with its best weights loaded."""

    folder: RunFolder
    config: RunConfig
    model: nn.Module
    """The classifier (by two views of an image, if the config says so), the autoencoder, or the generator (the averaged
    one at its best); in evaluation mode."""
    device: torch.device
    description: dict[str, Any]
    """What ``config.json`` holds."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.description["data"]["class_names"])


class Prediction(NamedTuple):
    """What a classifier takes an image file for."""

    path: Path
    class_name: str
    probability: float


def load_run(path: str | Path, *, model: nn.Module | None = None, device: str = "auto") -> Run:
    """Rebuild a run's model and load its best weights.

    Args:
        path: the run folder.
        model: the network (of a GAN: the generator) for a run that was trained with one of its own, which only code can
            rebuild; None for those of the registry.

    Raises:
        RunFolderError: no run there, no weights yet, damaged ones, ones that do not fit ``model``; ``model`` missing.
        ValueError: a device that is not there; GANVAS_BACKEND or GANVAS_CPU_ISA asks for what cannot run.
    """
    folder = RunFolder(path)
    description = folder.read_description()
    config = config_from_json(description["job"], description["config"])
    chosen = choose_device(device)
    check_kernels(chosen)
    weights = "generator" if config.job == "gan" else "model"
    if not folder.has_weights(weights):
        raise RunFolderError(f"{folder.path} has no {weights}.safetensors yet: nothing has been measured so far")
    network = _rebuild(folder, description) if model is None else model
    folder.load_weights(weights, network)
    return Run(folder, config, measured_network(network, config).to(chosen).eval(), chosen, description)


def _rebuild(folder: RunFolder, description: dict[str, Any]) -> nn.Module:
    made = description["model"]
    if not made["registered"]:
        raise RunFolderError(f"{folder.path} was trained with a {made['name']} of its own; pass it as model=...")
    network = models.create(made["name"], **made["options"])
    return network[0] if isinstance(network, tuple) else network


def sample(run: Run, count: int, *, labels: Sequence[int] | Tensor | None = None, seed: int = 0) -> Tensor:
    """Generated images (count, C, H, W) in [-1, 1], on the CPU.

    Args:
        count: how many, at least 1.
        labels: their classes, ``count`` of them, for a conditional generator; all classes in turn if None.
        seed: the same images for the same seed.

    Raises:
        ValueError: not a GAN's run; labels that do not fit.
    """
    if run.config.job != "gan":
        raise ValueError(f"{run.folder.path} is the run of a {run.config.job}, only a gan's can be sampled")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    num_classes = run.model.num_classes
    if labels is None:
        chosen = torch.arange(count) % int(num_classes or 1)  # type: ignore[arg-type]
    else:
        if num_classes is None:
            raise ValueError("labels: this generator is unconditional, it cannot be asked for a class")
        chosen = torch.as_tensor(labels, dtype=torch.int64)
        if chosen.shape != (count,):
            raise ValueError(f"labels must be {count} class numbers, got shape {tuple(chosen.shape)}")
        if int(chosen.min()) < 0 or int(chosen.max()) >= int(num_classes):  # type: ignore[arg-type]
            raise ValueError(f"labels must lie in 0..{int(num_classes) - 1}, got {chosen.tolist()}")  # type: ignore[arg-type]
    return generate(run.model, chosen.to(run.device), seed=seed).cpu()


@torch.no_grad()
def predict(run: Run, paths: Sequence[str | Path]) -> list[Prediction]:
    """Class and its probability for each image file, resized and cropped as the training images were.

    Raises:
        ValueError: not a classifier's run; an unreadable image (the file is named).
        FileNotFoundError: no such file.
    """
    if run.config.job != "classifier":
        raise ValueError(f"{run.folder.path} is the run of a {run.config.job}, only a classifier's predicts")
    size, channels = run.description["data"]["size"], run.description["data"]["channels"]
    predictions: list[Prediction] = []
    for start in range(0, len(paths), EVALUATION_BATCH):
        chunk = [Path(path) for path in paths[start : start + EVALUATION_BATCH]]
        pixels = torch.stack([data.read_image(path, size, channels) for path in chunk])
        probabilities, classes = run.model(data.to_float(pixels).to(run.device)).softmax(dim=1).max(dim=1)
        names = (run.class_names[index] for index in classes.tolist())
        predictions += map(Prediction, chunk, names, probabilities.tolist())
    return predictions


def evaluate(
    run: Run,
    *,
    train_data: Dataset | None = None,
    test_data: Dataset | None = None,
    float_range: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """The job's metrics on the test set, from the run's best weights.

    Args:
        train_data, test_data: for a run whose data was passed from Python; both or neither.
        float_range: the range of their images if these are floating point.

    Raises:
        ValueError, FileNotFoundError: the data cannot be loaded any more, or is not what the run was trained on.
    """
    train, test = (
        data.as_image_dataset(given) if given is not None else load_split(run.config, split)
        for given, split in ((train_data, "train"), (test_data, "test"))
    )
    for dataset in (train, test):
        if dataset.class_names != run.class_names:
            raise ValueError(
                f"the data has the classes {dataset.class_names}, the run was trained on {run.class_names}"
            )
    job = Job(run.config, run.folder, train, test, run.device, float_range, resume=False)
    return _EVALUATIONS[run.config.job](run, job)


def _evaluate_classifier(run: Run, job: Job[Any]) -> dict[str, float]:
    batches = job.evaluation_loader(job.test).epoch(0)
    return {"test/accuracy": evaluate_classifier(run.model, batches, job.num_classes).accuracy()}


def _evaluate_autoencoder(run: Run, job: Job[Any]) -> dict[str, float]:
    return {"test/loss": reconstruction_error(run.model, job.evaluation_loader(job.test))}


def _evaluate_gan(run: Run, job: Job[Any]) -> dict[str, float]:
    config, description = job.config, run.description["data"]
    test = job.evaluation_loader(job.test)
    extractor = obtain_extractor(
        run.folder, description, job.training_loader(), test, seed=config.seed, epochs=config.extractor_epochs
    )
    reference = job.evaluation_loader(reference_set(job.train, job.test))
    quality = GeneratorQuality(extractor, reference, config.evaluation_samples)
    metrics = {**extractor.quality, **quality.measure(run.model, run.model)}
    if run.model.num_classes is not None:
        metrics["test/cas"] = classification_score(run.model, description, test, config.cas_samples)
    return metrics


_EVALUATIONS = {
    "classifier": _evaluate_classifier,
    "gan": _evaluate_gan,
    "autoencoder": _evaluate_autoencoder,
}
