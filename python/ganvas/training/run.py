"""What surrounds the steps of every recipe: position, log, checkpoints, signals, faults.

A recipe reads

    with run:
        while run.epoch < config.epochs:
            with run.recovering():
                for images, labels in run.batches():
                    ...one step, whose losses are added to the averages...
                run.end_epoch({"test/accuracy": ...})

and all of the rest happens between its lines: :meth:`TrainingRun.batches` starts where the checkpoint was taken, logs,
checkpoints, and stops on Ctrl-C; a :class:`TrainingFault` raised in the block sends the run back to its last good
checkpoint with lower learning rates.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

import ganvas
from ganvas.data import BatchLoader
from ganvas.training.averages import Averages, Reading
from ganvas.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from ganvas.training.config import RunConfig
from ganvas.training.device_time import Moment
from ganvas.training.faults import Detector, TrainingFailed, TrainingFault, check_finite
from ganvas.training.interrupt import Interrupted, StopRequest
from ganvas.training.metrics_log import MetricsLog
from ganvas.training.optimizers import learning_rate, load_optimizer_state, scale_learning_rates
from ganvas.training.progress import ProgressDisplay, make_progress, summary
from ganvas.training.report import write_report
from ganvas.training.run_folder import RunFolder, weights_mismatch

RECOVERY_RATE = 0.5
"""Factor on the learning rates at each recovery."""
WINDOWS_IN_FLIGHT = {"cpu": 0, "cuda": 1}
"""Log windows that have ended before the oldest of them is read. So the host, which is ahead of a GPU, waits for what
the GPU did a window ago, and is never further ahead than that."""


class Stateful(Protocol):
    """Anything with a state that a checkpoint holds: optimisers, schedules, random states."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class _Window(NamedTuple):
    """A log window that has ended."""

    step: int
    epoch: int
    images: int
    rates: dict[str, float]
    started: Moment
    reading: Reading


class TrainingRun:
    """One run, from its first step or from its last checkpoint to its end.

    Args:
        config: with all presets filled in.
        folder: made by :meth:`RunFolder.create` and locked.
        loader: of the training data.
        epochs: of the whole run.
        modules: networks, by the name used in messages; their states are checkpointed and checked for NaN.
        optimizers: checkpointed; their learning rates are logged and, at a recovery, lowered.
        parts: whatever else has a state.
        averages: what is logged of the steps.
        detectors: see :mod:`ganvas.training.faults`.
        on_load: called after a checkpoint has been loaded, which replaces the tensors of the optimisers' state.
        resume: continue from the newest whole checkpoint, if there is one.
        progress: what a person sees; a bar or plain lines if None.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        loader: BatchLoader,
        *,
        epochs: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        parts: Mapping[str, Stateful],
        averages: Averages,
        detectors: Sequence[Detector] = (),
        on_load: Callable[[], None] | None = None,
        resume: bool = False,
        progress: ProgressDisplay | None = None,
    ) -> None:
        self.folder = folder
        self.epoch = 0
        self.batch = 0
        self.step = 0
        self.best: dict[str, float] = {}
        self._config = config
        self._loader = loader
        self._epochs = epochs
        self._modules = modules
        self._optimizers = optimizers
        self._parts = parts
        self._detectors = detectors
        self._on_load = on_load
        self._resume = resume
        self._progress = progress or make_progress()
        self._store = CheckpointStore(folder.checkpoints, ganvas.__version__)
        self._averages = averages
        self._recoveries = 0
        self._steps_per_epoch = len(loader)
        self._images = 0
        self._windows: deque[_Window] = deque()
        self._window_started = Moment(loader.device)
        self._saved_at = time.monotonic()

    def __enter__(self) -> TrainingRun:
        with ExitStack() as stack:
            self._store.remove_leftovers()
            loaded = self._store.load(self._config.identity()) if self._resume else None
            self._log = stack.enter_context(MetricsLog(self.folder.metrics, length=self._restored_log_length(loaded)))
            stack.enter_context(self._progress)
            if loaded is None:
                self._save(good=True)
            else:
                self._apply(loaded[0])
                for complaint in loaded[1]:
                    self._progress.message(f"warning: {complaint}")
                self._progress.message(f"continuing after step {self.step}")
            self._stop = stack.enter_context(
                StopRequest(lambda: self._progress.message("stopping after this step; once more to stop at once"))
            )
            self._start_clocks()
            self._exit_stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            with suppress(Exception):  # what ended the run is what has to be said
                self._read_windows()
        self._exit_stack.close()
        # On a full disk the report fails as well; what ended the run is what has to be said.
        with suppress(OSError) if kind is not None else nullcontext():
            write_report(self.folder)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this epoch that are still to do. After each: log, checkpoint, or stop, as is due.

        Raises:
            TrainingFault: something has gone wrong in a log window; raised at its end, or on a GPU at the next one's.
            Interrupted: after a signal; everything is saved.
        """
        for images, labels in self._loader.epoch(self.epoch, start=self.batch):
            yield images, labels
            self.batch += 1
            self.step += 1
            self._images += images.shape[0]
            self._progress.advance(images.shape[0])
            if self.batch % self._config.log_every == 0 or self.batch == self._steps_per_epoch:
                self._close_window()
            if self._stop.requested:
                self._save(good=False)
                raise Interrupted(self.folder.path, self.step)
            if time.monotonic() - self._saved_at >= self._config.checkpoint_seconds:
                self._save(good=False)
                self._progress.saved(self.step)
        self._read_windows()
        # Evaluation comes next: weights that are not finite would only make it fail.
        check_finite({}, self._modules)

    def improved(self, name: str, value: float, *, larger_is_better: bool) -> bool:
        """Whether ``value`` is the best under this name so far; if so, it is remembered as such."""
        best = self.best.get(name)
        if best is not None and (value <= best if larger_is_better else value >= best):
            return False
        self.best[name] = value
        return True

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Log an epoch's evaluation, let the detectors see it, write the checkpoint to which a recovery returns.

        Raises:
            TrainingFault: a detector fired.
            Interrupted: after a signal; everything is saved.
        """
        if metrics:
            self._log.write(self.step, self.epoch + 1, metrics)
        for detector in self._detectors:
            detector.observe(metrics, 0)
        self.epoch += 1
        self.batch = 0
        self._save(good=not any(detector.suspicious for detector in self._detectors))
        # After the checkpoint: what a person has read is on the disk.
        self._progress.message(f"epoch {self.epoch}/{self._epochs}  {summary(metrics)}")
        write_report(self.folder)
        if self._stop.requested:
            raise Interrupted(self.folder.path, self.step)
        self._start_clocks()

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Log what is measured once, at the end of the run."""
        self._log.write(self.step, self._epochs, {"event": "finished", **metrics})
        self._log.sync()
        shown = {name: value for name, value in metrics.items() if isinstance(value, float)}
        self._progress.message(f"finished  {summary(shown)}")

    def log(self, values: Mapping[str, Any]) -> None:
        """Write a line that belongs to no window or epoch end."""
        self._read_windows()
        self._log.write(self.step, self.epoch + 1, values)

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """A :class:`TrainingFault` in the block is reported and the state of the last good checkpoint put back.

        Raises:
            TrainingFailed: there have been ``max_recoveries`` already.
        """
        try:
            yield
        except TrainingFault as fault:
            self._recover(fault)

    def _recover(self, fault: TrainingFault) -> None:
        recoveries = self._recoveries
        at = f"step {self.step} (epoch {self.epoch + 1})"
        self._log.write(self.step, self.epoch + 1, {"event": "fault", "message": str(fault)})
        if recoveries >= self._config.max_recoveries:
            self._log.sync()
            raise TrainingFailed(
                f"gave up at {at} after {recoveries} recoveries: {fault}. {self.folder.path} keeps the best weights "
                "and the last good checkpoint; start a new run with lower learning rates"
            )
        loaded = self._store.load(self._config.identity(), good=True)
        if loaded is None:
            raise TrainingFailed(f"at {at}: {fault}; and {self._store.folder} holds no good checkpoint to return to")
        self._apply(loaded[0])
        self._recoveries = recoveries + 1
        scale_learning_rates(self._optimizers.values(), RECOVERY_RATE)
        message = (
            f"at {at}: {fault}. Back to step {self.step} with {RECOVERY_RATE} times the learning rates "
            f"(recovery {self._recoveries} of at most {self._config.max_recoveries})"
        )
        self._log.write(self.step, self.epoch + 1, {"event": "recovery", "message": message})
        self._progress.message(message)
        # At once, so that a resumed run knows of the recovery too.
        self._save(good=True)
        self._start_clocks()

    def _close_window(self) -> None:
        rates = {f"train/{name}": learning_rate(optimizer) for name, optimizer in self._optimizers.items()}
        reading = self._averages.take()
        self._windows.append(_Window(self.step, self.epoch, self._images, rates, self._window_started, reading))
        self._images, self._window_started = 0, reading.taken
        self._read_windows(left=WINDOWS_IN_FLIGHT[self._loader.device.type])

    def _read_windows(self, *, left: int = 0) -> None:
        """Log the windows that have ended and look for faults in them, except for the ``left`` latest.

        Raises:
            TrainingFault: something has gone wrong in one of them; the run is then at its end, and later ones are gone.
        """
        while len(self._windows) > left:
            window = self._windows.popleft()
            try:
                self._read_window(window)
            except TrainingFault:
                self._windows.clear()
                self.step, self.epoch = window.step, window.epoch
                raise

    def _read_window(self, window: _Window) -> None:
        values = window.reading.means()
        elapsed = window.reading.taken.seconds_since(window.started)
        speed = {"train/images_per_second": window.images / elapsed} if elapsed > 0 else {}
        self._log.write(window.step, window.epoch + 1, {**values, **window.rates, **speed})
        check_finite(values, {})
        for detector in self._detectors:
            detector.observe(values, window.reading.steps)

    def _save(self, *, good: bool) -> None:
        self._read_windows()
        self._log.sync()
        checkpoint = Checkpoint(self._state(), self.step, self.epoch, good, self._config.identity())
        self._store.save(checkpoint)
        self._saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return {
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "best": self.best,
            "recoveries": self._recoveries,
            "log_length": self._log.length,
            "averages": self._averages.state_dict(),
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "detectors": [detector.state_dict() for detector in self._detectors],
        }

    def _apply(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        for name, module in self._modules.items():
            problem = weights_mismatch(module, state["modules"].get(name, {}))
            if problem:
                raise CheckpointError(f"the checkpoint in {self._store.folder} is of another {name}: {problem}")
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self._optimizers.items():
            load_optimizer_state(optimizer, state["optimizers"][name])
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        for detector, detector_state in zip(self._detectors, state["detectors"]):
            detector.load_state_dict(detector_state)
        self._averages.load_state_dict(state["averages"])
        self.epoch, self.batch, self.step = (state["position"][key] for key in ("epoch", "batch", "step"))
        self.best = dict(state["best"])
        self._recoveries = state["recoveries"]
        if self._on_load is not None:
            self._on_load()

    @staticmethod
    def _restored_log_length(loaded: tuple[Checkpoint, list[str]] | None) -> int:
        return loaded[0].state["log_length"] if loaded else 0

    def _start_clocks(self) -> None:
        self._saved_at = time.monotonic()
        self._window_started = Moment(self._loader.device)
        self._images = 0
        self._progress.start(self._epochs * self._steps_per_epoch, self.step)
