"""Feature extractors: frozen, identified by their weights, and refused when what they return is no feature matrix."""

import copy
import hashlib
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

from ganvas.metrics import ClassifierFeatures, FeatureExtractor, fingerprint


def small_cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_fingerprint_is_short_hexadecimal_and_equal_for_equal_weights():
    name = fingerprint(small_cnn())
    assert len(name) == 6
    assert int(name, 16) >= 0
    assert name == fingerprint(small_cnn()) == fingerprint(copy.deepcopy(small_cnn()))
    assert name != fingerprint(small_cnn(seed=1))


def test_fingerprint_is_the_same_in_every_process_and_release():
    # Python's own hash() differs between processes. The bytes are spelled out: names in old logs must stay comparable.
    code = "import torch; from ganvas.metrics import fingerprint; m = torch.nn.Linear(2, 1); \
m.load_state_dict({'weight': torch.tensor([[1.0, 2.0]]), 'bias': torch.tensor([3.0])}); print(fingerprint(m, 64))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    hashed = (
        b"bias:torch.float32:(1,);" + struct.pack("<f", 3) + b"weight:torch.float32:(1, 2);" + struct.pack("<2f", 1, 2)
    )
    assert printed == hashlib.sha256(hashed).hexdigest()


def test_fingerprint_changes_with_the_last_bit_of_one_weight_and_with_a_running_statistic():
    module = small_cnn()
    before = fingerprint(module)
    with torch.no_grad():
        weight = module[0].weight.view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    after_weight = fingerprint(module)
    module[1].running_mean[0] += 1
    assert len({before, after_weight, fingerprint(module)}) == 3


def test_fingerprint_ignores_memory_format_gradients_and_mode():
    module = small_cnn()
    before = fingerprint(module)
    module.to(memory_format=torch.channels_last).requires_grad_(False).eval()
    assert fingerprint(module) == before


def test_fingerprint_tells_dtypes_apart():
    assert fingerprint(nn.Linear(2, 2).bfloat16()) != fingerprint(nn.Linear(2, 2).half())


def test_fingerprint_refuses_state_that_is_no_tensor():
    class WithExtraState(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

    with pytest.raises(TypeError, match="_extra_state"):
        fingerprint(WithExtraState(1, 1))


def test_extractor_keeps_its_identity_and_features_when_the_original_is_trained_further():
    module, images = small_cnn(), torch.randn(3, 1, 8, 8)
    extractor = FeatureExtractor(module, "digits-cnn")
    before = extractor(images)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert extractor.identity == f"digits-cnn@{fingerprint(small_cnn())}"
    assert torch.equal(extractor(images), before)


def test_extractor_uses_running_statistics_without_touching_the_original_mode():
    module, images = small_cnn(), torch.randn(4, 1, 8, 8)
    features = FeatureExtractor(module, "x")(images)
    assert module.training
    assert module[1].num_batches_tracked == 0
    assert torch.equal(features, module.eval()(images))
    assert not features.requires_grad


def test_features_do_not_depend_on_the_surrounding_autocast():
    extractor, images = FeatureExtractor(small_cnn(), "x"), torch.randn(4, 1, 8, 8)
    expected = extractor(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images), expected)


def test_extract_concatenates_batches():
    extractor, images = FeatureExtractor(nn.Flatten(), "pixels"), torch.randn(7, 1, 2, 2)
    assert torch.equal(extractor.extract(images.split(3)), images.flatten(1))
    with pytest.raises(ValueError, match="no images"):
        extractor.extract([])


def test_classifier_features_are_the_classifiers_own():
    class Classifier(nn.Module):
        def features(self, images):
            return images.flatten(1) * 2

        def forward(self, images):
            return self.features(images)[:, :1]

    images = torch.randn(2, 1, 2, 2)
    assert torch.equal(ClassifierFeatures(Classifier())(images), images.flatten(1) * 2)
    with pytest.raises(TypeError, match=r"method features\(images\).*Linear has none"):
        ClassifierFeatures(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 8, 8), "at least one image"),
        (torch.zeros(1, 8, 8), r"\(N, C, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.full((1, 1, 8, 8), torch.nan), "1 of 1 samples hold NaN"),
    ],
)
def test_images_that_are_none_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(small_cnn(), "x")(images)


def test_features_that_are_no_matrix_with_a_row_per_image_are_refused():
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"shape \(N, D\)"):
        FeatureExtractor(nn.Identity(), "x")(images)
    with pytest.raises(ValueError, match="one row per image, got 16 rows for 2 images"):
        FeatureExtractor(nn.Flatten(0, 2), "x")(images)


def test_extractor_must_be_a_named_module():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        FeatureExtractor(lambda images: images.flatten(1), "x")
    with pytest.raises(ValueError, match="name"):
        FeatureExtractor(nn.Flatten(), "")
