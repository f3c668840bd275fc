"""Prints how many times faster ganvas is than torch eager and torch.compile: `python benchmarks/compare.py --help`.

A ratio is the median over interleaved turns of torch's time through ganvas' time, its quartiles beside it: above 1
ganvas is faster. `of bandwidth` is the least memory traffic of the work through the measured copy bandwidth, over the
time taken.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Iterator

import torch

import ganvas
import workloads
from ganvas.ops.gan_loss import KINDS
from memory import activation_bytes, peak_bytes, resident_peak_bytes
from shapes import ACTIVATIONS, BOTTLENECKS, CHAINS, LOGITS, UPSAMPLED, MapShape
from timing import Timing, interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = (("cnn_32_64", 128), ("resnet", 128), ("resnet20", 128), ("mlp_conv_gan", 128), ("dcgan", 128))
INFERENCE = tuple((model, batch) for model in ("cnn_32_64", "resnet", "resnet20") for batch in (1, 128))

LOSSES = tuple(f"bce {count}" for count in LOGITS) + tuple(f"{kind} 128" for kind in KINDS if kind != "bce")
SHAPES = (*ACTIVATIONS, *CHAINS, *UPSAMPLED, *BOTTLENECKS)
NAMES = [*dict.fromkeys([*map(str, SHAPES), *LOSSES, *(model for model, _ in STEPS)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"], nargs="?", default="all")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=15, help="times each candidate has its turn")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--shape", choices=NAMES, metavar="NAME", help="one row only: a shape, as printed, or a model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, ganvas {ganvas.__version__}, {platform.machine()}, {arguments.threads} threads\n"
    )
    for suite in SUITES.values() if arguments.suite == "all" else [SUITES[arguments.suite]]:
        for name, dtype in DTYPES.items():
            if arguments.dtype in (name, "both"):
                for line in suite(name, dtype, arguments):
                    print(line, flush=True)
                print()


def norm(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """BatchNorm + LeakyReLU on channels-last maps."""
    bandwidth = copy_bandwidth()
    yield f"BatchNorm + LeakyReLU, {name}; copy bandwidth {bandwidth / 1e9:.1f} GB/s (reads + writes)\n"
    peers = ["eager"] if arguments.no_compile else ["eager", "compile"]
    yield _header(
        ["shape", "MiB"], [f"{part} vs {peer}" for part in ("forward", "step") for peer in peers], ["of bandwidth"]
    )
    for shape in _chosen(ACTIVATIONS, arguments):
        work = workloads.batch_norm_leaky_relu(shape, dtype, compiled=not arguments.no_compile)
        forward, step = (_time(part, arguments) for part in (work.forward, work.step))
        size = _bytes(shape, dtype)
        # Forward reads the input twice and writes once; backward reads gradient and input twice and writes once.
        of_bandwidth = 8 * size / bandwidth / step["ganvas"].seconds
        cells = [_ratio(part, peer) for part in (forward, step) for peer in peers]
        yield _row([work.name, f"{size / 2**20:.1f}"], cells, [f"{of_bandwidth:.0%}"])


def loss(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """Adversarial losses with gradient and metrics."""
    peers = ["eager"] if arguments.no_compile else ["eager", "compile"]
    for network, make in (
        ("Discriminator loss, gradient and metrics", workloads.discriminator_loss),
        ("Generator loss and gradient", workloads.generator_loss),
    ):
        # The op's one native call computes the gradients too; backward() then walks torch's graph to hand them out.
        yield f"{network}, {name}; `call`: the op alone against eager's forward + backward\n"
        yield _header(
            ["loss and logits"],
            [f"{part} vs {peer}" for part in ("step", "call") for peer in peers],
            ["torch's graph alone vs eager", "µs a call"],
        )
        for row in LOSSES:
            if arguments.shape in (None, row):
                kind, count = row.split()
                work = make(int(count), kind, dtype, compiled=not arguments.no_compile)
                step = _time(work.step, arguments)
                floor = _time({"eager": work.step["eager"], "ganvas": work.step["floor"]}, arguments)
                call = _time({**work.step, "ganvas": work.forward["ganvas"]}, arguments)
                cells = [_ratio(part, peer) for part in (step, call) for peer in peers] + [_ratio(floor, "eager")]
                yield _row([work.name], cells, [f"{1e6 * call['ganvas'].seconds:.0f}"])
        yield ""


def chains(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """Convolutions with BatchNorm and LeakyReLU: a training step, and inference."""
    peers = ["eager"] if arguments.no_compile else ["eager", "compile"]
    for title, shapes, make in (
        ("Four conv3×3-BN-LeakyReLU layers", CHAINS, workloads.conv_chain),
        ("Nearest-2× upsampling, conv3×3, BN, LeakyReLU", UPSAMPLED, workloads.upsampled_convolution),
        ("ResNet bottleneck: conv1×1, conv3×3, conv1×1, each with BN, and ReLU", BOTTLENECKS, workloads.bottleneck),
    ):
        yield f"{title}, {name}; `best`: against the faster of the two\n"
        yield _header(
            ["input"], [f"{part} vs {peer}" for part in ("step", "inference") for peer in peers], ["step: best"]
        )
        best = []
        for shape in _chosen(shapes, arguments):
            torch.compiler.reset()  # every network is compiled by itself
            work = make(shape, dtype, compiled=not arguments.no_compile)
            step, inference = _time(work.step, arguments), _time(work.forward, arguments)
            best.append(min(1 / step[peer].speedup for peer in peers))
            cells = [_ratio(part, peer) for part in (step, inference) for peer in peers]
            yield _row([work.name], cells, [f"{best[-1]:.2f}"])
        if best:
            yield f"\nGeometric mean of the last column: {statistics.geometric_mean(best):.2f}\n"


def steps(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """Whole training steps of the registry's models, and of a ResNet-20 that was converted."""
    yield f"Training steps, {name}\n"
    peers = ["eager"] if arguments.no_compile else ["eager", "compile"]
    yield _header(["model"], [f"step vs {peer}" for peer in peers], ["ganvas images/s"])
    for model, batch in STEPS:
        if arguments.shape in (None, model):
            work = workloads.training_step(model, batch, dtype, compiled=not arguments.no_compile)
            step = _time(work.step, arguments)
            rate = batch / step["ganvas"].seconds
            yield _row([work.name], [_ratio(step, peer) for peer in peers], [f"{rate:.0f}"])


def inference(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """Classifiers in evaluation mode, one image and many."""
    yield f"Inference, {name}; torch.compile with freezing\n"
    peers = ["eager"] if arguments.no_compile else ["eager", "compile"]
    yield _header(["model"], [f"vs {peer}" for peer in peers], ["ganvas ms"])
    for model, batch in INFERENCE:
        if arguments.shape in (None, model):
            torch.compiler.reset()
            work = workloads.inference(model, batch, dtype, compiled=not arguments.no_compile)
            timings = _time(work.forward, arguments)
            yield _row([work.name], [_ratio(timings, peer) for peer in peers], [_milliseconds(timings)])


def compiled(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """Models of ganvas under torch.compile beside themselves without it: their time through that, below 1 is faster."""
    yield f"ganvas under torch.compile, time through ganvas' without it, {name}\n"
    yield _header(["model"], ["compiled : uncompiled"], ["uncompiled ms"])
    for model, batch in STEPS:
        if arguments.shape in (None, model):
            torch.compiler.reset()
            step = _time(workloads.compiled_training_step(model, batch, dtype).step, arguments)
            yield _row([f"{model} step, batch {batch}"], [_ratio(step, "compiled")], [_milliseconds(step)])
    for model, batch in INFERENCE:
        if arguments.shape in (None, model):
            torch.compiler.reset()
            timings = _time(workloads.compiled_inference(model, batch, dtype).forward, arguments)
            yield _row([f"{model} inference, batch {batch}"], [_ratio(timings, "compiled")], [_milliseconds(timings)])


def memory(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[str]:
    """Memory of a conv-BN-LeakyReLU chain's training step."""
    yield f"Four conv3×3-BN-LeakyReLU layers, {name}: MiB\n"
    columns = [
        cell for title in ("kept for backward", "peak of tensors", "peak of the process")
        for cell in (f"{title}: eager", "ganvas", "ratio")
    ]  # fmt: skip
    yield _header(["shape"], columns, [])
    for shape in (MapShape(64, 64, 32), MapShape(32, 128, 16), MapShape(128, 32, 28)):
        if arguments.shape in (None, str(shape)):
            cells = []
            for measured in (activation_bytes, peak_bytes, resident_peak_bytes):
                pair = measured(shape, dtype)
                eager, ours = pair["eager"], pair["ganvas"]
                cells += [f"{eager / 2**20:.1f}", f"{ours / 2**20:.1f}", f"{ours / eager:.2f}"]
            yield _row([str(shape)], cells, [])


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy, the yardstick of what memory can do here."""
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, turns=7)["copy"]
    return 2 * source.numel() * 4 / timing.seconds


def _bytes(shape: MapShape, dtype: torch.dtype) -> int:
    return shape.batch * shape.channels * shape.size**2 * dtype.itemsize


def _chosen(shapes: tuple[MapShape, ...], arguments: argparse.Namespace) -> list[MapShape]:
    return [shape for shape in shapes if arguments.shape in (None, str(shape))]


def _time(candidates: dict[str, workloads.Call], arguments: argparse.Namespace) -> dict[str, Timing]:
    # ganvas is the baseline of the ratios and so comes first: a peer's ratio is then its slowdown, inverted here.
    ordered = {"ganvas": candidates["ganvas"], **candidates}
    return interleaved(ordered, turns=arguments.turns)


def _ratio(timings: dict[str, Timing], peer: str) -> str:
    timing = timings[peer]
    low, high = 1 / timing.spread[1], 1 / timing.spread[0]
    return f"{1 / timing.speedup:.2f} ({low:.2f}–{high:.2f})"


def _milliseconds(timings: dict[str, Timing]) -> str:
    return f"{timings['ganvas'].seconds * 1e3:.2f}"


def _header(left: list[str], middle: list[str], right: list[str]) -> str:
    names = [*left, *middle, *right]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def _row(left: list[str], middle: list[str], right: list[str]) -> str:
    return "| " + " | ".join([*left, *middle, *right]) + " |"


SUITES = {
    "norm": norm, "loss": loss, "chains": chains, "steps": steps, "inference": inference, "compiled": compiled,
    "memory": memory,
}  # fmt: skip

if __name__ == "__main__":
    main()
