#!/usr/bin/env python3
"""Overlap, bandwidths and arithmetic of a run on a GPU, as tables in Markdown.

    gpu_speed.py FOLDER --layers L --hidden C --heads H --seq T --batch B

FOLDER holds what scripts/gpu_check leaves: trace.json (of `train --trace`), speed.json (of `train --json`)
and, if the bus was measured alone, copy.json (of `bench copy --json`)."""

import json
import os
import sys

FIRST_STEP = 3  # Those before it make what later ones use again.
VOCABULARY = 256
COMPUTE = "compute"


def union(spans):
    """Spans as few that do not overlap, in order."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def length(spans):
    return sum(end - start for start, end in spans)


def common(one, other):
    """What two lists of spans share, in their unit."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def median(values):
    values = sorted(values)
    return values[len(values) // 2] if values else float("nan")


def main():
    folder, arguments = sys.argv[1], sys.argv[2:]
    shape = {key[2:]: int(value) for key, value in zip(arguments[::2], arguments[1::2])}
    events = [event for event in json.load(open(f"{folder}/trace.json")) if event.get("ph") == "X"]
    rows = [json.loads(line) for line in open(f"{folder}/speed.json")]
    steps = [row for row in rows if "loss" in row and row["step"] >= FIRST_STEP]
    summary = rows[-1]
    queues = {}
    waited, computed = {}, {}
    for event in events:
        step = event["args"]["step"]
        if step < FIRST_STEP:
            continue
        span = (1e-6 * event["ts"], 1e-6 * (event["ts"] + event["dur"]))
        queues.setdefault(event["cat"], []).append(span)
        if event["cat"] == COMPUTE:
            waited[step] = waited.get(step, 0.0) + event["args"]["waited_s"]
            computed[step] = computed.get(step, 0.0) + span[1] - span[0]
    queues = {name: union(spans) for name, spans in queues.items()}
    compute = queues.get(COMPUTE, [])
    print("| queue | busy, s | of it beside computing |")
    print("|---|---|---|")
    for name, spans in sorted(queues.items()):
        beside = (
            "" if name == COMPUTE else f"{100 * common(spans, compute) / max(length(spans), 1e-12):.0f} %"
        )
        print(f"| {name} | {length(spans):.3f} | {beside} |")

    alone = {}
    if os.path.exists(f"{folder}/copy.json"):
        result = json.loads(open(f"{folder}/copy.json").read().splitlines()[-1])
        alone = {row["direction"]: row["whole_bytes_per_s"]["median"] for row in result["rows"]}
    print("\n| direction | GB in the run | GB/s while copying | measured alone |")
    print("|---|---|---|---|")
    for name, moved, seconds, direction in (
        ("host to device", "uploaded_bytes", "upload_s", "up"),
        ("device to host", "downloaded_bytes", "download_s", "down"),
    ):
        speed = summary[moved] / summary[seconds] / 1e9 if summary[seconds] else float("nan")
        measured = f"{alone[direction] / 1e9:.1f} GB/s" if direction in alone else "not measured"
        print(f"| {name} | {summary[moved] / 1e9:.2f} | {speed:.1f} | {measured} |")

    layers, hidden, sequence = shape["layers"], shape["hidden"], shape["seq"]
    tokens = shape["batch"] * sequence
    parameters = 12 * layers * hidden * hidden + VOCABULARY * hidden
    # Forward and backward of the model, as usually counted: what is computed again counts as time and not as
    # work.
    flop = 6.0 * parameters * tokens + 12.0 * layers * hidden * sequence * tokens
    step_s = median([row["step_s"] for row in steps])
    compute_s = median(list(computed.values()))
    print("\n| a step, median | |")
    print("|---|---|")
    print(f"| seconds | {step_s:.4f} |")
    print(f"| seconds of the segments' computing | {compute_s:.4f} |")
    print(f"| exposed stall | {100 * median([row['exposed_stall'] for row in steps]):.1f} % |")
    print(f"| seconds that the device had nothing to compute | {median(list(waited.values())):.4f} |")
    print(f"| model TFLOP/s of the step | {flop / step_s / 1e12:.2f} |")
    print(f"| model TFLOP/s of computing | {flop / max(compute_s, 1e-12) / 1e12:.2f} |")
    peak = summary["peak_device_bytes"] or "not counted"
    print(f"| peak device bytes | {peak} of {summary['planned_device_bytes']} planned |")
    return 1 if summary["peak_device_bytes"] > summary["planned_device_bytes"] else 0


if __name__ == "__main__":
    sys.exit(main())
