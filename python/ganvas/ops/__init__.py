"""Fused operations: tensors in, tensors out, gradients of every order.

Each public function here checks its arguments, chooses a backend (:mod:`ganvas.ops.selection`) and runs it. The
specification of every operation is its plain-torch twin in :mod:`ganvas.ops.backends.reference`.
"""

import ganvas.ops.steps_on_gpu  # noqa: F401  # tells selection how to measure
from ganvas.ops import tuning
from ganvas.ops.batch_norm_leaky_relu import batch_norm_leaky_relu
from ganvas.ops.conv_bn_leaky_relu import conv_bn_leaky_relu
from ganvas.ops.gan_loss import DiscriminatorMetrics, discriminator_loss, generator_loss
from ganvas.ops.linear import linear
from ganvas.ops.memory import release_memory
from ganvas.ops.precision import prefers_bfloat16
from ganvas.ops.selection import available_backends, explain

__all__ = [
    "DiscriminatorMetrics",
    "available_backends",
    "batch_norm_leaky_relu",
    "conv_bn_leaky_relu",
    "discriminator_loss",
    "explain",
    "generator_loss",
    "linear",
    "prefers_bfloat16",
    "release_memory",
    "tuning",
]
