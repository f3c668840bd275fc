"""Runs a training job for the command line: what is said before it, after it, and when it is interrupted."""

from __future__ import annotations

import dataclasses
import shlex

from ganvas import data, training
from ganvas.cli.errors import InputError, JobFailed, suggestion
from ganvas.cli.output import say, say_pairs
from ganvas.training.config import RunConfig
from ganvas.training.metrics_log import read_metrics
from ganvas.training.presets import with_presets
from ganvas.training.run_folder import RunFolder


def run_job(config: RunConfig, *, resume: bool) -> None:
    """Train, then print the final numbers and where everything is.

    Raises:
        KeyboardInterrupt: says how to go on.
        JobFailed: training gave up.
        ValueError, TypeError, OSError: as :func:`ganvas.training.train`.
    """
    names = data.names()
    if config.data not in names:
        raise InputError(
            f"--data must be one of {', '.join(names)}; got {config.data!r}{suggestion(config.data, names)}"
        )
    folder = RunFolder(config.out)
    if resume and is_finished(folder, config):
        say(f"the run in {folder.path} is finished, there is nothing to resume")
    else:
        _train(config, folder, resume)
    _say_results(folder)


def is_finished(folder: RunFolder, config: RunConfig) -> bool:
    """Whether the folder holds this very run, trained to its end. With other settings, train() refuses or goes on."""
    if not folder.config.is_file():
        return False
    description = folder.read_description()
    stored, given = description["config"], with_presets(config).to_json()
    # epochs: some jobs can be made longer. What is still None is the data's own, and it is the same data.
    compared = [name for name in {*config.identity(), "epochs"} if given[name] is not None]
    if description["job"] != config.job or any(stored.get(name) != given[name] for name in compared):
        return False
    return any(line.get("event") == "finished" for line in read_metrics(folder.metrics))


def resume_command(config: RunConfig) -> str:
    """The command line that continues the run of ``config``."""
    words = ["ganvas", "train", config.job]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        name = field.name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join([*words, "--resume"])


def _train(config: RunConfig, folder: RunFolder, resume: bool) -> None:
    try:
        training.train(config, resume=resume)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted"
        # An interrupt that comes before the folder is made leaves nothing to resume.
        how = f": {resume_command(config)}" if folder.config.is_file() else ""
        raise KeyboardInterrupt(said + how) from interrupt
    except training.TrainingFailed as failure:
        raise JobFailed(str(failure)) from failure


def _say_results(folder: RunFolder) -> None:
    finished = [line for line in read_metrics(folder.metrics) if line.get("event") == "finished"]
    numbers = {name: f"{value:.4g}" for name, value in finished[-1].items() if isinstance(value, float)}
    grids = sorted(folder.samples.glob("*.png"), key=lambda path: path.stat().st_mtime)
    samples = {"samples": grids[-1]} if grids else {}
    say("")
    say_pairs({"run": folder.path, **numbers, **samples, "report": folder.report})
