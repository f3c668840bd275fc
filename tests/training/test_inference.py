"""A finished run can be loaded from its folder alone and used."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_training_jobs import run_classifier, run_gan, tiny_data
from torch.utils.data import Dataset
from training_helpers import results

from ganvas.training import (
    ClassifierConfig,
    GANConfig,
    RunFolderError,
    SilentProgress,
    evaluate,
    load_run,
    predict,
    sample,
    train_classifier,
    train_gan,
)
from ganvas.training.metrics_log import read_metrics


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    config = ClassifierConfig(
        data="tiny", out=tmp_path_factory.mktemp("run") / "c", model="cnn_32_64", epochs=4, batch_size=16, threads=1
    )
    return train_classifier(
        config, train_data=tiny_data("train"), test_data=tiny_data("test"), progress=SilentProgress()
    )


@pytest.fixture(scope="module")
def gan_folder(tmp_path_factory):
    config = GANConfig(
        data="tiny", out=tmp_path_factory.mktemp("run") / "g", width=4, latent_size=8, epochs=1, batch_size=16,
        evaluation_samples=32, cas_samples=16, extractor_epochs=1, samples=8, threads=1,
    )  # fmt: skip
    return train_gan(config, train_data=tiny_data("train"), test_data=tiny_data("test"), progress=SilentProgress())


@pytest.fixture
def image_files(tmp_path):
    paths = []
    for index, (image, _) in zip(range(4), tiny_data("test")):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image[0].numpy()).save(paths[-1])
    return paths


def test_prediction_names_the_class_and_its_probability(classifier_folder, image_files):
    predictions = predict(load_run(classifier_folder), image_files)
    assert [prediction.class_name for prediction in predictions] == ["left", "right", "top", "bottom"]
    assert [prediction.path for prediction in predictions] == image_files
    assert all(0.25 < prediction.probability <= 1 for prediction in predictions)


def test_prediction_resizes_and_converts_as_training_did(classifier_folder, tmp_path):
    half = Image.new("RGB", (64, 64))
    half.paste((255, 255, 255), (0, 32, 64, 64))
    half.save(tmp_path / "large.png")
    (prediction,) = predict(load_run(classifier_folder), [tmp_path / "large.png"])
    assert prediction.class_name == "bottom"


def test_unreadable_image_is_named(classifier_folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        predict(load_run(classifier_folder), [tmp_path / "broken.png"])


def test_evaluation_repeats_the_best_accuracy_of_the_log(classifier_folder):
    logged = read_metrics(classifier_folder / "metrics.jsonl")[-1]["test/best_accuracy"]
    run = load_run(classifier_folder)
    assert evaluate(run, train_data=tiny_data("train"), test_data=tiny_data("test")) == {"test/accuracy": logged}


def test_evaluation_of_a_gan_repeats_the_final_numbers_of_the_log(gan_folder):
    logged = read_metrics(gan_folder / "metrics.jsonl")[-1]
    run = load_run(gan_folder)
    measured = evaluate(run, train_data=tiny_data("train"), test_data=tiny_data("test"))
    for name in set(measured) - {"extractor/accuracy"}:
        assert measured[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


def test_evaluation_on_other_classes_is_refused(classifier_folder):
    class Other(Dataset):
        classes = ("a", "b")
        targets = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.zeros(1, 16, 16), index

    with pytest.raises(ValueError, match="the run was trained on"):
        evaluate(load_run(classifier_folder), train_data=Other(), test_data=Other())


def test_samples_are_a_function_of_the_seed(gan_folder):
    run = load_run(gan_folder)
    images = sample(run, 6, seed=3)
    assert images.shape == (6, 1, 16, 16)
    assert torch.equal(sample(run, 6, seed=3), images)
    assert not torch.equal(sample(run, 6, seed=4), images)


def test_first_samples_do_not_depend_on_how_many_follow(gan_folder):
    run = load_run(gan_folder)
    torch.testing.assert_close(sample(run, 3, seed=1), sample(run, 600, seed=1)[:3])


def test_classes_can_be_asked_for(gan_folder):
    run = load_run(gan_folder)
    in_turn = sample(run, 4)
    torch.testing.assert_close(sample(run, 4, labels=[0, 1, 2, 3]), in_turn)
    assert not torch.allclose(sample(run, 4, labels=[1, 2, 3, 0]), in_turn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"count": 2, "labels": [0]}, "2 class numbers"),
        ({"count": 2, "labels": [0, 4]}, r"must lie in 0\.\.3"),
    ],
)
def test_impossible_samples_are_refused(arguments, message, gan_folder):
    with pytest.raises(ValueError, match=message):
        sample(load_run(gan_folder), **arguments)


def test_each_job_refuses_what_only_the_other_can(classifier_folder, gan_folder, image_files):
    with pytest.raises(ValueError, match="only a gan's can be sampled"):
        sample(load_run(classifier_folder), 1)
    with pytest.raises(ValueError, match="only a classifier's predicts"):
        predict(load_run(gan_folder), image_files)


def test_run_with_a_model_of_its_own_needs_that_model(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))
    run_classifier(tmp_path / "run", model=model)
    with pytest.raises(RunFolderError, match="trained with a Sequential of its own; pass it as model="):
        load_run(tmp_path / "run")
    fresh = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))
    load_run(tmp_path / "run", model=fresh)
    assert torch.equal(fresh[1].weight, results(tmp_path / "run")["model.safetensors:1.weight"])


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_folder_without_a_readable_run_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.json"):
        load_run(tmp_path)


def test_run_without_weights_yet_is_refused(tmp_path):
    folder = run_gan(tmp_path / "run", epochs=1)
    (folder / "generator.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"no generator\.safetensors yet"):
        load_run(folder)


def test_any_torch_dataset_trains(tmp_path):
    class Foreign(Dataset):
        """Float images in [0, 1], labels as Python integers; classes as torchvision names them."""

        classes = ("dark", "bright")
        targets = (0, 1) * 16

        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.full((3, 8, 8), 0.25 + 0.5 * (index % 2)), index % 2

    config = ClassifierConfig(data="foreign", out=tmp_path / "run", model="mlp", epochs=2, batch_size=8, threads=1)
    folder = train_classifier(config, train_data=Foreign(), test_data=Foreign(), progress=SilentProgress())
    assert load_run(folder).class_names == ("dark", "bright")
    assert read_metrics(folder / "metrics.jsonl")[-1]["test/accuracy"] == 1.0
