"""The GAN recipe: its steps are those of a plain loop, and the best generator is what is kept."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from tiny_training_jobs import CLASSES, run_gan, tiny_data
from torch import nn
from torch.nn import functional as F
from training_helpers import results

from ganvas import models
from ganvas.data import BatchLoader
from ganvas.training.gan_steps import AveragedGenerator, discriminate_pair, frozen
from ganvas.training.metrics_log import read_metrics
from ganvas.training.run_folder import RunFolder


def networks(num_classes=4):
    torch.manual_seed(0)
    return models.create("dcgan", size=16, channels=1, num_classes=num_classes, width=4, latent_size=8)


class Plain(nn.Module):
    """The same network with every FusedSequential replaced by a torch.nn.Sequential: nothing of ganvas runs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.network.body = nn.Sequential(*self.network.body.children())

    def forward(self, *inputs):
        return self.network(*inputs)


def plain_loop(generator, discriminator, epochs, seed=0):
    """The loop of the PyTorch DCGAN tutorial, with labels, written out; returns the losses of each step."""
    generator, discriminator = Plain(generator).train(), Plain(discriminator).train()
    generator_optimizer = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.999))
    noise = torch.Generator().manual_seed(seed)
    loader = BatchLoader(tiny_data("train"), 16, seed=seed, drop_last=True)
    losses = []
    for epoch in range(epochs):
        for real, labels in loader.epoch(epoch):
            fake = generator(torch.randn(len(real), 8, generator=noise), labels)
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
            discriminator_optimizer.zero_grad()
            real_loss = F.binary_cross_entropy_with_logits(discriminator(real, labels), ones)
            fake_loss = F.binary_cross_entropy_with_logits(discriminator(fake.detach(), labels), zeros)
            discriminator_loss = real_loss + fake_loss
            discriminator_loss.backward()
            discriminator_optimizer.step()
            generator_optimizer.zero_grad()
            generator_loss = F.binary_cross_entropy_with_logits(discriminator(fake, labels), ones)
            generator_loss.backward()
            generator_optimizer.step()
            losses.append((discriminator_loss.item(), generator_loss.item()))
    return losses, generator.network, discriminator.network


def test_losses_and_weights_agree_with_a_plain_torch_loop(tmp_path):
    generator, discriminator = networks()
    losses, plain_generator, plain_discriminator = plain_loop(generator, discriminator, epochs=3)
    run_gan(
        tmp_path / "run",
        networks=(generator, discriminator),
        bf16=False,
        log_every=1,
        discriminator_steps=1,
        r1_gamma=0.0,
        generator_learning_rate=2e-4,
        discriminator_learning_rate=2e-4,
    )
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/generator_loss" in line]
    ours = [(line["train/discriminator_loss"], line["train/generator_loss"]) for line in lines]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for trained, plain in ((generator, plain_generator), (discriminator, plain_discriminator)):
        for name, value in trained.state_dict().items():
            # Adam divides by the root of the squared gradient: where that is 0 but for rounding (a bias before a
            # BatchNorm), a step of the learning rate's size can go either way.
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("labelled", [True, False])
def test_one_forward_with_two_statistics_groups_equals_two_forwards(labelled):
    _, grouped = networks(4 if labelled else None)
    separate = copy.deepcopy(grouped)
    real, fake = torch.randn(2, 8, 1, 16, 16)
    labels = torch.arange(8) % 4 if labelled else None
    arguments = () if labels is None else (labels,)
    ours = discriminate_pair(grouped, real, fake, labels)
    theirs = separate(real, *arguments), separate(fake, *arguments)
    for logits, expected in zip(ours, theirs):
        torch.testing.assert_close(logits, expected)
    (ours[0].sum() - ours[1].square().sum()).backward()
    (theirs[0].sum() - theirs[1].square().sum()).backward()
    for (name, parameter), expected in zip(grouped.named_parameters(), separate.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    for name, buffer in grouped.named_buffers():
        torch.testing.assert_close(buffer, dict(separate.named_buffers())[name], msg=name)


def test_discriminator_that_cannot_keep_groups_apart_is_called_twice():
    calls = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)  # outside of a FusedSequential

        def forward(self, images):
            calls.append(len(images))
            return self.norm(images).mean(dim=(1, 2, 3))

    discriminate_pair(Recording(), torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), None)
    assert calls == [4, 4]


def test_generator_step_computes_no_gradient_for_the_discriminator():
    generator, discriminator = networks()
    with frozen(discriminator):
        discriminator(generator(torch.randn(4, 8), torch.arange(4)), torch.arange(4)).sum().backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad is not None for parameter in generator.parameters())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_average_includes_the_batch_norm_statistics():
    generator, _ = networks()
    averaged = AveragedGenerator(generator, decay=0.5)
    averaged.update_parameters(generator)
    norm = next(module for module in generator.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    norm.running_mean.add_(1.0)
    averaged.update_parameters(generator)
    average = next(module for module in averaged.modules() if isinstance(module, nn.BatchNorm2d)).running_mean
    # The second update: decay min(0.5, 2 / 11).
    torch.testing.assert_close(average, before + 1 - 2 / 11)


def test_average_of_a_short_run_forgets_the_initial_weights():
    generator = nn.Linear(1, 1, bias=False)
    averaged = AveragedGenerator(generator, decay=0.999)
    with torch.no_grad():
        for step in range(100):
            generator.weight.fill_(0.0 if step == 0 else 1.0)
            averaged.update_parameters(generator)
    assert averaged.module.weight.item() > 0.99


def test_kept_generator_is_the_one_with_the_smallest_distance(undisturbed):
    folder = undisturbed("gan")
    lines = read_metrics(folder / "metrics.jsonl")
    name = next(name for line in lines for name in line if name.startswith("FD["))
    distances = {line["step"]: line[name] for line in lines if name in line and "event" not in line}
    with safetensors.safe_open(folder / "generator.safetensors", "pt") as file:
        metadata = file.metadata()
    assert distances[int(metadata["step"])] == min(distances.values())
    assert float(metadata["frechet_distance"]) == min(distances.values())
    assert lines[-1][name] == min(distances.values())


def test_metrics_have_the_names_of_the_contract(undisturbed):
    lines = read_metrics(undisturbed("gan") / "metrics.jsonl")
    names = {name for line in lines for name in line}
    assert {"train/discriminator_loss", "train/generator_loss", "test/precision", "test/recall", "test/cas"} <= names
    assert any(name.startswith("FD[tiny-cnn@") for name in names)
    assert all({"step", "epoch"} <= line.keys() for line in lines)


def test_run_folder_holds_what_the_contract_says(undisturbed):
    folder = undisturbed("gan")
    for name in ("config.json", "metrics.jsonl", "checkpoint", "report.html", "samples/epoch-0003.png",
                 "samples/best.png", "generator.safetensors", "generator_last.safetensors",
                 "discriminator.safetensors", "extractor.safetensors"):  # fmt: skip
        assert (folder / name).exists(), name
    description = json.loads((folder / "config.json").read_bytes())
    assert description["data"]["class_names"] == list(CLASSES)
    assert description["config"]["size"] == 16


@pytest.mark.parametrize("loss", ["non_saturating", "lsgan", "hinge", "wgan", "relativistic"])
def test_every_loss_trains(loss, tmp_path):
    run_gan(tmp_path / "run", loss=loss, epochs=1, gradient_clip=1.0)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["event"] == "finished"


def test_unconditional_gan_of_one_class_is_measured_by_an_autoencoder(tmp_path):
    from ganvas.data import InMemoryDataset
    from ganvas.training import GANConfig, SilentProgress, train_gan

    def faces(split):
        images = tiny_data(split).images
        return InMemoryDataset(
            name="faces", split=split, class_names=("face",), channels=1, size=16,
            labels=torch.zeros(len(images), dtype=torch.int64), images=images,
        )  # fmt: skip

    config = GANConfig(
        data="faces", out=tmp_path / "run", conditional=False, width=4, latent_size=8, epochs=1, batch_size=16,
        evaluation_samples=32, extractor_epochs=1, samples=9, threads=1,
    )  # fmt: skip
    train_gan(config, train_data=faces("train"), test_data=faces("test"), progress=SilentProgress())
    names = {name for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for name in line}
    assert any(name.startswith("FD[faces-autoencoder@") for name in names)
    assert "test/cas" not in names


def test_bf16_autocast_trains_and_keeps_float32_parameters(tmp_path):
    run_gan(tmp_path / "run", bf16=True, epochs=1)
    weights = {name: value for name, value in results(tmp_path / "run").items() if name.startswith("generator")}
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())
    assert RunFolder(tmp_path / "run").read_description()["config"]["bf16"] is True
