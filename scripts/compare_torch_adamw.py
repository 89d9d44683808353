#!/usr/bin/env python3
"""Compares ferrozero's AdamW on the CPU with torch.optim.AdamW(fused=True) and DeepSpeed's DeepSpeedCPUAdam.

Each updates the same number of f32 parameters with f32 states, in a process of its own, with the same number
of threads; they take turns update by update, so that all see the same machine. A ratio of 1.0 or more means
that ferrozero is at least as fast. Set-up and use, from the project's root:

    cargo build --release
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy setuptools wheel
    DS_ACCELERATOR=cpu /tmp/peers/bin/pip install --no-build-isolation deepspeed
    /tmp/peers/bin/python scripts/compare_torch_adamw.py

DeepSpeed builds its optimizer at first use, which takes minutes and needs g++ and Python's headers (Debian:
g++, python3-dev).
"""

import json
import time

import compare_common as common

# As in `ferrozero bench adamw`.
PARAMETER, GRADIENT = 0.5, 0.01
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

OURS, TORCH, DEEPSPEED = "ferrozero", "torch.optim.AdamW(fused=True)", "DeepSpeedCPUAdam"


def start_peer(arguments):
    """A peer's process: an optimizer and its one parameter."""
    torch = common.need("torch")
    torch.set_num_threads(arguments.threads)
    parameter = torch.nn.Parameter(torch.full((arguments.elements,), PARAMETER))
    parameter.grad = torch.full((arguments.elements,), GRADIENT)
    if arguments.serve_peer == "torch":
        versions = f"torch {torch.__version__}"
        optimizer = torch.optim.AdamW([parameter], fused=True, **SETTINGS)
    else:
        adam = common.need("deepspeed.ops.adam").DeepSpeedCPUAdam
        versions = f"deepspeed {common.need('deepspeed').__version__}"
        optimizer = adam([parameter], adamw_mode=True, **SETTINGS)

    def update(_):
        started = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - started

    return versions, update, None


def main():
    options = common.parser("AdamW on the CPU: ferrozero, PyTorch and DeepSpeed in turns.")
    options.set_defaults(rounds=7)
    options.add_argument("--elements", type=int, default=64 << 20, help="parameters")
    options.add_argument("--threads", type=int, default=2, help="threads of each")
    arguments = common.parse(options)
    if arguments.elements < 1 or arguments.threads < 1:
        options.error("--elements and --threads must be at least 1")
    if arguments.serve_peer:
        return common.serve(start_peer, arguments)

    command = [arguments.binary, "bench", "adamw", "--serve"]
    command += ["--elements", arguments.elements, "--threads", arguments.threads]
    ours = common.Server(OURS, command)
    environment = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "DS_ACCELERATOR": "cpu",
        # Huge pages, which ferrozero's arena asks the kernel for too.
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    peers = [(TORCH, "torch", environment), (DEEPSPEED, "deepspeed", environment)]
    servers, unavailable = common.start_peers(peers, arguments)
    answers = common.take_turns([ours, *servers], ["update"], arguments.rounds, unavailable)
    versions = [server.versions for server in servers if server.name in answers]
    for name in answers:
        next(server for server in [ours, *servers] if server.name == name).finish()

    times = {name: common.median(answer["update"]) for name, answer in answers.items()}
    ratio = {name: times[name]["median"] / times[OURS]["median"] for name in times if name != OURS}
    if arguments.json:
        result = {
            "processor": common.processor(),
            "versions": versions,
            "elements": arguments.elements,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "update_s": times,
            "ratio": ratio,
            "skipped": unavailable,
        }
        print(json.dumps(result))
        return None
    versions = "".join(f", {version}" for version in versions)
    sizes = f"{arguments.elements / 2**20:g} Mi parameters, {arguments.threads} threads"
    print(f"{sizes}, {common.processor()}{versions}\n")
    rows = []
    for name, spread in times.items():
        seconds = [f"{spread[key]:.4f} s" for key in ("median", "least", "most")]
        rows.append([name, *seconds, f"{ratio[name]:.2f}" if name in ratio else ""])
    common.table(["optimizer", "median", "least", "most", "its time / ours"], rows)
    common.print_skipped(unavailable)
    return None


if __name__ == "__main__":
    main()
