"""The training of a classifier: cross entropy, one-cycle learning rate, accuracy on the test set."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from ganvas.data import Augmentation
from ganvas.metrics import ClassificationMetrics, evaluate_classifier
from ganvas.training.averages import Averages
from ganvas.training.config import ClassifierConfig
from ganvas.training.memory import kept_memory
from ganvas.training.optimizers import descend, make_optimizer
from ganvas.training.preparation import BuiltModel, Job, build_model, given_model, prepare
from ganvas.training.progress import ProgressDisplay, make_progress
from ganvas.training.random_state import RandomState, reproducible
from ganvas.training.run import TrainingRun
from ganvas.training.step_graph import StepGraph
from ganvas.training.views import measured_network


def train_classifier(
    config: ClassifierConfig,
    *,
    train_data: Dataset | None = None,
    test_data: Dataset | None = None,
    model: nn.Module | None = None,
    float_range: tuple[float, float] = (0.0, 1.0),
    resume: bool = False,
    progress: ProgressDisplay | None = None,
) -> Path:
    """Train a classifier into the run folder ``config.out``.

    Its weights are ``model.safetensors`` (of the measured epochs the best on the test set; where there are several, its
    accuracy is slightly optimistic) and ``model_last.safetensors`` (the last measured epoch).

    Args:
        train_data, test_data: any torch Datasets of (image, label), both or neither; ``config.data`` is then a name.
        model: (N, C, H, W) images in [-1, 1] to (N, num_classes) logits; ``config.model`` from the registry if None.
        float_range: the range of floating-point images in ``train_data`` and ``test_data``.
        resume: continue the run that is in ``config.out``, bit for bit as if it had not been interrupted.
        progress: what a person sees; a bar in a terminal and plain lines elsewhere if None.

    Returns:
        The run folder.

    Raises:
        RunFolderError, ValueError, TypeError, FileNotFoundError: before anything is created.
        CheckpointError, CheckpointSaveError: a checkpoint cannot be used or written.
        TrainingFailed: see :mod:`ganvas.training.faults`.
        Interrupted: after Ctrl-C or SIGTERM; everything is saved.
    """
    job = prepare(
        config, train_data=train_data, test_data=test_data, float_range=float_range, resume=resume, min_classes=2
    )
    config, device = job.config, job.device
    progress = progress or make_progress()
    with (
        kept_memory(config.keep_memory),
        reproducible(config.seed, config.threads, device, deterministic=config.deterministic),
    ):
        built = given_model(model) if model is not None else _build(job)
        network: nn.Module = built.network.to(device, memory_format=torch.channels_last)
        loader = job.training_loader(Augmentation(flip=config.flip, shift=config.shift or 0))
        test = job.evaluation_loader(job.test)
        measured = measured_network(network, config)
        optimizer = make_optimizer(
            config.optimizer,
            network,
            config.learning_rate,
            weight_decay=config.weight_decay,
            capturable=job.capturable,
            cycled_momentum=True,
        )
        assert config.epochs is not None  # prepare() filled it in
        schedule = OneCycleLR(
            optimizer, [config.learning_rate] * len(optimizer.param_groups), total_steps=config.epochs * len(loader)
        )

        def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            with job.autocast():
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            descend(loss, network, optimizer, config.gradient_clip)
            return {"train/loss": loss, "train/accuracy": _accuracy(logits, labels)}

        averages = Averages(device)
        take_step = StepGraph(
            step,
            job.recorder(),
            modules=(network,),
            optimizers=(optimizer,),
            averages=averages,
            say=progress.message,
        )
        with job.run_folder(built, progress):
            run = TrainingRun(
                config,
                job.folder,
                loader,
                epochs=config.epochs,
                modules={"model": network},
                optimizers={"learning_rate": optimizer},
                averages=averages,
                parts={"schedule": schedule, "random": RandomState(device)},
                on_load=take_step.forget,
                resume=resume,
                progress=progress,
            )
            metrics = None
            with run:
                while run.epoch < config.epochs and not _reached(run, config.target_accuracy):
                    with run.recovering():
                        network.train()
                        for images, labels in run.batches():
                            take_step(images, labels)
                            schedule.step()
                        if not _is_measured(run.epoch, config):
                            run.end_epoch({})
                            continue
                        metrics = evaluate_classifier(measured, test.epoch(0), job.num_classes, device=device)
                        accuracy = metrics.accuracy()
                        job.folder.save_weights("model_last", network, step=run.step, accuracy=accuracy)
                        if run.improved("test/accuracy", accuracy, larger_is_better=True):
                            job.folder.save_weights("model", network, step=run.step, accuracy=accuracy)
                        run.end_epoch({"test/accuracy": accuracy})
                # A run that is resumed at its end has not been measured by this process.
                metrics = metrics or evaluate_classifier(measured, test.epoch(0), job.num_classes)
                run.finish(_final_metrics(run, metrics))
    return job.folder.path


def _build(job: Job[ClassifierConfig]) -> BuiltModel:
    options = {"num_classes": job.num_classes, "channels": job.train.channels, "size": job.train.size}
    if job.config.width is not None:
        options["width"] = job.config.width
    return build_model(job.config.model, "classifier", options)


def _is_measured(epoch: int, config: ClassifierConfig) -> bool:
    return (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs


def _reached(run: TrainingRun, target: float | None) -> bool:
    best = run.best.get("test/accuracy")
    return target is not None and best is not None and best >= target


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float().mean()


def _final_metrics(run: TrainingRun, metrics: ClassificationMetrics) -> dict[str, object]:
    return {
        "test/accuracy": metrics.accuracy(),
        "test/best_accuracy": run.best["test/accuracy"],
        "confusion_matrix": metrics.confusion_matrix().tolist(),
    }
