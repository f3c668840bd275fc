"""The small CIFAR ResNets (He et al. 2015, section 4.2) as people write them: a forward of their own and ``F.relu``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CifarBlock(nn.Module):
    """Two convolutions 3×3 and a shortcut, which is an empty Sequential where it changes nothing."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, Cin, H, W) to (N, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class CifarResNet(nn.Module):
    """6·blocks + 2 layers: ``blocks=3, width=16`` is ResNet-20."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._layer(width, width, blocks, 1)
        self.layer2 = self._layer(width, 2 * width, blocks, 2)
        self.layer3 = self._layer(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _layer(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        following = (CifarBlock(width, width, 1) for _ in range(1, blocks))
        return nn.Sequential(CifarBlock(in_channels, width, stride), *following)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, 10)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.shape[2:])
        return self.linear(out.flatten(1))
