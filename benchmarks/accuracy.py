"""Trains one classifier of the registry twice, as ganvas and as plain torch, and prints what each reaches.

    python benchmarks/accuracy.py --data folder --root PATH --model cnn_32_64 --epochs 4 --flip

Same loop, same seed, same batches: only the layers differ (`ganvas.revert` makes the network plain torch).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import ganvas
from ganvas.data import load
from ganvas.training import ClassifierConfig, train_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--model", default="resnet")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flip", action="store_true", help="mirror training images at random")
    parser.add_argument("--candidate", choices=["ganvas", "plain", "both"], default="both")
    arguments = parser.parse_args()
    train, test = (load(arguments.data, root=arguments.root, split=split) for split in ("train", "test"))
    candidates = ("ganvas", "plain") if arguments.candidate == "both" else (arguments.candidate,)
    for candidate in candidates:
        torch.manual_seed(0)
        options = {"num_classes": len(train.class_names), "channels": train.channels, "size": train.size}
        model = ganvas.models.create(arguments.model, **options)
        if candidate == "plain":
            ganvas.revert(model)
        with tempfile.TemporaryDirectory() as folder:
            config = ClassifierConfig(
                data=arguments.data, root=arguments.root, out=Path(folder) / "run", model=arguments.model,
                epochs=arguments.epochs, threads=arguments.threads, flip=arguments.flip,
            )  # fmt: skip
            begin = time.perf_counter()
            run = train_classifier(config, train_data=train, test_data=test, model=model)
            seconds = time.perf_counter() - begin
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        accuracies = [line["test/accuracy"] for line in lines if "test/accuracy" in line and "event" not in line]
        print(f"{candidate}: test accuracy by epoch {', '.join(f'{a:.4f}' for a in accuracies)}; {seconds:.0f} s")


if __name__ == "__main__":
    main()
