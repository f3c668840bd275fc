"""A training step recorded as a CUDA graph: one launch instead of hundreds, so that the GPU never waits for the host.

A step that is to be recorded (:class:`StepGraph`) is a function of tensors. Everything that it changes lies on the
device and stays at its address: parameters, buffers, optimiser state, generators. What Python works out while it is
recorded is fixed: numbers, branches, ``len``. A choice that changes from step to step is therefore an option, of whose
values each combination has a recording of its own; a number that changes (a learning rate) is a tensor.

The life of a combination: ``WARM_UP_STEPS`` steps as they are, which are steps of the training like any other, and in
which optimiser state comes to be and kernels are chosen by measurement; then a recording, during which nothing is
executed; then replays. What the numbers are does not depend on whether a step was replayed. A batch of another size, as
the last one of an epoch may be, runs as it is; a step whose inputs come in ever new sizes is given up (MOST_LAYOUTS).

See the section "CUDA Graphs" of torch's notes on CUDA semantics for what a graph can hold.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ganvas.training.averages import Averages
from ganvas.training.recordable import Recordable

WARM_UP_STEPS = 3
"""As torch's documentation has it."""
MOST_LAYOUTS = 8
"""Shapes, strides and dtypes of the inputs in which steps of the same options may come before nothing more of them is
recorded or remembered."""

Inputs = tuple["Tensor | None", ...]
Layout = tuple["tuple[torch.Size, tuple[int, ...], torch.dtype] | None", ...]
Outputs = dict[str, Tensor]


class Recorder(Protocol):
    """Runs steps on a device and records them."""

    @property
    def generators(self) -> Sequence[torch.Generator]:
        """Those of the device that a recording may draw from."""

    def run(self, step: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
        """A step as it is: its outputs, and what would keep it from being recorded, if something has been seen."""

    def record(self, step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Record a step, without executing it: the tensors its outputs will be in, and the call that executes it.

        Raises:
            Exception: the step raised it, or does what cannot be recorded.
        """


class StepGraph:
    """Calls of a training step, replayed from a recording where that is possible.

    Args:
        step: ``step(*inputs, **options)`` returns named tensors. Inputs are tensors or None.
        recorder: None to run every step as it is. See :func:`cuda_recorder`.
        modules, optimizers: what the step changes. Numbers of optimisers (learning rates, momentum) may change between
            steps if they are :class:`~ganvas.training.recordable.Recordable`.
        averages: to which each step adds its outputs.
        say: called with one line if a step cannot be recorded and so goes on as it is.
    """

    def __init__(
        self,
        step: Callable[..., Mapping[str, Tensor]],
        recorder: Recorder | None,
        *,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] = (),
        averages: Averages | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._step = step
        self._recorder = recorder
        self._modules = modules
        self._optimizers = optimizers
        self._averages = averages
        self._say = say
        self._steps: defaultdict[Hashable, Counter[Layout]] = defaultdict(Counter)  # by options; until it is refused
        self._recordings: dict[Hashable, _Recording] = {}
        self._latest: _Recording | None = None
        self._refused = False

    def __call__(self, *inputs: Tensor | None, **options: Hashable) -> Outputs:
        """Take one step. The outputs (detached) are good until the next one.

        The gradients that the step leaves in ``parameter.grad`` are those of this call, replayed or not.
        """
        for optimizer in self._optimizers:
            if isinstance(optimizer, Recordable):
                optimizer.publish()
        outputs = self._take(inputs, options)
        if self._averages is not None:
            self._averages.count(outputs)
        return outputs

    def forget(self) -> None:
        """Begin anew, with warm-up steps: tensors that the recordings work on have been replaced by others."""
        self._recordings.clear()
        self._steps.clear()
        self._latest = None

    def _take(self, inputs: Inputs, options: Mapping[str, Hashable]) -> Outputs:
        if self._recorder is None:
            return self._call(inputs, options)
        key, layout = tuple(sorted(options.items())), _layout(inputs)
        self._count(key, layout)
        recording = self._recordings.get(key)
        if recording is None and not self._refused and self._steps[key][layout] > WARM_UP_STEPS:
            recording = self._record(self._recorder, key, inputs, options)
        # A batch of another size, as the last of an epoch may be, is too rare for a recording of its own.
        if recording is None or layout != recording.layout:
            return self._run(key, inputs, options)
        return self._replay(recording, inputs)

    def _count(self, key: Hashable, layout: Layout) -> None:
        """Refuse to record steps whose inputs change too often."""
        if self._refused:
            return
        steps = self._steps[key]
        if layout not in steps and len(steps) == MOST_LAYOUTS:
            *_, latest = steps
            times = f"{MOST_LAYOUTS + 1} layouts of their inputs in {steps.total() + 1} steps"
            self._refuse(f"{times}, {_change(latest, layout)}")
        else:
            steps[layout] += 1

    def _call(self, inputs: Inputs, options: Mapping[str, Hashable]) -> Outputs:
        outputs = {name: value.detach() for name, value in self._step(*inputs, **options).items()}
        if self._averages is not None:
            self._averages.add(outputs)
        return outputs

    def _run(self, key: Hashable, inputs: Inputs, options: Mapping[str, Hashable]) -> Outputs:
        self._latest = None
        if self._recorder is None:
            return self._call(inputs, options)
        outputs, obstacle = self._recorder.run(lambda: self._call(inputs, options))
        # Sooner it may be what happens in a first step only.
        if obstacle is not None and not self._refused and self._steps[key][_layout(inputs)] == WARM_UP_STEPS:
            self._refuse(obstacle)
        return outputs

    def _record(
        self, recorder: Recorder, key: Hashable, inputs: Inputs, options: Mapping[str, Hashable]
    ) -> _Recording | None:
        """None, and everything as it was, if that fails."""
        static = tuple(None if given is None else given.clone() for given in inputs)
        sums = () if self._averages is None else (self._averages.sums,)
        before = _State(self._modules, self._optimizers, recorder.generators, sums)
        try:
            outputs, replay = recorder.record(lambda: self._call(static, options))
            before.check_unchanged_on_host()
        except Exception as error:
            before.restore()
            lines = str(error).strip().splitlines()
            self._refuse(lines[0] if lines else type(error).__name__)
            return None
        gradients = [(parameter, parameter.grad) for module in self._modules for parameter in module.parameters()]
        self._recordings[key] = _Recording(_layout(inputs), static, outputs, replay, gradients)
        return self._recordings[key]

    def _replay(self, recording: _Recording, inputs: Inputs) -> Outputs:
        for static, given in zip(recording.inputs, inputs):
            if static is not None and given is not None:
                static.copy_(given, non_blocking=True)
        recording.replay()
        if recording is not self._latest:
            for parameter, gradient in recording.gradients:
                parameter.grad = gradient
            self._latest = recording
        return recording.outputs

    def _refuse(self, reason: str) -> None:
        """Record no more. The recordings that there are stay in use."""
        if not self._refused:
            which = "some training steps" if self._recordings else "training steps"
            self._say(f"{which} run without a CUDA graph: {reason}")
        self._refused = True
        self._steps.clear()
        if not self._recordings:
            self._recorder = None


class _Recording(NamedTuple):
    layout: Layout
    inputs: Inputs
    outputs: Outputs
    replay: Callable[[], None]
    gradients: list[tuple[nn.Parameter, Tensor | None]]


class _State:
    """All that a step may change, as it is now."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        generators: Sequence[torch.Generator],
        others: Sequence[Tensor],
    ) -> None:
        self._optimizers = [
            (optimizer, {parameter: dict(state) for parameter, state in optimizer.state.items()})
            for optimizer in optimizers
        ]
        tensors = itertools.chain(
            *(itertools.chain(module.parameters(), module.buffers()) for module in modules),
            *(state.values() for _, states in self._optimizers for state in states.values()),
            others,
        )
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors if isinstance(tensor, Tensor)]
        self._gradients = [(parameter, parameter.grad) for module in modules for parameter in module.parameters()]
        self._random = [(generator, generator.get_state()) for generator in (torch.default_generator, *generators)]

    def check_unchanged_on_host(self) -> None:
        """Raise RuntimeError if something was done on the CPU, which a replay would not do again."""
        (generator, state), *_ = self._random
        if not torch.equal(generator.get_state(), state):
            raise RuntimeError("the step draws random numbers on the CPU")
        if any(tensor.device.type == "cpu" and not torch.equal(tensor, value) for tensor, value in self._values):
            raise RuntimeError("the step changes a tensor on the CPU")

    @torch.no_grad()
    def restore(self) -> None:
        """Into the same tensors, whose addresses other recordings hold."""
        for optimizer, states in self._optimizers:
            optimizer.state.clear()
            optimizer.state.update(states)
        for tensor, value in self._values:
            tensor.copy_(value)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for generator, state in self._random:
            generator.set_state(state)


def _layout(inputs: Inputs) -> Layout:
    return tuple(None if given is None else (given.shape, given.stride(), given.dtype) for given in inputs)


def _change(before: Layout, after: Layout) -> str:
    """The first input that is another one, in words."""

    def described(of_input: tuple[torch.Size, tuple[int, ...], torch.dtype] | None) -> str:
        if of_input is None:
            return "missing"
        shape, strides, dtype = of_input
        return f"{dtype} of shape {tuple(shape)} and strides {strides}"

    changes = enumerate(itertools.zip_longest(before, after))
    index, (old, new) = next((index, pair) for index, pair in changes if pair[0] != pair[1])
    return f"in the latest of which input {index} is {described(new)}, before {described(old)}"


def cuda_recorder(device: torch.device, *generators: torch.Generator) -> CudaRecorder | None:
    """One for a GPU whose steps draw from torch's global generator and ``generators``; None for another device."""
    return CudaRecorder(device, generators) if device.type == "cuda" else None


class CudaRecorder:
    """Runs steps on a stream of its own and records them as CUDA graphs.

    The graphs share a memory pool. Each begins with nothing but parameters and inputs, which lie outside of the pool,
    and its outputs are used before the next one runs: so one may overwrite what another has left there, in any order.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._own_generators = generators
        self.generators = (torch.cuda.default_generators[self._stream.device.index], *generators)

    def run(self, step: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
        """On the stream that recordings are made on, so that nothing a recording meets belongs to another one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with _watched_waits() as waits, torch.cuda.stream(self._stream):
            outputs = step()
        current.wait_stream(self._stream)
        return outputs, waits[0] if waits else None

    def record(self, step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        # What is left of earlier steps in reference cycles would be freed in the midst of the recording.
        gc.collect()
        graph = self._new_graph()
        raised: list[Exception] = []
        try:
            # The outer blocks put back what torch.cuda.graph does not if ending the capture fails, the current stream.
            # "thread_local": a DataLoader's thread may pin memory meanwhile.
            with (
                torch.cuda.device(self._stream.device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    outputs = step()
                except Exception as error:
                    raised.append(error)
                    raise
        except Exception as error:
            self._clean_up()
            # Ending a capture that CUDA has broken off raises too, and says less of why.
            raise (raised or [error])[0] from None
        return outputs, graph.replay

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        # A generator gets its state of graphs on the device that is current.
        with torch.cuda.device(self._stream.device):
            graph = torch.cuda.CUDAGraph()
            for generator in self._own_generators:  # torch's global one is in every graph
                graph.register_generator_state(generator)
        return graph

    def _clean_up(self) -> None:
        """Undo what torch leaves of a capture that CUDA has broken off.

        Its allocator still serves the capture (before 2.13), and its generators refuse to draw outside of one (before
        2.12). There is no public call for the first; a capture that succeeds ends the second.
        """
        with suppress(AttributeError, RuntimeError):  # another torch; nothing to end
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
        graph = self._new_graph()
        with torch.cuda.stream(self._stream), suppress(RuntimeError):
            graph.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self._stream.device)
            graph.capture_end()


@contextmanager
def _watched_waits() -> Iterator[list[str]]:
    """Lists, when the block has ended, where in it the host has waited for the GPU: a CUDA graph cannot hold that.

    A capture would be broken off there, and torch does not recover from that as well as from not having tried.
    """
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    if mode:  # the caller watches
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            waits.append(f"the host waits for the GPU in {warning.filename}, line {warning.lineno}")
        elif "ynchronization debug mode" not in text:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
