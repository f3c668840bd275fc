"""Classification by two views of an image, itself and its mirror image (as airbench measures, arXiv:2404.00498)."""

from __future__ import annotations

from torch import Tensor, nn

from ganvas.training.config import ClassifierConfig, RunConfig


class MirrorAveraged(nn.Module):
    """Images (N, C, H, W) to log probabilities (N, num_classes): the log of the mean of both views' probabilities.

    Args:
        network: images to logits (N, num_classes). Its parameters are shared, not copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        probabilities = self.network(images).softmax(dim=1) + self.network(images.flip(3)).softmax(dim=1)
        return (probabilities / 2).log()


def measured_network(network: nn.Module, config: RunConfig) -> nn.Module:
    """What a run measures and predicts with: the network itself, or the mean of its views if the config says so."""
    mirrored = isinstance(config, ClassifierConfig) and config.mirror_views
    return MirrorAveraged(network) if mirrored else network
