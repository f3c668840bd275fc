"""pytest-benchmark suites over the same work as compare.py: `pytest benchmarks --benchmark-group-by=group`.

For comparisons between commits (`--benchmark-autosave`, `--benchmark-compare`). Ratios against torch are compare.py's
business, which interleaves the candidates.
"""

from __future__ import annotations

import pytest
import torch

import workloads
from ganvas.ops.gan_loss import KINDS
from shapes import ACTIVATIONS, LOGITS

DTYPES = [torch.float32, torch.bfloat16]
CANDIDATES = ["eager", "ganvas"]


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("part", ["forward", "step"])
def test_batch_norm_leaky_relu(benchmark, shape, dtype, part, candidate):
    work = workloads.batch_norm_leaky_relu(shape, dtype, compiled=False)
    benchmark.group = f"batch_norm_leaky_relu {part} {work.name} {dtype}"
    benchmark(getattr(work, part)[candidate])


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", LOGITS)
def test_discriminator_loss(benchmark, count, kind, candidate):
    work = workloads.discriminator_loss(count, kind, torch.float32, compiled=False)
    benchmark.group = f"discriminator_loss {work.name}"
    benchmark(work.step[candidate])


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model", "batch"), [("cnn_32_64", 128), ("resnet", 128), ("mlp_conv_gan", 32), ("dcgan", 16)])
def test_training_step(benchmark, model, batch, dtype, candidate):
    work = workloads.training_step(model, batch, dtype, compiled=False)
    benchmark.group = f"step {work.name} {dtype}"
    benchmark.pedantic(work.step[candidate], rounds=5, warmup_rounds=1)
