"""The classical classifiers: a dense net and plain convolutional ones, without normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from ganvas.models import checks
from ganvas.models.registry import register
from ganvas.nn import FusedSequential


class Classifier(nn.Module):
    """Images (N, channels, size, size) in [-1, 1] to logits (N, num_classes).

    Args:
        body: images to features (N, num_features).
        num_features: D of the features.
        num_classes, channels, size: kept as attributes.

    Raises (when called):
        TypeError, ValueError: images that are no floating point (N, channels, size, size) tensor.
    """

    def __init__(self, body: nn.Module, num_features: int, *, num_classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.channels = channels
        self.size = size
        self.body = body
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer's activations (N, D)."""
        checks.images(images, self.channels, self.size)
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def check_options(num_classes: int, channels: int, size: int, minimum_size: int) -> None:
    """Raise ValueError for an option of a classifier that is out of its range."""
    checks.integer("num_classes", num_classes, 2)
    checks.integer("channels", channels)
    checks.integer("size", size, minimum_size)


@register("mlp", kind="classifier")
def mlp(num_classes: int = 10, channels: int = 3, size: int = 32) -> Classifier:
    """Dense 128, any size."""
    check_options(num_classes, channels, size, minimum_size=1)
    body = FusedSequential(nn.Flatten(), nn.Linear(channels * size * size, 128), nn.ReLU())
    return Classifier(body, 128, num_classes=num_classes, channels=channels, size=size)


@register("cnn_32_64", kind="classifier")
def cnn_32_64(num_classes: int = 10, channels: int = 3, size: int = 32) -> Classifier:
    """Two 3×3 convolutions of 32 and 64 channels, each with ReLU and 2×2 max pooling, dense 128; size ≥ 4."""
    return _plain_cnn((32, 64), 128, 0.0, num_classes, channels, size)


@register("cnn_32_64_128", kind="classifier")
def cnn_32_64_128(num_classes: int = 10, channels: int = 3, size: int = 32) -> Classifier:
    """Three 3×3 convolutions of 32, 64 and 128 channels, each with ReLU and 2×2 max pooling, dense 64; size ≥ 8."""
    return _plain_cnn((32, 64, 128), 64, 0.0, num_classes, channels, size)


@register("cnn_32_64_128_dropout", kind="classifier")
def cnn_32_64_128_dropout(num_classes: int = 10, channels: int = 3, size: int = 32, dropout: float = 0.2) -> Classifier:
    """As cnn_32_64_128, with dropout before both dense layers."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    return _plain_cnn((32, 64, 128), 64, float(dropout), num_classes, channels, size)


def _plain_cnn(
    widths: tuple[int, ...], dense: int, dropout: float, num_classes: int, channels: int, size: int
) -> Classifier:
    halvings = len(widths)
    check_options(num_classes, channels, size, minimum_size=2**halvings)
    layers: list[nn.Module] = []
    for in_channels, out_channels in zip((channels, *widths), widths):
        layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    if dropout:
        layers.append(nn.Dropout(dropout))
    layers += [nn.Linear(widths[-1] * (size // 2**halvings) ** 2, dense), nn.ReLU()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return Classifier(FusedSequential(*layers), dense, num_classes=num_classes, channels=channels, size=size)
