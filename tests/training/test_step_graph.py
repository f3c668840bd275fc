"""Recorded training steps: when they are recorded, that a replay is the same step, what happens if one can't be."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from operator_tape import OperatorTape
from recorded_training import assert_same_training
from tiny_training_jobs import JOBS, run_classifier, run_gan, tiny_classifier
from torch import nn
from training_helpers import Recorder, SignalAt, assert_same_results

from ganvas.models import checks
from ganvas.training import Interrupted, preparation, run
from ganvas.training.faults import TrainingFault
from ganvas.training.metrics_log import read_metrics
from ganvas.training.optimizers import scale_learning_rates
from ganvas.training.preparation import Job
from ganvas.training.step_graph import MOST_LAYOUTS, WARM_UP_STEPS, StepGraph, cuda_recorder

EPOCHS = 6
"""Of three steps each: as many replays as warm-up steps, and more, for each of the GAN's two kinds of step."""


def test_steps_are_recorded_after_the_warm_up_and_replayed_from_then_on():
    training = assert_same_training(OperatorTape, [(4, {})] * (WARM_UP_STEPS + 5))
    assert (training.recorder.steps, training.recorder.recordings, training.recorder.replays) == (WARM_UP_STEPS, 1, 5)


def test_each_combination_of_options_has_its_own_warm_up_and_recording():
    calls = [(4, {"noisy": number % 3 == 0}) for number in range(24)]
    training = assert_same_training(OperatorTape, calls)
    assert (training.recorder.steps, training.recorder.recordings) == (2 * WARM_UP_STEPS, 2)


def test_batch_of_another_size_runs_as_it_is():
    calls = [(3 if number % 4 == 3 else 4, {}) for number in range(24)]
    training = assert_same_training(OperatorTape, calls)
    assert training.recorder.recordings == 1
    assert training.recorder.replays == 18 - WARM_UP_STEPS
    assert training.said == []


def test_sizes_that_change_in_every_step_are_given_up_with_one_message():
    training = assert_same_training(OperatorTape, [(4 + number, {}) for number in range(MOST_LAYOUTS + 12)])
    assert (training.recorder.recordings, training.recorder.replays) == (0, 0)
    assert training.said == [
        "training steps run without a CUDA graph: 9 layouts of their inputs in 9 steps, in the latest of which input 0 "
        "is torch.float32 of shape (12, 6) and strides (6, 1), before torch.float32 of shape (11, 6) and strides (6, 1)"
    ]


def test_sizes_that_change_later_leave_the_recording_in_use():
    calls = [(4 if number % 2 or number < 10 else number, {}) for number in range(40)]
    training = assert_same_training(OperatorTape, calls)
    assert training.recorder.replays == 10 + 15 - WARM_UP_STEPS
    (said,) = training.said
    assert said.startswith("some training steps run without a CUDA graph: 9 layouts of their inputs in 25 steps, ")


def test_as_many_sizes_as_are_allowed_are_nothing_to_speak_of():
    sizes = [*range(4, 4 + MOST_LAYOUTS)]
    training = assert_same_training(OperatorTape, [(size, {}) for size in (WARM_UP_STEPS + 2) * sizes])
    assert (training.recorder.recordings, training.said) == (1, [])


def test_sizes_of_each_combination_of_options_count_for_themselves():
    calls = [(4 + number, {"noisy": noisy}) for number in range(MOST_LAYOUTS) for noisy in (False, True)]
    assert assert_same_training(OperatorTape, calls).said == []


@pytest.mark.parametrize("sizes", [range(1, 200), [4] * 5 + [*range(5, 200)]])
def test_what_is_kept_of_steps_does_not_grow_with_their_sizes(sizes):
    scale = StepGraph(lambda a: {"a": a * 2}, OperatorTape(), modules=(), say=lambda line: None)
    lasting = torch.arange(3.0)
    for size in sizes:
        scale(lasting.expand(size, 3))
    before = len(gc.get_objects())
    for size in range(200, 400):
        scale(lasting.expand(size, 3))
    assert len(gc.get_objects()) < before + 50


def test_an_input_that_is_now_and_then_missing_is_named():
    said = []
    add = StepGraph(lambda *given: {"sum": given[0].sum()}, OperatorTape(), modules=(), say=said.append)
    for size in range(1, 2 + MOST_LAYOUTS):
        add(torch.ones(2), None if size > MOST_LAYOUTS else torch.ones(size))
    assert said[0].endswith("input 1 is missing, before torch.float32 of shape (8,) and strides (1,)")


def test_inputs_in_another_memory_layout_are_not_taken_for_the_recorded_ones():
    layouts = (torch.contiguous_format, torch.channels_last)
    sums = StepGraph(
        lambda images: {"sum": images.flatten(1).double() @ torch.arange(48.0).double()},
        OperatorTape(),
        modules=(),
        say=pytest.fail,
    )
    for number in range(12):
        images = torch.randn(2, 3, 4, 4)
        expected = images.flatten(1).double() @ torch.arange(48.0).double()
        assert torch.equal(sums(images.contiguous(memory_format=layouts[number % 2]))["sum"], expected)


def test_missing_input_is_passed_on():
    scale = StepGraph(lambda a, b: {"a": a * 2 if b is None else a * b}, OperatorTape(), modules=(), say=pytest.fail)
    for number in range(6):
        assert scale(torch.tensor(float(number)), None)["a"] == 2 * number


def test_learning_rate_that_is_changed_between_replays_is_the_one_used():
    def halve_at_6(training, number):
        if number == 6:
            scale_learning_rates([training.optimizer], 0.5)

    training = assert_same_training(OperatorTape, [(4, {})] * 10, halve_at_6)
    assert training.recorder.replays == 10 - WARM_UP_STEPS


def test_forgotten_recordings_are_made_anew_for_replaced_optimizer_state():
    def reload_at_7(training, number):
        if number == 7:
            training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
            training.step.forget()

    training = assert_same_training(OperatorTape, [(4, {})] * 14, reload_at_7)
    assert (training.recorder.steps, training.recorder.recordings) == (2 * WARM_UP_STEPS, 2)


class FailsHalfWay(OperatorTape):
    """Executes the step in place of recording it, and then fails: the most that there could be to undo."""

    def record(self, step):
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def test_step_that_cannot_be_recorded_goes_on_as_if_nothing_had_been_tried():
    training = assert_same_training(FailsHalfWay, [(4, {"noisy": True})] * 10)
    assert training.said == [
        "training steps run without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_recordings_made_before_one_that_fails_stay_in_use():
    class FailsTheSecondTime(OperatorTape):
        def record(self, step):
            return FailsHalfWay.record(self, step) if self.recordings else super().record(step)

    calls = [(4, {"noisy": number % 2 == 1}) for number in range(20)]
    training = assert_same_training(FailsTheSecondTime, calls)
    assert training.recorder.replays == 10 - WARM_UP_STEPS
    assert len(training.said) == 1


class Obstructed(OperatorTape):
    """Sees an obstacle in some of the steps."""

    seen_in: tuple[int, ...] = ()

    def run(self, step):
        outputs, _ = super().run(step)
        return outputs, "the host waits for the GPU" if self.steps in self.seen_in else None


@pytest.mark.parametrize(("seen_in", "recordings"), [((1, 2), 1), ((WARM_UP_STEPS,), 0)])
def test_obstacle_counts_in_the_last_warm_up_step_only(seen_in, recordings, monkeypatch):
    monkeypatch.setattr(Obstructed, "seen_in", seen_in)
    training = assert_same_training(Obstructed, [(4, {})] * 8)
    assert training.recorder.recordings == recordings
    assert training.said == ["training steps run without a CUDA graph: the host waits for the GPU"] * (1 - recordings)


class RunsPythonOnly(OperatorTape):
    """What a CUDA graph does to work on the CPU: it happens while the step is recorded, and in no replay."""

    def record(self, step):
        return step(), lambda: None


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda module: torch.rand(1), "the step draws random numbers on the CPU"),
        (lambda module: module.count.add_(1), "the step changes a tensor on the CPU"),
    ],
)
def test_step_that_works_on_the_cpu_is_not_recorded(work, reason):
    module, said = nn.Module(), []
    module.register_buffer("count", torch.zeros(()))

    def step():
        work(module)
        return {}

    take, reference = StepGraph(step, RunsPythonOnly(), modules=(module,), say=said.append), nn.Module()
    reference.register_buffer("count", torch.zeros(()))
    torch.manual_seed(0)
    for _ in range(8):
        take()
    random = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(8):
        work(reference)
    assert torch.equal(module.count, reference.count)
    assert torch.equal(torch.get_rng_state(), random)
    assert said == [f"training steps run without a CUDA graph: {reason}"]


def test_error_of_the_step_itself_is_raised():
    def step(inputs):
        raise ValueError("labels must be ...")

    with pytest.raises(ValueError, match="labels must be"):
        StepGraph(step, OperatorTape(), modules=(), say=pytest.fail)(torch.zeros(1))


def test_outputs_are_detached():
    weight = torch.ones(1, requires_grad=True)
    for recorder in (OperatorTape(), None):
        take = StepGraph(lambda recorded=weight: {"w": recorded * 2}, recorder, modules=(), say=pytest.fail)
        assert not any(take()["w"].requires_grad for _ in range(6))


def test_only_a_gpu_has_a_recorder():
    assert cuda_recorder(torch.device("cpu"), torch.Generator()) is None


@pytest.fixture
def taped(monkeypatch):
    """Every job of training recorded on a tape, as on a GPU; returns the tapes."""
    tapes: list[OperatorTape] = []

    def recorder(*arguments):
        tapes.append(OperatorTape(*arguments))
        return tapes[-1]

    monkeypatch.setattr(preparation, "cuda_recorder", recorder)
    monkeypatch.setattr(Job, "capturable", True)
    return tapes


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """So that a tape sees everything; and labels are not looked at, as they are not on a GPU."""
    monkeypatch.setenv("GANVAS_BACKEND", "reference")
    monkeypatch.setattr(checks, "labels", lambda *_: None)


@pytest.fixture(scope="module")
def as_they_are(tmp_path_factory):
    """Folder of a run of a job whose steps are not recorded, made once."""
    made = {}

    def folder(job, **changes):
        case = (job, *sorted(changes.items()))
        if case not in made:
            made[case] = JOBS[job](tmp_path_factory.mktemp(job) / "run", epochs=EPOCHS, cuda_graph=False, **changes)
        return made[case]

    return folder


@pytest.mark.parametrize("job", JOBS)
def test_recorded_job_equals_the_one_whose_steps_run_as_they_are(job, tmp_path, taped, as_they_are):
    JOBS[job](tmp_path / "run", epochs=EPOCHS, gradient_clip=0.5)
    assert_same_results(tmp_path / "run", as_they_are(job, gradient_clip=0.5))
    (tape,) = taped
    kinds = 2 if job == "gan" else 1
    assert (tape.recordings, tape.steps) == (kinds, kinds * WARM_UP_STEPS)
    assert tape.steps + tape.replays == 3 * EPOCHS


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_every_kind_of_gan_step_can_be_recorded(loss, tmp_path, taped, as_they_are):
    """Every step with a generator update, every third with the penalty: two kinds, other ones than above."""
    changes = {"loss": loss, "discriminator_steps": 1, "r1_every": 3, "optimizer": "sgd"}
    run_gan(tmp_path / "run", epochs=EPOCHS, **changes)
    assert_same_results(tmp_path / "run", as_they_are("gan", **changes))
    assert taped[0].recordings == 2


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_optimizer_of_the_classifier_can_be_recorded(optimizer, tmp_path, taped, as_they_are):
    changes = {"optimizer": optimizer, "learning_rate": 0.01}
    run_classifier(tmp_path / "run", epochs=EPOCHS, **changes)
    assert_same_results(tmp_path / "run", as_they_are("classifier", **changes))
    assert taped[0].recordings == 1


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_classifier_with_recordable_optimizers_trains_as_with_plain_ones(optimizer, tmp_path, taped):
    changes = {"epochs": EPOCHS, "cuda_graph": False, "optimizer": optimizer, "learning_rate": 0.01}
    run_classifier(tmp_path / "recordable", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "capturable", False)
        run_classifier(tmp_path / "plain", **changes)
    lines, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("recordable", "plain"))
    for name in ("train/loss", "train/learning_rate"):
        assert [line.get(name) for line in lines] == [
            value if value is None else pytest.approx(value, rel=1e-5)
            for value in (line.get(name) for line in expected)
        ]


@pytest.mark.parametrize("job", JOBS)
def test_recorded_run_that_is_interrupted_equals_the_undisturbed_one(job, tmp_path, taped, as_they_are):
    with pytest.raises(Interrupted):
        JOBS[job](tmp_path / "run", epochs=EPOCHS, progress=SignalAt(10))
    JOBS[job](tmp_path / "run", epochs=EPOCHS, resume=True)
    assert_same_results(tmp_path / "run", as_they_are(job))
    assert all(tape.replays > 0 for tape in taped)


@pytest.mark.parametrize("job", JOBS)
def test_recovery_of_a_recorded_run_equals_that_of_one_as_it_is(job, tmp_path, taped, monkeypatch):
    """The state goes back to a checkpoint's, in other tensors, and the learning rates are halved."""
    for name, cuda_graph in (("recorded", True), ("as it is", False)):
        windows = iter(range(1000))

        def fail_in_a_window(values, modules, windows=windows):
            if values and next(windows) == 7:
                raise TrainingFault("train/loss is nan")

        monkeypatch.setattr(run, "check_finite", fail_in_a_window)
        JOBS[job](tmp_path / name, epochs=EPOCHS, cuda_graph=cuda_graph)
    assert_same_results(tmp_path / "recorded", tmp_path / "as it is")
    lines = read_metrics(tmp_path / "recorded" / "metrics.jsonl")
    assert [line["event"] for line in lines if "event" in line] == ["fault", "recovery", "finished"]
    assert taped[0].recordings >= 1


def test_classifier_that_cannot_be_recorded_trains_as_it_is_and_the_reason_is_said_once(tmp_path, taped, as_they_are):
    class ReadsBack(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_classifier()

        def forward(self, images):
            return self.inner(images) * (1.0 if images.mean().item() > -2 else 0.0)

    torch.manual_seed(0)
    progress = Recorder()
    run_classifier(tmp_path / "run", epochs=EPOCHS, model=ReadsBack(), progress=progress)
    said = [line for line in progress.lines if "CUDA graph" in line]
    assert len(said) == 1
    assert "reads a value back" in said[0]
    lines, expected = (
        read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", as_they_are("classifier"))
    )
    assert [line.get("train/loss") for line in lines] == [line.get("train/loss") for line in expected]


def test_nothing_is_said_of_cuda_graphs_on_a_cpu(tmp_path):
    progress = Recorder()
    run_classifier(tmp_path / "run", progress=progress)
    assert not any("CUDA" in line for line in progress.lines)


def test_run_begun_without_the_setting_can_be_resumed_with_it(tmp_path):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(2), cuda_graph=False)
    path = tmp_path / "run" / "config.json"
    description = json.loads(path.read_bytes())
    del description["config"]["cuda_graph"]  # as a version wrote it that had no such setting
    path.write_text(json.dumps(description))
    run_classifier(tmp_path / "run", resume=True)
    run_classifier(tmp_path / "undisturbed")
    assert_same_results(tmp_path / "run", tmp_path / "undisturbed")
