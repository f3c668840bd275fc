"""The recipe of a GAN: alternate updates, an averaged generator, quality measured and the best generator kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ganvas.data import Augmentation
from ganvas.losses import DiscriminatorLoss, GeneratorLoss, r1_penalty
from ganvas.training import extractor
from ganvas.training.averages import Averages
from ganvas.training.config import GANConfig
from ganvas.training.faults import Detector, DiversityCollapse, StuckDiscriminator
from ganvas.training.gan_steps import AveragedGenerator, discriminate_pair, frozen
from ganvas.training.grids import grid_labels, save_grid
from ganvas.training.memory import kept_memory
from ganvas.training.optimizers import descend, make_optimizer
from ganvas.training.preparation import BuiltModel, Job, build_model, given_model, prepare
from ganvas.training.progress import ProgressDisplay, make_progress
from ganvas.training.quality import GeneratorQuality, classification_score, reference_set
from ganvas.training.random_state import RandomState, reproducible
from ganvas.training.run import TrainingRun
from ganvas.training.step_graph import StepGraph

# A critic's score has no threshold at which it would be right or wrong, and a relativistic logit only a relative one.
_KINDS_WITHOUT_ACCURACY = ("wgan", "relativistic")


def train_gan(
    config: GANConfig,
    *,
    train_data: Dataset | None = None,
    test_data: Dataset | None = None,
    models: tuple[nn.Module, nn.Module] | None = None,
    float_range: tuple[float, float] = (0.0, 1.0),
    resume: bool = False,
    progress: ProgressDisplay | None = None,
) -> Path:
    """Train a GAN into the run folder ``config.out``.

    Its weights are ``generator.safetensors`` (the averaged generator at its smallest Fréchet distance),
    ``generator_last.safetensors`` and ``discriminator.safetensors`` (the averaged generator and the discriminator of
    the last epoch) and ``extractor.safetensors`` (see :mod:`ganvas.training.extractor`).

    Args:
        models: (generator, discriminator) with the interface of those in :mod:`ganvas.models`, the generator's
            attributes ``latent_size`` and ``num_classes`` included; ``config.model`` from the registry if None.

    Other arguments, result and errors as in :func:`ganvas.training.train_classifier`.
    """
    job = prepare(config, train_data=train_data, test_data=test_data, float_range=float_range, resume=resume)
    config, device = job.config, job.device
    losses = DiscriminatorLoss(config.loss, label_smoothing=config.label_smoothing), GeneratorLoss(config.loss)
    progress = progress or make_progress()
    with (
        kept_memory(config.keep_memory),
        reproducible(config.seed, config.threads, device, deterministic=config.deterministic),
    ):
        built = given_model(models) if models is not None else _build(job)
        generator, discriminator = (network.to(device, memory_format=torch.channels_last) for network in built.network)
        with job.run_folder(built, progress):
            _train(job, generator, discriminator, *losses, progress)
    return job.folder.path


def _train(
    job: Job[GANConfig],
    generator: nn.Module,
    discriminator: nn.Module,
    discriminator_loss: DiscriminatorLoss,
    generator_loss: GeneratorLoss,
    progress: ProgressDisplay,
) -> None:
    config, device = job.config, job.device
    averaged = AveragedGenerator(generator, config.ema_decay)
    generator_optimizer = _optimizer(job, generator, config.generator_learning_rate)
    discriminator_optimizer = _optimizer(job, discriminator, config.discriminator_learning_rate)
    noise = torch.Generator(device).manual_seed(config.seed)
    loader = job.training_loader(Augmentation(flip=config.flip))
    latent_size: int = generator.latent_size  # type: ignore[assignment]
    evaluation = _Evaluation(job, progress)

    def step(real: Tensor, labels: Tensor | None, *, penalises: bool, updates_generator: bool) -> dict[str, Tensor]:
        latent = torch.randn(len(real), latent_size, generator=noise, device=device)
        real = real.detach().requires_grad_(penalises)

        # Generated once for both updates: the generator does not change in between.
        with torch.set_grad_enabled(updates_generator), job.autocast():
            fake = generator(latent) if labels is None else generator(latent, labels)

        with job.autocast():
            real_logits, fake_logits = discriminate_pair(discriminator, real, fake.detach(), labels)
        loss, metrics = discriminator_loss.with_metrics(real_logits.float(), fake_logits.float())
        values = {"train/discriminator_loss": loss, **_named(metrics)}
        if penalises:
            # Seldom, so with all the more weight (Karras et al. 2020, appendix B).
            loss = loss + r1_penalty(real_logits, real, config.r1_gamma * config.r1_every)
        descend(loss, discriminator, discriminator_optimizer, config.gradient_clip)

        if updates_generator:
            with frozen(discriminator):
                with job.autocast():
                    if config.loss == "relativistic":
                        real_logits, fake_logits = discriminate_pair(discriminator, real.detach(), fake, labels)
                    else:
                        fake_logits = discriminator(fake) if labels is None else discriminator(fake, labels)
                loss = generator_loss(fake_logits.float(), real_logits.float())
                descend(loss, generator, generator_optimizer, config.gradient_clip)
            averaged.update_parameters(generator)
            values["train/generator_loss"] = loss
        return values

    averages = Averages(device)
    take_step = StepGraph(
        step,
        job.recorder(noise),
        modules=(generator, discriminator, averaged),
        optimizers=(generator_optimizer, discriminator_optimizer),
        averages=averages,
        say=progress.message,
    )
    assert config.epochs is not None  # prepare() filled it in
    run = TrainingRun(
        config,
        job.folder,
        loader,
        epochs=config.epochs,
        modules={"generator": generator, "discriminator": discriminator, "averaged generator": averaged},
        optimizers={
            "generator_learning_rate": generator_optimizer,
            "discriminator_learning_rate": discriminator_optimizer,
        },
        averages=averages,
        parts={"random": RandomState(device, noise=noise)},
        detectors=_detectors(config),
        on_load=take_step.forget,
        resume=job.resume,
        progress=progress,
    )
    with run:
        if run.step == 0:
            run.log(evaluation.extractor.quality)
        while run.epoch < config.epochs:
            with run.recovering():
                generator.train()
                discriminator.train()
                for real, labels in run.batches():
                    take_step(
                        real,
                        labels if generator.num_classes is not None else None,
                        penalises=config.r1_gamma > 0 and run.step % config.r1_every == 0,
                        updates_generator=(run.step + 1) % config.discriminator_steps == 0,
                    )
                run.end_epoch(evaluation.of_epoch(run, averaged.module, generator, discriminator))
        run.finish(evaluation.of_best(run, averaged.module))


def _build(job: Job[GANConfig]) -> BuiltModel:
    config = job.config
    if config.conditional and job.num_classes < 2:
        raise ValueError(f"conditional: {config.data} has one class only; train with --no-conditional")
    options = {
        "size": job.train.size,
        "channels": job.train.channels,
        "num_classes": job.num_classes if config.conditional else None,
        "latent_size": config.latent_size,
        "width": config.width,
    }
    return build_model(config.model, "gan", options)


def _optimizer(job: Job[GANConfig], network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    config = job.config
    return make_optimizer(config.optimizer, network, learning_rate, beta1=config.beta1, capturable=job.capturable)


def _detectors(config: GANConfig) -> list[Detector]:
    collapse = DiversityCollapse(config.diversity_floor)
    if config.loss in _KINDS_WITHOUT_ACCURACY:
        return [collapse]
    return [collapse, StuckDiscriminator(config.stuck_after)]


def _named(metrics: Any) -> dict[str, Tensor]:
    return {f"train/{name}": value for name, value in metrics._asdict().items()}


class _Evaluation:
    """What a GAN run measures, draws and keeps between its epochs and at its end."""

    def __init__(self, job: Job[GANConfig], progress: ProgressDisplay) -> None:
        self._job = job
        self._data = job.folder.read_description()["data"]
        self._test = job.evaluation_loader(job.test)
        if not job.folder.has_weights(extractor.WEIGHTS):
            progress.message("training the network whose features quality is measured in")
        train = job.training_loader()
        self.extractor = extractor.obtain_extractor(
            job.folder, self._data, train, self._test, seed=job.config.seed, epochs=job.config.extractor_epochs
        )
        reference = job.evaluation_loader(reference_set(job.train, job.test))
        self._quality = GeneratorQuality(self.extractor, reference, job.config.evaluation_samples)

    def of_epoch(
        self, run: TrainingRun, averaged: nn.Module, generator: nn.Module, discriminator: nn.Module
    ) -> dict[str, float]:
        """In every so many epochs: measure, keep the best and the last, draw the grid. Returns the numbers to log."""
        config, folder = self._job.config, self._job.folder
        epoch = run.epoch + 1
        metrics: dict[str, float] = {}
        assert config.evaluate_every is not None  # prepare() filled it in
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            metrics = self._quality.measure(averaged, generator)
            distance = metrics[self._quality.name]
            if run.improved(self._quality.name, distance, larger_is_better=False):
                folder.save_weights("generator", averaged, step=run.step, frechet_distance=distance)
            folder.save_weights("generator_last", averaged, step=run.step)
            folder.save_weights("discriminator", discriminator, step=run.step)
            self._draw(averaged, f"epoch-{epoch:04d}")
        if config.cas_every and epoch % config.cas_every == 0 and averaged.num_classes is not None:
            metrics["test/cas"] = self._score(averaged)
        return metrics

    def of_best(self, run: TrainingRun, averaged: nn.Module) -> dict[str, Any]:
        """The final numbers, of the generator that was kept, and its grid."""
        best = copy.deepcopy(averaged)
        self._job.folder.load_weights("generator", best)
        self._draw(best, "best")
        metrics: dict[str, Any] = self._quality.measure(best, best)
        if best.num_classes is not None:
            metrics["test/cas"] = self._score(best)
        return metrics

    def _score(self, generator: nn.Module) -> float:
        return classification_score(generator, self._data, self._test, self._job.config.cas_samples)

    @torch.no_grad()
    def _draw(self, generator: nn.Module, name: str) -> None:
        """A grid from latents that stay the same over the run; in a row of a conditional one the classes share one."""
        labels, columns = grid_labels(generator.num_classes, self._job.config.samples)  # type: ignore[arg-type]
        count = self._job.config.samples if labels is None else len(labels)
        source = torch.Generator().manual_seed(self._job.config.seed)
        latent = torch.randn(count if labels is None else count // columns, generator.latent_size, generator=source)  # type: ignore[call-overload]
        generator.eval()
        if labels is None:
            images = generator(latent.to(self._job.device))
        else:
            latent = latent.repeat_interleave(columns, dim=0).to(self._job.device)
            images = generator(latent, labels.to(self._job.device))
        save_grid(self._job.folder.samples / f"{name}.png", images.float(), columns)
