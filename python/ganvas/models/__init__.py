"""Networks by name: ``create("resnet", num_classes=10)``, ``create("dcgan", size=32, channels=1)``.

Classifiers and autoencoders are one module, a GAN is a pair ``(generator, discriminator)``. Images are floats
(N, C, H, W) in [-1, 1], square, of the size and the channels the network was made for.
"""

# Imported for their registrations.
from ganvas.models import autoencoder, classifiers, dcgan, fast_cnn, mlp_conv_gan, resnet  # noqa: F401
from ganvas.models.registry import KINDS, create, defaults, describe, kind, names, register

__all__ = ["KINDS", "create", "defaults", "describe", "kind", "names", "register"]
