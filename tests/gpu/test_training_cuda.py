"""Training on a GPU: steps replayed from CUDA graphs are the steps as they are, and the host does not wait in them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import OneCycleLR

# The helpers of the training tests are found by path, as there.
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from recorded_training import RecordedTraining, assert_same_training
from tiny_training_jobs import JOBS, run_classifier, tiny_classifier, tiny_data
from training_helpers import Recorder, SignalAt, assert_same_results, results

from ganvas.data import Augmentation, BatchLoader
from ganvas.training import Interrupted
from ganvas.training.averages import Averages
from ganvas.training.device_time import Moment
from ganvas.training.gan_steps import AveragedGenerator
from ganvas.training.optimizers import make_optimizer
from ganvas.training.run import TrainingRun
from ganvas.training.run_folder import RunFolder
from ganvas.training.step_graph import WARM_UP_STEPS, CudaRecorder, StepGraph, cuda_recorder

pytestmark = pytest.mark.gpu
EPOCHS = 8
"""Of three steps each."""


class CountingRecorder(CudaRecorder):
    def __init__(self, device, *generators):
        super().__init__(device, generators)
        self.recordings, self.replays = 0, 0

    def record(self, step):
        outputs, replay = super().record(step)
        self.recordings += 1

        def counted():
            self.replays += 1
            replay()

        return outputs, counted


@pytest.fixture
def recordings(monkeypatch):
    """Counts the CUDA graphs that jobs record."""
    made = []
    record = CudaRecorder.record

    def counted(self, step):
        result = record(self, step)
        made.append(result)
        return result

    monkeypatch.setattr(CudaRecorder, "record", counted)
    return made


@pytest.mark.parametrize("options", [[{}], [{"noisy": True}], [{"noisy": True}, {"noisy": False}]])
def test_replayed_steps_equal_steps_as_they_are(options):
    calls = [(32, options[number % len(options)]) for number in range(20)]
    training = assert_same_training(CountingRecorder, calls, device="cuda")
    assert training.recorder.recordings == len(options)
    assert training.recorder.replays == 20 - len(options) * WARM_UP_STEPS
    assert training.said == []


def test_batch_of_another_size_between_replays():
    training = assert_same_training(CountingRecorder, [(5 if n % 4 == 3 else 32, {}) for n in range(24)], device="cuda")
    assert training.recorder.recordings == 1


def test_reading_a_value_back_is_seen_before_a_recording_is_tried():
    class ReadsBack(RecordedTraining):
        def take(self, inputs, targets, **options):
            inputs = inputs * (1.0 if inputs.mean().item() > -10 else 0.0)
            return super().take(inputs, targets, **options)

    training = assert_same_training(CountingRecorder, [(32, {})] * 10, training=ReadsBack, device="cuda")
    assert training.recorder.recordings == 0
    assert len(training.said) == 1
    assert "the host waits for the GPU in" in training.said[0]
    assert "test_training_cuda.py" in training.said[0]


@pytest.mark.parametrize("break_off", [torch.cuda.synchronize, lambda: torch.cuda.current_stream().synchronize()])
def test_capture_that_cuda_breaks_off_leaves_no_trace(break_off):
    """Neither in this training (dropout and noise draw on), nor in the allocator, nor for the next recording."""

    class Waits(RecordedTraining):
        def take(self, inputs, targets, **options):
            values = super().take(inputs, targets, **options)
            break_off()
            return values

    training = assert_same_training(CountingRecorder, [(32, {"noisy": True})] * 10, training=Waits, device="cuda")
    assert len(training.said) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    torch.rand(3, device="cuda")
    training = assert_same_training(CountingRecorder, [(32, {"noisy": True})] * 10, device="cuda")
    assert training.recorder.recordings == 1


def test_warnings_of_a_warm_up_step_are_passed_on():
    def step():
        warnings.warn("look here", UserWarning, stacklevel=1)
        return {}

    with pytest.warns(UserWarning, match="look here"):
        StepGraph(step, cuda_recorder(torch.device("cuda")), modules=(), say=pytest.fail)()


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_job_equals_the_one_whose_steps_run_as_they_are(job, bf16, tmp_path, recordings):
    settings = {"device": "cuda", "epochs": EPOCHS, "bf16": bf16, "gradient_clip": 0.5}
    JOBS[job](tmp_path / "as it is", cuda_graph=False, **settings)
    assert recordings == []
    progress = Recorder()
    JOBS[job](tmp_path / "recorded", progress=progress, **settings)
    assert not any("CUDA graph" in line for line in progress.lines)
    assert len(recordings) == (2 if job == "gan" else 1)
    assert_same_results(tmp_path / "recorded", tmp_path / "as it is")


@pytest.mark.parametrize("job", JOBS)
def test_recorded_run_that_is_interrupted_equals_the_undisturbed_one(job, tmp_path, recordings):
    settings = {"device": "cuda", "epochs": EPOCHS}
    JOBS[job](tmp_path / "undisturbed", **settings)
    with pytest.raises(Interrupted):
        JOBS[job](tmp_path / "run", progress=SignalAt(13), **settings)
    JOBS[job](tmp_path / "run", resume=True, **settings)
    assert_same_results(tmp_path / "run", tmp_path / "undisturbed")
    assert recordings


def test_run_goes_from_the_gpu_to_the_cpu_and_back(tmp_path):
    for device, step in (("cuda", 5), ("cpu", 13)):
        with pytest.raises(Interrupted):
            run_classifier(
                tmp_path / "run", device=device, epochs=EPOCHS, resume=step > 5, progress=SignalAt(step), bf16=False
            )
    run_classifier(tmp_path / "run", device="cuda", epochs=EPOCHS, resume=True)
    assert RunFolder(tmp_path / "run").read_description()["config"]["bf16"] is False


def test_bfloat16_is_the_default_and_weights_stay_float32(tmp_path):
    folder = run_classifier(tmp_path / "run", device="cuda")
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    assert RunFolder(folder).read_description()["config"]["bf16"] is supported
    weights = [value for name, value in results(folder).items() if name.startswith("model")]
    assert {value.dtype for value in weights} == {torch.float32, torch.int64}


class NoWaits:
    """Within the block torch raises where it would make the host wait for the GPU."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("job", ["gan", "classifier"])
def test_host_does_not_wait_within_a_step(job, cuda_graph, tmp_path, monkeypatch):
    steps = []
    call = StepGraph.__call__

    def watched(self, *inputs, **options):
        steps.append(options)
        if len(steps) <= 2 * (WARM_UP_STEPS + 1):  # kernels are loaded and chosen, two kinds of step recorded
            return call(self, *inputs, **options)
        with NoWaits():
            return call(self, *inputs, **options)

    monkeypatch.setattr(StepGraph, "__call__", watched)
    progress = Recorder()
    JOBS[job](
        tmp_path / "run", device="cuda", epochs=EPOCHS, cuda_graph=cuda_graph, gradient_clip=0.5, progress=progress
    )
    assert len(steps) == 3 * EPOCHS
    assert not any("CUDA graph" in line for line in progress.lines)


@pytest.mark.parametrize("job", JOBS)
def test_host_does_not_wait_where_a_log_window_ends(job, tmp_path, monkeypatch):
    """But for the window before, whose event says when its numbers are there."""
    ends = []
    close_window = TrainingRun._close_window

    def watched(self):
        ends.append(self.step)
        with NoWaits():
            close_window(self)

    monkeypatch.setattr(TrainingRun, "_close_window", watched)
    JOBS[job](tmp_path / "run", device="cuda", epochs=EPOCHS, log_every=1)
    assert ends == list(range(1, 3 * EPOCHS + 1))


def test_host_does_not_wait_for_batches():
    loader = BatchLoader(
        tiny_data("train"), 16, device="cuda", drop_last=True, augmentation=Augmentation(flip=True, shift=2, cutout=4)
    )
    for epoch in range(2):
        with NoWaits():
            batches = list(loader.epoch(epoch))
        expected = BatchLoader(
            tiny_data("train"), 16, drop_last=True, augmentation=Augmentation(flip=True, shift=2, cutout=4)
        ).epoch(epoch)
        for (images, labels), (its_images, its_labels) in zip(batches, expected, strict=True):
            assert torch.equal(images.cpu(), its_images)
            assert torch.equal(labels.cpu(), its_labels)


def test_averaged_generator_is_that_of_the_cpu_and_nothing_is_read_back():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).cuda()
    other.load_state_dict(network.state_dict())
    averages = AveragedGenerator(network, 0.9), AveragedGenerator(other, 0.9)
    for step in range(50):
        with torch.no_grad():
            for ours, theirs in zip(network.parameters(), other.parameters()):
                theirs.copy_(ours.add_(step))
        averages[0].update_parameters(network)
        with NoWaits():
            averages[1].update_parameters(other)
    for ours, theirs in zip(averages[0].state_dict().values(), averages[1].state_dict().values()):
        torch.testing.assert_close(theirs.cpu(), ours)


def test_averages_of_a_run_resumed_on_a_gpu_go_on():
    averages = Averages(torch.device("cuda"))
    averages.load_state_dict(
        {"sums": {"a": torch.tensor(3.0).double(), "b": torch.tensor(1.0).double()}, "counts": {"a": 3, "b": 1}}
    )
    averages.add({"a": torch.tensor(5.0, device="cuda")})
    averages.count("a")
    reading = averages.take()
    assert (reading.steps, reading.means()) == (4, {"a": 2.0, "b": 1.0})


def test_log_window_is_read_without_a_wait_before_it():
    device, averages = torch.device("cuda"), Averages(torch.device("cuda"))
    begin = Moment(device)
    values = [torch.full((), float(step), device=device) for step in range(6)]
    with NoWaits():
        readings = []
        for first in (0, 3):
            for value in values[first : first + 3]:
                averages.add({"loss": value})
                averages.count(["loss"])
            readings.append(averages.take())
    assert [reading.means() for reading in readings] == [{"loss": 1.0}, {"loss": 4.0}]
    assert readings[1].taken.seconds_since(begin) > readings[0].taken.seconds_since(begin) > 0


def trained_under_one_cycle(name, device, cuda_graph, dtype=torch.float32, steps=40):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(device, dtype)
    gpu = device == "cuda"
    optimizer = make_optimizer(name, network, 0.01, weight_decay=0.1, capturable=gpu, cycled_momentum=True)
    schedule = OneCycleLR(optimizer, [0.02] * len(optimizer.param_groups), total_steps=steps)

    def step(inputs):
        loss = network(inputs).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    recorder = cuda_recorder(torch.device(device)) if cuda_graph else None
    take = StepGraph(step, recorder, modules=(network,), optimizers=(optimizer,), say=pytest.fail)
    generator = torch.Generator().manual_seed(1)
    for inputs in torch.randn(steps - 1, 6, 4, generator=generator).to(device, dtype).unbind():
        take(inputs)
        schedule.step()
    return parameters_to_vector(network.parameters()).detach().cpu()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_momentum_and_rate_of_a_schedule_are_followed_in_replays(name):
    recorded, as_they_are = (trained_under_one_cycle(name, "cuda", cuda_graph) for cuda_graph in (True, False))
    assert torch.equal(recorded, as_they_are)
    plain, exact = (trained_under_one_cycle(name, "cpu", False, dtype) for dtype in (torch.float32, torch.float64))
    rounding = torch.finfo(torch.float32).eps * exact.norm()
    assert (recorded - exact).norm() <= 3 * (plain - exact).norm() + rounding


def test_training_is_recorded_with_convolutions_that_cudnn_has_measured(tmp_path, recordings):
    progress = Recorder()
    run_classifier(tmp_path / "run", device="cuda", epochs=EPOCHS, deterministic=False, progress=progress)
    assert len(recordings) == 1
    assert not any("CUDA graph" in line for line in progress.lines)
    assert not torch.backends.cudnn.benchmark


def test_model_that_draws_on_the_cpu_is_not_recorded(tmp_path, recordings):
    class DrawsOnTheCPU(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_classifier()

        def forward(self, images):
            return self.inner(images) * float(torch.rand(()))

    torch.manual_seed(0)
    progress = Recorder()
    run_classifier(tmp_path / "run", device="cuda", epochs=EPOCHS, model=DrawsOnTheCPU(), progress=progress)
    torch.manual_seed(0)
    run_classifier(tmp_path / "as it is", device="cuda", epochs=EPOCHS, model=DrawsOnTheCPU(), cuda_graph=False)
    assert [line for line in progress.lines if "CUDA graph" in line] == [
        "training steps run without a CUDA graph: the step draws random numbers on the CPU"
    ]
    assert_same_results(tmp_path / "run", tmp_path / "as it is")
