"""Networks as people write them: forwards of their own, layers as attributes, activations as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


# Eight channels and more: with fewer, torch 2.13's own weight gradient of a 1×1 convolution of stride 2 is wrong in
# channels_last on AVX2 machines, and writes past its memory.
def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """In the manner of torchvision: one in-place ReLU called twice, ``out += identity``."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """In the manner of torchvision: 7×7 stem, max-pool, layers of blocks, global average."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], width: int = 8):
        super().__init__()
        self.in_channels = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers = [self._layer(block, width * 2**i, depth, 1 if i == 0 else 2) for i, depth in enumerate(depths)]
        self.layer1, self.layer2 = layers
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.in_channels, 5)

    def _layer(self, block: type[BasicBlock | Bottleneck], width: int, depth: int, stride: int) -> nn.Sequential:
        out_channels = width * block.expansion
        downsample = None
        if stride != 1 or self.in_channels != out_channels:
            downsample = nn.Sequential(conv1x1(self.in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        blocks = [block(self.in_channels, width, stride, downsample)]
        self.in_channels = out_channels
        return nn.Sequential(*blocks, *(block(out_channels, width) for _ in range(1, depth)))

    def _forward_impl(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)

    def forward(self, x):
        return self._forward_impl(x)


class TimmBlock(nn.Module):
    """In the manner of timm: places for modules that are an Identity or None most of the time."""

    def __init__(self, in_channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.drop_block = nn.Identity()
        self.act1 = nn.LeakyReLU(0.1, inplace=True)
        self.aa = nn.Identity()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = None
        self.act2 = nn.LeakyReLU(0.1, inplace=True)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False),
                conv1x1(in_channels, width),
                nn.BatchNorm2d(width),
            )
        self.drop_path = None

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


class TimmResNet(nn.Module):
    """A deep stem as a Sequential, features and head as methods, dropout that follows the mode."""

    def __init__(self, width: int = 4, drop_rate: float = 0.0):
        super().__init__()
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Sequential(
            conv3x3(3, width, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv3x3(width, width)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TimmBlock(width, width), TimmBlock(width, width))
        self.layer2 = nn.Sequential(TimmBlock(width, 2 * width, 2))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, 5)

    def forward_features(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            raise NotImplementedError
        return self.layer2(self.layer1(x))

    def forward_head(self, x, pre_logits: bool = False):
        x = self.global_pool(x).flatten(1)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class ConvNormActivation(nn.Sequential):
    """A Sequential's subclass without a forward of its own, as MobileNets are built of."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, groups: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        self.out_channels = out_channels


class InvertedResidual(nn.Module):
    """Linear bottleneck: the residual is added to the norm's output, and no activation follows."""

    def __init__(self, channels: int):
        super().__init__()
        self.use_res_connect = True
        self.conv = nn.Sequential(
            ConvNormActivation(channels, 2 * channels, 1),
            ConvNormActivation(2 * channels, 2 * channels, groups=2 * channels),
            nn.Conv2d(2 * channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNet(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.features = nn.Sequential(ConvNormActivation(3, width), InvertedResidual(width), InvertedResidual(width))
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 5))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.mean([2, 3]))


class PreActivationBlock(nn.Module):
    """Norm and activation before each convolution; the input is read twice."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x):
        out = self.conv1(torch.relu(self.bn1(x)))
        out = self.conv2(self.bn2(out).relu_())
        return torch.add(out, x)


class PreActivationNet(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.conv = conv3x3(3, width)
        self.block1 = PreActivationBlock(width)
        self.block2 = PreActivationBlock(width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        x = self.block2(self.block1(self.conv(x)))
        return F.relu(self.bn(x), inplace=True).flatten(1)


class Generator(nn.Module):
    """A DCGAN generator and an activation before its norm."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.project = nn.Linear(6, width * 16, bias=False)
        self.norm0 = nn.BatchNorm1d(width * 16)
        self.up1 = nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        x = F.leaky_relu(self.norm0(self.project(z)), 0.2)
        x = x.view(x.shape[0], -1, 4, 4)
        x = F.leaky_relu_(self.norm1(self.up1(x)), 0.2)
        x = self.norm2(torch.relu(self.conv(x)))
        return torch.tanh(self.out(x))
