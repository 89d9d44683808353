#!/usr/bin/env python3
"""Trains a small model, reads its events with TensorBoard's own reader, and compares them with the JSON
lines.

Usage: scripts/check_tensorboard.py [path of the ferrozero binary]     (needs the package tensorboard)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BINARY = Path(sys.argv[1] if len(sys.argv) > 1 else "target/debug/ferrozero").resolve()
# Name of the scalar, and its key in an object of --json.
SCALARS = {
    "loss": "loss",
    "learning_rate": "lr",
    "gradient_norm": "grad_norm",
    "tokens_per_s": "tokens_per_s",
    "exposed_stall": "exposed_stall",
    "validation_loss": "validation_loss",
}
MODEL = (
    "--layers 2 --hidden 32 --heads 2 --seq 16 --batch 2 --warmup 1 --sample 0 --memory 40MiB --eval-every 2"
)


def train(folder, *options):
    command = [
        BINARY,
        "train",
        "--json",
        "--data",
        "data.txt",
        *MODEL.split(),
        "--tensorboard",
        "events",
        *options,
    ]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def main():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(3000)))
        objects = train(folder, "--steps", "5")
        # Goes on after the same commit: what the second process writes of a step counts.
        objects += train(folder, "--steps", "9", "--resume")
        events = EventAccumulator(str(Path(folder, "events")))
        events.Reload()
        compared = 0
        for scalar, key in SCALARS.items():
            expected = {o["step"]: o[key] for o in objects if key in o}
            found = {event.step: event.value for event in events.Scalars(scalar)}
            assert found.keys() == expected.keys(), (
                f"{scalar}: steps {sorted(found)} and not {sorted(expected)}"
            )
            for step, value in found.items():
                assert value == numpy.float32(expected[step]), (
                    f"{scalar} of step {step}: {value}, {expected[step]}"
                )
            compared += len(found)
        assert len(events.Scalars("loss")) == 9
        print(f"{compared} values of {len(SCALARS)} scalars are as in the JSON lines")


main()
