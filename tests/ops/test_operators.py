"""What torch asks of an operator: schema, fake kernels, autograd, torch.compile, torch.export."""

from __future__ import annotations

import pytest
import torch

from ganvas.ops import batch_norm_leaky_relu, discriminator_loss, generator_loss

OPS = torch.ops.ganvas


def image(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


SAMPLES = {
    "batch_norm_leaky_relu_train": [
        (image(4, 6, 3, 3), torch.rand(6), None, 1e-5, 0.2, False, 2),
        (torch.randn(5, 7), None, torch.rand(7), 1e-5, 0.2, True, 1),
        (torch.randn(4, 6, 3, 3).to(torch.bfloat16), None, None, 1e-5, 0.0, False, 1),
    ],
    "batch_norm_leaky_relu_eval": [
        (image(4, 6, 3, 3), torch.rand(6), None, torch.randn(6), torch.rand(6), 1e-5, 0.2, False)
    ],
    "batch_norm_leaky_relu_backward": [
        (
            image(4, 6, 3, 3), image(4, 6, 3, 3), torch.rand(6), None, torch.randn(2, 6), torch.rand(2, 6),
            True, 1e-5, 0.2, False, 2,
        )
    ],
    "batch_norm_add_leaky_relu_train": [
        (image(4, 6, 3, 3), torch.rand(6), None, image(4, 6, 3, 3), 1e-5, 0.2, 2),
        (torch.randn(5, 7), None, torch.rand(7), torch.randn(5, 7), 1e-5, 1.0, 1),
        (image(4, 6, 3, 3).bfloat16(), None, None, torch.randn(4, 6, 3, 3).bfloat16(), 1e-5, 0.0, 1),
    ],
    "batch_norm_add_leaky_relu_eval": [
        (image(4, 6, 3, 3), torch.rand(6), None, image(4, 6, 3, 3), torch.randn(6), torch.rand(6), 1e-5, 0.2)
    ],
    "batch_norm_add_leaky_relu_backward": [
        (
            image(4, 6, 3, 3), image(4, 6, 3, 3), image(4, 6, 3, 3), torch.rand(6), None, torch.randn(2, 6),
            torch.rand(2, 6), True, 1e-5, 0.2, 2,
        )
    ],
    "discriminator_loss": [
        (torch.randn(4), torch.randn(5), "bce", 0.1),
        (torch.randn(4), torch.randn(4), "relativistic", 0.0),
    ],
    "generator_loss": [(torch.randn(4), None, "hinge"), (torch.randn(4), torch.randn(4), "relativistic")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), [(name, args) for name, many in SAMPLES.items() for args in many])
def test_opcheck(name, arguments):
    # The autograd formula stands outside the operator, so that it costs nothing in eager mode.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["conv_bn_act", "conv_act_bn"])
def test_compiled_step_equals_the_eager_one(training, order):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, weight, bias = image(4, 6, 5, 5), torch.rand(6), torch.randn(6)

    def step(x, weight, bias, mean, var):
        return batch_norm_leaky_relu(
            x * 2, weight, bias, mean, var, training=training, order=order, statistics_groups=2 if training else 1,
            backend="cpu",
        ).square().mean()  # fmt: skip

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        inputs = [value.clone().requires_grad_() for value in (x, weight, bias)]
        running = torch.zeros(6), torch.ones(6)
        loss = function(*inputs, *running)
        loss.backward()
        results.append([loss.detach(), *(value.grad for value in inputs), *running])
    torch.testing.assert_close(*results)


def test_compiled_losses_equal_the_eager_ones():
    torch._dynamo.reset()

    def step(real, fake):
        loss, metrics = discriminator_loss(real, fake, "hinge", return_metrics=True, backend="cpu")
        return loss + generator_loss(fake, backend="cpu"), metrics.real_accuracy

    results = []
    real, fake = torch.randn(16), torch.randn(16)
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = real.clone().requires_grad_(), fake.clone().requires_grad_()
        loss, accuracy = function(*leaves)
        loss.backward()
        results.append([loss.detach(), accuracy, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


def test_exported_program_holds_the_operator():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = torch.nn.BatchNorm2d(6)

        def forward(self, x):
            bn = self.bn
            return batch_norm_leaky_relu(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, backend="cpu")

    net, x = Net().eval(), image(2, 6, 4, 4)
    program = torch.export.export(net, (x,))
    assert any("ganvas.batch_norm_leaky_relu_eval" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), net(x))
