"""Classification accuracy score of a conditional generator (Ravuri & Vinyals 2019, arXiv:1905.10887).

A classifier is trained on nothing but generated images with the labels they were generated for, and tested on real
ones. It is right about real images only if the generated ones look like them, belong to their class and are as
varied: one number for quality, conditioning and diversity that needs no feature extractor. A classifier trained on
the real training set gives the value to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ganvas.metrics._evaluation import device_of, evaluation_mode
from ganvas.metrics.classification import evaluate_classifier


def classification_accuracy_score(
    generator: nn.Module,
    make_classifier: Callable[[], nn.Module],
    test_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_samples: int = 20_000,
    epochs: int = 4,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Test accuracy on real images of a classifier trained on generated ones only.

    The same arguments give the same score: on a CPU with one number of threads bit for bit, on a GPU as far as torch's
    kernels are deterministic there. torch's global random state and the generator's training mode are as before when
    the function returns or raises.

    Args:
        generator: ``generator(latent (N, latent_size), labels (N,) int64)`` returns images (N, C, H, W) in [-1, 1]; it
            has the integer attributes ``latent_size`` and ``num_classes`` (K). The images are drawn in evaluation
            mode, from latents of N(0, I), with labels that are as equally frequent as ``num_samples`` allows.
        make_classifier: returns a fresh module from images (N, C, H, W) to logits (N, K).
        test_batches: pairs of real test images in [-1, 1] and labels (N,); read once. Tensors in memory serve as
            ``zip(images.split(500), labels.split(500))``.
        num_samples: number of generated training images, at least K. The paper takes as many as the real training set
            has. They are kept as uint8 on the generator's device: C·H·W bytes each.
        epochs: passes over the generated images.
        batch_size: of generation and training; at least 2.
        learning_rate: the peak of the one-cycle schedule.
        seed: of the latents, the order, the classifier's initial weights and its dropout.

    Returns:
        Accuracy in [0, 1].

    Raises:
        TypeError: ``generator`` is no ``nn.Module`` or ``make_classifier`` is not callable.
        ValueError: the generator is not conditional; a number out of range; generated images that are no (N, C, H, W)
            or not finite; test batches that are empty or hold labels outside [0, K).
    """
    latent_size, num_classes = _conditional_sizes(generator)
    if not callable(make_classifier):
        raise TypeError(f"make_classifier must be callable, got {type(make_classifier).__name__}")
    if num_samples < num_classes:
        raise ValueError(f"num_samples must be at least the {num_classes} classes, got {num_samples}")
    if epochs < 1 or batch_size < 2 or not learning_rate > 0:
        raise ValueError(
            "epochs must be at least 1, batch_size at least 2 and learning_rate positive,"
            f" got {epochs}, {batch_size}, {learning_rate}"
        )
    device = device_of(generator)
    with _private_random_state(seed, device):
        labels = torch.arange(num_samples) % num_classes
        images = _generate(generator, labels, latent_size, batch_size, device)
        classifier = make_classifier().to(device)
        _train(classifier, images, labels.to(device), epochs, batch_size, learning_rate)
        return evaluate_classifier(classifier, test_batches, num_classes, device=device).accuracy()


def _conditional_sizes(generator: nn.Module) -> tuple[int, int]:
    """The generator's ``latent_size`` and ``num_classes``."""
    if not isinstance(generator, nn.Module):
        raise TypeError(f"generator must be an nn.Module, got {type(generator).__name__}")
    sizes = []
    for attribute in ("latent_size", "num_classes"):
        value = getattr(generator, attribute, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"generator must be conditional, with a positive integer attribute {attribute};"
                f" {type(generator).__name__} has {value!r}"
            )
        sizes.append(value)
    latent_size, num_classes = sizes
    return latent_size, num_classes


@contextmanager
def _private_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device`` for the block; afterwards they are as they were.

    ``torch.manual_seed`` would also seed the GPUs that this function does not use, and nothing would put those back.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _generate(generator: nn.Module, labels: Tensor, latent_size: int, batch_size: int, device: torch.device) -> Tensor:
    """Images (N, C, H, W) uint8 on ``device`` for labels (N,)."""
    batches = []
    with evaluation_mode(generator):
        for batch_labels in labels.split(batch_size):
            # Drawn on the CPU, so that every device generates from the same latents.
            latent = torch.randn(len(batch_labels), latent_size)
            images = generator(latent.to(device), batch_labels.to(device))
            if images.dim() != 4 or images.shape[0] != len(batch_labels):
                raise ValueError(
                    f"generator must return ({len(batch_labels)}, C, H, W) images, got shape {tuple(images.shape)}"
                )
            if not images.isfinite().all():
                raise ValueError("generator returned NaN or infinite values: it has diverged")
            batches.append(_to_uint8(images))
    return torch.cat(batches)


def _to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255. Real images are 8 bit too, so this hides no difference, at a quarter of the memory."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _from_uint8(images: Tensor) -> Tensor:
    return images.float().div(127.5).sub(1)


def _train(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Adam with a one-cycle learning rate (Smith & Topin 2018) on cross entropy: short, and no tuning per data set."""
    # The last batch of an epoch may hold a single image, which batch normalisation cannot train on: whole batches only,
    # unless there is no whole batch.
    batch_size = min(batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps_per_epoch)
    classifier.train()
    for _ in range(epochs):
        batches = torch.randperm(len(images)).to(images.device).split(batch_size)
        for batch in batches[:steps_per_epoch]:
            loss = functional.cross_entropy(classifier(_from_uint8(images[batch])), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
