"""The specification: every op in plain, differentiable torch. Runs on any device, dtype and layout."""

from ganvas.ops.backends.reference.batch_norm_leaky_relu import batch_norm_leaky_relu
from ganvas.ops.backends.reference.gan_loss import discriminator_loss, discriminator_metrics, generator_loss

__all__ = ["batch_norm_leaky_relu", "discriminator_loss", "discriminator_metrics", "generator_loss"]
