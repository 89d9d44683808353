#!/usr/bin/env python3
"""Compares ferrozero's disk store with DeepSpeed's DeepNVMe (its aio_handle): reads and writes of equal size.

Both use O_DIRECT and page-locked memory, each in a process of its own; they take turns, a write and a read
each, so that both see the same disk. DeepSpeed first tries several settings, and is measured with the fastest
one for reads and the fastest one for writes. A ratio of 1.0 or more means that ferrozero is at least as fast.
Set-up and use, from the project's root:

    cargo build --release
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy setuptools wheel
    DS_ACCELERATOR=cpu /tmp/peers/bin/pip install --no-build-isolation deepspeed
    /tmp/peers/bin/python scripts/compare_deepnvme.py --dir /path/on/the/disk

DeepSpeed builds its extension at first use, which takes minutes and needs g++, libaio's and Python's headers
(Debian: g++, libaio-dev, python3-dev). Page-locked memory counts against `ulimit -l`.
"""

import contextlib
import itertools
import json
import re
import shutil
import sys
import time
from pathlib import Path

import compare_common as common

OURS, DEEPSPEED = "ferrozero", "DeepSpeed aio_handle"
REQUESTS = ("write", "read")

# DeepNVMe's settings: around what its documentation recommends.
BLOCK_BYTES, QUEUE_DEPTHS, THREADS = (1 << 20, 8 << 20), (32, 128), (1, 2, 4)

# Turns of each setting while looking for the fastest; the best counts.
TRIALS = 2


def byte_count(text):
    """A number of bytes, such as 4096, 256MiB or 1GiB."""
    match = re.fullmatch(r"(\d+)\s*(|KiB|MiB|GiB)", text)
    if not match:
        raise ValueError(text)
    return int(match[1]) << {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}[match[2]]


def start_peer(arguments):
    """The process of DeepSpeed: a pinned tensor, a file, and the fastest handle for each direction."""
    torch = common.need("torch")
    deepspeed = common.need("deepspeed")
    builder = common.need("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise common.Unavailable("DeepSpeed finds no libaio to build with (Debian: libaio-dev)")
    aio_handle = builder.load(verbose=False).aio_handle
    path = str(arguments.dir / "deepnvme")
    owner = aio_handle()
    tensor = owner.new_cpu_locked_tensor(arguments.bytes, torch.empty(0, dtype=torch.uint8))
    # Bytes that no disk can compress or leave out.
    tensor.copy_(torch.randint(256, (arguments.bytes,), dtype=torch.uint8))

    def move(handle, request):
        submit = handle.async_pread if request == "read" else handle.async_pwrite
        started = time.perf_counter()
        submit(tensor, path, 0)
        completed = handle.wait()
        seconds = time.perf_counter() - started
        if completed != 1:
            raise common.Unavailable(f"a {request} completed {completed} operations instead of 1")
        return seconds

    # The first write makes the file, which later ones don't.
    move(owner, "write")
    best = {}
    for block, depth, threads in itertools.product(BLOCK_BYTES, QUEUE_DEPTHS, THREADS):
        settings = {"block_size": block, "queue_depth": depth, "intra_op_parallelism": threads}
        handle = aio_handle(single_submit=False, overlap_events=True, **settings)
        for request in REQUESTS:
            seconds = min(move(handle, request) for _ in range(TRIALS))
            if request not in best or seconds < best[request][0]:
                best[request] = (seconds, handle, settings)
    versions = {
        "versions": f"deepspeed {deepspeed.__version__}, torch {torch.__version__}",
        "settings": {request: settings for request, (_, _, settings) in best.items()},
    }
    return versions, lambda request: {"seconds": move(best[request][1], request)}, None


def main():
    options = common.parser("Disk reads and writes: ferrozero's store and DeepSpeed's aio_handle in turns.")
    options.set_defaults(rounds=7)
    options.add_argument("--bytes", type=byte_count, default="1GiB", help="bytes of a read or write")
    folder = "folder for the files; removed afterwards"
    options.add_argument("--dir", type=Path, default="ferrozero-compare", help=folder)
    arguments = common.parse(options)
    if arguments.bytes < 1 << 20 or arguments.bytes % 4096:
        options.error("--bytes must be at least 1 MiB, and a multiple of 4096")
    if arguments.serve_peer:
        return common.serve(start_peer, arguments)
    if arguments.dir.exists():
        options.error(f"{arguments.dir} exists already; name a folder that can be removed afterwards")
    arguments.dir.mkdir(parents=True)
    try:
        return compare(arguments)
    finally:
        shutil.rmtree(arguments.dir, ignore_errors=True)


def compare(arguments):
    """Measures and reports."""
    command = [arguments.binary, "bench", "io", "--serve", "--bytes", arguments.bytes]
    ours = common.Server(OURS, [*command, "--dir", arguments.dir / "ferrozero"])
    environment = {"DS_ACCELERATOR": "cpu"}
    servers, unavailable = common.start_peers([(DEEPSPEED, "deepspeed", environment)], arguments)
    answers = common.take_turns([ours, *servers], REQUESTS, arguments.rounds, unavailable)
    peer = next((server.versions for server in servers if server.name in answers), None)
    for server in [ours, *servers]:
        # Ours has nothing to say at its end, and neither matters any more.
        with contextlib.suppress(OSError):
            server.finish()

    seconds = {
        name: {request: common.median([each["seconds"] for each in answer[request]]) for request in REQUESTS}
        for name, answer in answers.items()
    }
    ratio = None
    if peer is not None:
        theirs, our_own = seconds[DEEPSPEED], seconds[OURS]
        ratio = {name: theirs[name]["median"] / our_own[name]["median"] for name in REQUESTS}
    if arguments.json:
        result = {
            "bytes": arguments.bytes,
            "rounds": arguments.rounds,
            "seconds": seconds,
            "ratio": ratio,
            "deepspeed": peer,
            "skipped": unavailable,
        }
        print(json.dumps(result))
        return None
    print(f"{arguments.bytes / 2**20:g} MiB a turn{', ' + peer['versions'] if peer else ''}\n")
    rows = []
    for request in REQUESTS:
        for name in seconds:
            rate = {key: arguments.bytes / 1e9 / value for key, value in seconds[name][request].items()}
            # The least time is the most speed.
            cells = [f"{rate[key]:.2f} GB/s" for key in ("median", "most", "least")]
            last = f"{ratio[request]:.2f}" if ratio and name == OURS else ""
            rows.append([request, name, *cells, last])
    common.table(["", "store", "median", "least", "most", "ours / DeepSpeed's"], rows)
    if peer:
        for request, settings in peer["settings"].items():
            described = ", ".join(f"{name} {value}" for name, value in settings.items())
            print(f"\nDeepSpeed's fastest setting for a {request}: {described}")
    common.print_skipped(unavailable)
    return None


if __name__ == "__main__":
    sys.exit(main())
