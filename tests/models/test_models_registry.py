"""The registry: what it lists, how it describes, how it refuses."""

from __future__ import annotations

import pytest
from torch import nn

from ganvas import models
from ganvas.models import registry


@pytest.fixture
def entries(monkeypatch):
    """A copy of the table, so that registrations of a test end with it."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_every_kind_lists_its_networks():
    assert set(models.names("classifier")) == {
        "mlp",
        "cnn_32_64",
        "cnn_32_64_128",
        "cnn_32_64_128_dropout",
        "fast_cnn",
        "resnet",
    }
    assert set(models.names("gan")) == {"mlp_conv_gan", "dcgan"}
    assert set(models.names("autoencoder")) == {"conv_autoencoder"}


def test_all_names_are_those_of_the_kinds_in_turn():
    assert models.names() == tuple(name for kind in models.KINDS for name in models.names(kind))


def test_kind_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"one of classifier, gan, autoencoder, got 'transformer'"):
        models.names("transformer")


@pytest.mark.parametrize("name", models.names())
def test_description_is_one_line_with_kind_and_every_default(name):
    line = models.describe(name)
    assert "\n" not in line
    assert line.startswith(models.kind(name) + ": ")
    assert all(f"{option}={value!r}" in line for option, value in models.defaults(name).items())


@pytest.mark.parametrize("ask", [models.create, models.kind, models.describe, models.defaults])
def test_unknown_name_lists_the_known_ones_and_suggests_the_closest(ask):
    with pytest.raises(ValueError, match=r"'resnt' \(did you mean 'resnet'\?\); there are .*dcgan.*mlp"):
        ask("resnt")


def test_unknown_option_lists_the_known_ones_and_suggests_the_closest():
    message = r"dcgan has no option 'chanels' \(did you mean 'channels'\?\); there are size, channels, num_classes"
    with pytest.raises(ValueError, match=message):
        models.create("dcgan", chanels=1)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True])
@pytest.mark.parametrize("name", models.names())
def test_channels_must_be_a_positive_integer(name, value):
    with pytest.raises(ValueError, match=r"channels must be an integer of at least 1, got"):
        models.create(name, channels=value)


@pytest.mark.parametrize("name", ["dcgan", "mlp_conv_gan", "conv_autoencoder"])
def test_latent_size_must_be_positive(name):
    with pytest.raises(ValueError, match=r"latent_size must be an integer of at least 1, got 0"):
        models.create(name, latent_size=0)


@pytest.mark.parametrize("name", ["dcgan", "conv_autoencoder", "resnet"])
def test_width_must_be_positive(name):
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1, got -4"):
        models.create(name, width=-4)


@pytest.mark.parametrize("name", [*models.names("classifier"), *models.names("gan")])
def test_one_class_is_too_few(name):
    with pytest.raises(ValueError, match=r"num_classes must be an integer of at least 2, got 1"):
        models.create(name, num_classes=1)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("mlp", 0, "at least 1, got 0"),
        ("cnn_32_64", 3, "at least 4, got 3"),
        ("cnn_32_64_128", 7, "at least 8, got 7"),
        ("resnet", 7, "at least 8, got 7"),
        ("dcgan", 48, "one of 16, 32, 64, 128 for dcgan, got 48"),
        ("dcgan", 8, "one of 16, 32, 64, 128 for dcgan, got 8"),
        ("dcgan", 32.0, "one of 16, 32, 64, 128 for dcgan, got 32.0"),
        ("mlp_conv_gan", 32, "28 for mlp_conv_gan, got 32"),
        ("conv_autoencoder", 30, "multiple of 4 and at least 8 for conv_autoencoder, got 30"),
        ("conv_autoencoder", 4, "multiple of 4 and at least 8 for conv_autoencoder, got 4"),
    ],
)
def test_size_a_network_cannot_take_is_refused_with_what_it_can(name, size, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, size=size)


@pytest.mark.parametrize("dropout", [1.0, -0.1, "0.2", True])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\), got"):
        models.create("cnn_32_64_128_dropout", dropout=dropout)


def test_registered_builder_can_be_created_with_its_options(entries):
    @models.register("linear", kind="classifier")
    def linear(inputs: int = 2) -> nn.Module:
        """One layer."""
        return nn.Linear(inputs, 1)

    assert "linear" in models.names("classifier")
    assert models.describe("linear") == "classifier: One layer (inputs=2)"
    assert models.create("linear", inputs=5).in_features == 5


def test_name_can_be_registered_once(entries):
    with pytest.raises(ValueError, match="'mlp' is registered already"):
        models.register("mlp", kind="classifier")(lambda: None)


def test_registration_needs_a_known_kind(entries):
    with pytest.raises(ValueError, match="one of classifier, gan, autoencoder, got 'vae'"):
        models.register("new", kind="vae")(lambda: None)


def test_registration_needs_a_default_for_every_option(entries):
    def builder(size, channels=3):
        """Something."""

    with pytest.raises(ValueError, match="options of 'new' need a default, there is none for size"):
        models.register("new", kind="gan")(builder)


def test_registration_needs_a_description(entries):
    with pytest.raises(ValueError, match="needs a docstring"):
        models.register("new", kind="gan")(lambda size=1: None)
    assert "new" not in models.names()
