"""The recipe of an autoencoder: mean squared error between an image and what is left of it after the latent."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ganvas.data import BatchLoader
from ganvas.training.averages import Averages
from ganvas.training.config import AutoencoderConfig
from ganvas.training.grids import save_grid
from ganvas.training.memory import kept_memory
from ganvas.training.optimizers import descend, make_optimizer
from ganvas.training.preparation import build_model, given_model, prepare
from ganvas.training.progress import ProgressDisplay, make_progress
from ganvas.training.random_state import RandomState, reproducible
from ganvas.training.run import TrainingRun
from ganvas.training.step_graph import StepGraph


def train_autoencoder(
    config: AutoencoderConfig,
    *,
    train_data: Dataset | None = None,
    test_data: Dataset | None = None,
    model: nn.Module | None = None,
    float_range: tuple[float, float] = (0.0, 1.0),
    resume: bool = False,
    progress: ProgressDisplay | None = None,
) -> Path:
    """Train an autoencoder into the run folder ``config.out``.

    Its weights are ``model.safetensors`` (the epoch with the lowest error on the test set) and
    ``model_last.safetensors``. The grids show a row of test images above the row of their reconstructions, and so on.

    Arguments (``model``: (N, C, H, W) images in [-1, 1] to the same), result and errors as in
    :func:`ganvas.training.train_classifier`.
    """
    job = prepare(config, train_data=train_data, test_data=test_data, float_range=float_range, resume=resume)
    config, device = job.config, job.device
    progress = progress or make_progress()
    with (
        kept_memory(config.keep_memory),
        reproducible(config.seed, config.threads, device, deterministic=config.deterministic),
    ):
        options = {"channels": job.train.channels, "size": job.train.size, "latent_size": config.latent_size}
        built = given_model(model) if model is not None else build_model(config.model, "autoencoder", options)
        network: nn.Module = built.network.to(device, memory_format=torch.channels_last)
        loader = job.training_loader()
        test = job.evaluation_loader(job.test)
        optimizer = make_optimizer(
            config.optimizer,
            network,
            config.learning_rate,
            weight_decay=config.weight_decay,
            capturable=job.capturable,
        )

        def step(images: Tensor) -> dict[str, Tensor]:
            with job.autocast():
                reconstructed = network(images)
            loss = F.mse_loss(reconstructed.float(), images)
            descend(loss, network, optimizer, config.gradient_clip)
            return {"train/loss": loss}

        averages = Averages(device)
        take_step = StepGraph(
            step,
            job.recorder(),
            modules=(network,),
            optimizers=(optimizer,),
            averages=averages,
            say=progress.message,
        )
        assert config.epochs is not None  # prepare() filled it in
        with job.run_folder(built, progress):
            run = TrainingRun(
                config,
                job.folder,
                loader,
                epochs=config.epochs,
                modules={"model": network},
                optimizers={"learning_rate": optimizer},
                averages=averages,
                parts={"random": RandomState(device)},
                on_load=take_step.forget,
                resume=resume,
                progress=progress,
            )
            with run:
                while run.epoch < config.epochs:
                    with run.recovering():
                        network.train()
                        for images, _ in run.batches():
                            take_step(images)
                        error = reconstruction_error(network, test)
                        job.folder.save_weights("model_last", network, step=run.step, loss=error)
                        if run.improved("test/loss", error, larger_is_better=False):
                            job.folder.save_weights("model", network, step=run.step, loss=error)
                        grid, columns = reconstruction_grid(network, test, config.samples)
                        save_grid(job.folder.samples / f"epoch-{run.epoch + 1:04d}.png", grid, columns)
                        run.end_epoch({"test/loss": error})
                run.finish({"test/loss": reconstruction_error(network, test), "test/best_loss": run.best["test/loss"]})
    return job.folder.path


@torch.no_grad()
def reconstruction_error(network: nn.Module, loader: BatchLoader) -> float:
    """Mean squared error per value over all images of the loader."""
    network.eval()
    total, count = 0.0, 0
    for images, _ in loader.epoch(0):
        total += float(F.mse_loss(network(images).float(), images, reduction="sum").double())
        count += images.numel()
    return total / count


@torch.no_grad()
def reconstruction_grid(network: nn.Module, loader: BatchLoader, samples: int) -> tuple[Tensor, int]:
    """Images for a grid, rows of originals and rows of reconstructions in turn; and its number of columns."""
    network.eval()
    images, _ = next(iter(loader.epoch(0)))
    columns = min(8, samples, len(images))
    originals = images[: max(1, min(samples, len(images)) // columns) * columns]
    rows = torch.stack(
        [originals.unflatten(0, (-1, columns)), network(originals).float().unflatten(0, (-1, columns))], 1
    )
    return rows.flatten(0, 2), columns
