#!/usr/bin/env python3
"""Tries DeepSpeed's ZeRO-Infinity on the models of scale_demo, in a memory cgroup as ferrozero's runs there
are.

The models, the tokens of a step and the recomputation are those of `scripts/scale_demo`; what DeepSpeed is
given is what `scripts/compare_step.py` gives it: stage 3, parameters and optimizer on disk, buffers for the
largest parameter. Its set-up is there too. Each model is tried in the memory that ferrozero trained it in, by
docs/benchmarks.md; a run that is killed for it, or fails, is tried again with twice as much, up to the
machine's memory. From the project's root, as root where cgroups need it, with 30 GB of free disk:

    /tmp/peers/bin/python scripts/compare_scale.py --dir /path/on/the/disk

Prints a Markdown table: what became of each run, what was resident at most in one that ended, seconds of its
last step.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import compare_common as common
from memory_cgroup import Cgroup

# What the runs of scale_demo in docs/benchmarks.md had.
LIMITS_MIB = [213, 291, 2048]

# A process that barely fits reads its own code from disk again and again.
RUN_S = 600

MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def attempt(arguments, size, limit_bytes):
    """One run under a limit. Returns what became of it and whether it ran to its end."""
    _, layers, hidden, heads = size
    folder = arguments.dir / "deepspeed-scale"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = Path(__file__).with_name("compare_step.py")
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "vocab": 256,
        "seq": arguments.seq,
        "batch": 1,
    }
    command = [
        "timeout",
        RUN_S,
        sys.executable,
        script,
        "--dir",
        folder,
        "--sub-group-size",
        arguments.sub_group_size,
    ]
    for name, value in sizes.items():
        command += [f"--{name}", value]
    environment = {"OMP_NUM_THREADS": str(common.cpus()), "DS_ACCELERATOR": "cpu"}
    cgroup = Cgroup("peer", limit_bytes)
    peer, moment, steps, resident_bytes = None, "before step 1", [], None
    started = time.monotonic()
    try:
        peer = common.Peer("DeepSpeed", "deepspeed", arguments, environment, command, cgroup)
        for step in range(arguments.steps):
            moment = f"in step {step + 1}"
            steps.append(peer.ask("step"))
        resident_bytes = peer.finish(last_answer=True)["peak_resident_bytes"]
        outcome = "ran"
    except common.Unavailable as error:
        if peer:
            peer.kill()
        if cgroup.kills():
            outcome = f"killed {moment}"
        elif time.monotonic() - started >= RUN_S:
            outcome = f"not over in {RUN_S} s, {moment}"
        else:
            outcome = f"failed {moment}: {error}"
    finally:
        cgroup.remove()
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "outcome": outcome,
        "limit_bytes": limit_bytes,
        "peak_resident_bytes": resident_bytes,
        "steps": steps,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, default="ferrozero-scale", help="folder for the states; they are removed"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of each run")
    parser.add_argument("--seq", type=int, default=128, help="tokens of a step")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=range(len(common.SCALES)), help="which, from 0"
    )
    parser.add_argument("--memory-mib", type=int, help="the first limit, instead of what ferrozero had")
    parser.add_argument(
        "--sub-group-size", type=int, default=10_000_000, help="parameters that DeepSpeed updates at a time"
    )
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed prints")
    arguments = parser.parse_args()
    rows = []
    for index in arguments.sizes:
        limit_bytes, size = (arguments.memory_mib or LIMITS_MIB[index]) << 20, common.SCALES[index]
        while limit_bytes <= MACHINE_BYTES:
            tried = attempt(arguments, size, limit_bytes)
            print(json.dumps({"model": size[0], **tried}), file=sys.stderr, flush=True)
            ran = tried["outcome"] == "ran"
            resident = f"{tried['peak_resident_bytes'] / 2**20:.0f} MiB" if ran else ""
            last_s = f"{tried['steps'][-1]['step_s']:.1f}" if ran else ""
            limit = f"{limit_bytes / 2**20:.0f} MiB"
            rows.append([f"{size[1]} × {size[2]}", size[0], limit, tried["outcome"], resident, last_s])
            if ran:
                break
            limit_bytes *= 2
    common.table(["model", "parameters", "cgroup", "DeepSpeed", "peak resident", "s a step"], rows)


if __name__ == "__main__":
    main()
