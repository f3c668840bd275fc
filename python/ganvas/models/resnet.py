"""The default classifier: a small residual network, every convolution followed by BatchNorm and LeakyReLU."""

from __future__ import annotations

from torch import nn

from ganvas.models import checks
from ganvas.models.blocks import Residual, conv_bn_leaky_relu
from ganvas.models.classifiers import Classifier, check_options
from ganvas.models.registry import register
from ganvas.nn import convert


@register("resnet", kind="classifier")
def resnet(num_classes: int = 10, channels: int = 3, size: int = 32, width: int = 32) -> Classifier:
    """Small residual network of conv-BN-LeakyReLU, a strong default; size ≥ 8.

    After DAVIDnet (Page 2018, "How to train your ResNet"): a stem, then stages of width 1, 2 and 4 × ``width`` with one
    residual block each, ending in global max pooling. Each stage works on maps half as wide as the one before, the
    first already on half the image, which keeps a training step affordable on a CPU.
    """
    check_options(num_classes, channels, size, minimum_size=8)
    checks.integer("width", width)
    body = nn.Sequential(
        *conv_bn_leaky_relu(channels, width),
        nn.MaxPool2d(2),
        Residual(width),
        *conv_bn_leaky_relu(width, 2 * width),
        nn.MaxPool2d(2),
        Residual(2 * width),
        *conv_bn_leaky_relu(2 * width, 4 * width),
        nn.MaxPool2d(2),
        Residual(4 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )
    convert(body)  # through the blocks, so that they and the layers between them are one chain
    return Classifier(body, 4 * width, num_classes=num_classes, channels=channels, size=size)
