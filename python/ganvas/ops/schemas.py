"""Every operator's schema and its shapes. Backends register the kernels.

``define`` and ``impl`` rather than ``torch.library.custom_op``: the latter costs 10–25 µs a call. Autograd stands
beside each public function, as an ``autograd.Function`` around these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas.ops.layers import decode, decode_adds, hands_on_written, residual_layer

library = torch.library.Library("ganvas", "DEF")

# Statistics: (statistics_groups, C) float32; var is the biased variance.
library.define(
    "batch_norm_leaky_relu_train(Tensor input, Tensor? weight, Tensor? bias, float eps, float negative_slope, "
    "bool activation_first, int statistics_groups) -> (Tensor output, Tensor mean, Tensor var)"
)
library.define(
    "batch_norm_leaky_relu_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "float negative_slope, bool activation_first) -> Tensor output"
)
# training=False: mean and var are fixed (C,) numbers through which no gradient flows.
library.define(
    "batch_norm_leaky_relu_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, bool training, float eps, float negative_slope, bool activation_first, int statistics_groups) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
# lrelu(BN(input) + residual), order conv_bn_act; residual like input.
library.define(
    "batch_norm_add_leaky_relu_train(Tensor input, Tensor? weight, Tensor? bias, Tensor residual, float eps, "
    "float negative_slope, int statistics_groups) -> (Tensor output, Tensor mean, Tensor var)"
)
library.define(
    "batch_norm_add_leaky_relu_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor residual, Tensor mean, "
    "Tensor var, float eps, float negative_slope) -> Tensor output"
)
# The output's sign tells the side of the kink, hence negative_slope >= 0.
library.define(
    "batch_norm_add_leaky_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor var, bool training, float eps, float negative_slope, int statistics_groups) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)
# Layers as ganvas.ops.layers.encode makes them; input and output in the dtype that is computed in. moments, float32: of
# one layer after the other mean, var, scale and shift, (4, statistics_groups, C). stored, empty unless keep: what
# backward reads besides, of each layer the convolution's raw output (unless that is the output), the activation that it
# hands on written, pooled or to be added (unless that is the output), and where it pools uint8 winners.
library.define(
    "conv_bn_leaky_relu_chain(Tensor input, Tensor? residual, Tensor[] parameters, Tensor[] statistics, "
    "int[] integers, float[] reals, int statistics_groups, bool keep) "
    "-> (Tensor output, Tensor moments, Tensor[] stored)"
)
# Gradients of the input, the residual (where there is one) and the parameters, those that are wanted. output tells the
# side of the last kink where the last layer adds something.
library.define(
    "conv_bn_leaky_relu_chain_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor[] parameters, "
    "Tensor moments, Tensor[] stored, int[] integers, float[] reals, bool residual, bool wants_input, "
    "bool[] wanted) -> Tensor[] gradients"
)
# input·weightᵀ + bias of matrices in float32; gradients of the input and the weight, those that are wanted.
library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor output")
library.define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, bool wants_input, bool wants_weight) "
    "-> Tensor[] gradients"
)
# metrics: (4,) float32: mean real logit, mean fake logit, share of real logits > 0, share of fake logits < 0.
library.define(
    "discriminator_loss(Tensor real_logits, Tensor fake_logits, str kind, float label_smoothing) "
    "-> (Tensor loss, Tensor grad_real, Tensor grad_fake, Tensor metrics)"
)
# grad_real is empty where kind does not compare with real logits.
library.define(
    "generator_loss(Tensor fake_logits, Tensor? real_logits, str kind) "
    "-> (Tensor loss, Tensor grad_fake, Tensor grad_real)"
)

ops = torch.ops.ganvas


def _native_like(x: Tensor) -> Tensor:
    memory_format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format)


@torch.library.register_fake("ganvas::batch_norm_leaky_relu_train", lib=library)
def _(input, weight, bias, eps, negative_slope, activation_first, statistics_groups):
    statistics = input.new_empty((statistics_groups, input.shape[1]), dtype=torch.float32)
    return _native_like(input), statistics, torch.empty_like(statistics)


@torch.library.register_fake("ganvas::batch_norm_leaky_relu_eval", lib=library)
def _(input, weight, bias, mean, var, eps, negative_slope, activation_first):
    return _native_like(input)


@torch.library.register_fake("ganvas::batch_norm_leaky_relu_backward", lib=library)
def _(grad_output, input, weight, bias, mean, var, training, eps, negative_slope, activation_first, statistics_groups):
    grad_weight = input.new_empty((input.shape[1],), dtype=torch.float32)
    return _native_like(input), grad_weight, torch.empty_like(grad_weight)


@torch.library.register_fake("ganvas::batch_norm_add_leaky_relu_train", lib=library)
def _(input, weight, bias, residual, eps, negative_slope, statistics_groups):
    statistics = input.new_empty((statistics_groups, input.shape[1]), dtype=torch.float32)
    return _native_like(input), statistics, torch.empty_like(statistics)


@torch.library.register_fake("ganvas::batch_norm_add_leaky_relu_eval", lib=library)
def _(input, weight, bias, residual, mean, var, eps, negative_slope):
    return _native_like(input)


@torch.library.register_fake("ganvas::batch_norm_add_leaky_relu_backward", lib=library)
def _(grad_output, output, input, weight, bias, mean, var, training, eps, negative_slope, statistics_groups):
    grad_weight = input.new_empty((input.shape[1],), dtype=torch.float32)
    return _native_like(input), grad_weight, torch.empty_like(grad_weight), _native_like(input)


def _empty_pixels(shape: torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


@torch.library.register_fake("ganvas::conv_bn_leaky_relu_chain", lib=library)
def _(input, residual, parameters, statistics, integers, reals, statistics_groups, keep):
    layers, adds, shape = decode(parameters, None, integers, reals), decode_adds(integers), input.shape
    stored = []
    for i, layer in enumerate(layers):
        convolved, shape, is_last = layer.convolved_shape(shape), layer.output_shape(shape), layer is layers[-1]
        if keep and not (is_last and layer.is_bare):
            stored.append(_empty_pixels(convolved, input))
        if keep and not is_last and hands_on_written(layers, adds, i):
            stored.append(_empty_pixels(shape, input))
        if keep and layer.max_pool:
            stored.append(_empty_pixels(shape, input, torch.uint8))
    channels = sum(layer.out_channels for layer in layers)
    moments = input.new_empty((4 * statistics_groups * channels,), dtype=torch.float32)
    return _empty_pixels(shape, input), moments, stored


@torch.library.register_fake("ganvas::conv_bn_leaky_relu_chain_backward", lib=library)
def _(grad_output, input, output, parameters, moments, stored, integers, reals, residual, wants_input, wanted):
    gradients = [_empty_pixels(input.shape, input)] if wants_input else []
    if residual:
        shape, at = input.shape, residual_layer(decode_adds(integers))
        for i, layer in enumerate(decode(parameters, None, integers, reals)[: at + 1]):
            shape = layer.convolved_shape(shape) if i == at else layer.output_shape(shape)
        gradients.append(_empty_pixels(shape, input))
    return [*gradients, *(torch.empty_like(p) for p, want in zip(parameters, wanted) if want)]


@torch.library.register_fake("ganvas::linear", lib=library)
def _(input, weight, bias):
    return input.new_empty((input.shape[0], weight.shape[0]))


@torch.library.register_fake("ganvas::linear_backward", lib=library)
def _(grad_output, input, weight, wants_input, wants_weight):
    gradients = ((input, wants_input), (weight, wants_weight))
    return [torch.empty_like(of, memory_format=torch.contiguous_format) for of, wants in gradients if wants]


@torch.library.register_fake("ganvas::discriminator_loss", lib=library)
def _(real_logits, fake_logits, kind, label_smoothing):
    return (
        real_logits.new_empty(()),
        torch.empty_like(real_logits, memory_format=torch.contiguous_format),
        torch.empty_like(fake_logits, memory_format=torch.contiguous_format),
        real_logits.new_empty((4,), dtype=torch.float32),
    )


@torch.library.register_fake("ganvas::generator_loss", lib=library)
def _(fake_logits, real_logits, kind):
    grad_fake = torch.empty_like(fake_logits, memory_format=torch.contiguous_format)
    return (
        fake_logits.new_empty(()),
        grad_fake,
        torch.empty_like(grad_fake) if real_logits is not None else fake_logits.new_empty((0,)),
    )
