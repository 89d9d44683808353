#!/usr/bin/env python3
"""Compares forward and backward of ferrozero's fused operations on the CPU with the same composed of candle's
own, and with PyTorch's.

All in f32, each side in a process of its own with the same number of threads; they take turns operation by
operation, so that all see the same machine. `block` is a pre-norm transformer block; PyTorch's is its
TransformerEncoderLayer with a causal mask. A ratio of 1.0 or more means that ferrozero is at least as fast.
Set-up and use, from the project's root:

    cargo build --release
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy
    /tmp/peers/bin/python scripts/compare_ops.py
"""

import json
import sys
import time

import compare_common as common

OURS, CANDLE, TORCH = "ferrozero", "candle", "PyTorch"
SIZES = {
    "batch": (4, "sequences"),
    "seq": (256, "tokens of a sequence"),
    "hidden": (768, "width of the model"),
    "heads": (12, "attention heads"),
    "vocab": (32_000, "different tokens"),
}
OPERATIONS = [
    "linear",
    "layer_norm",
    "rms_norm",
    "gelu",
    "swiglu",
    "rope",
    "causal_attention",
    "embedding",
    "cross_entropy",
    "linear_cross_entropy",
    "block",
]


def operations(arguments):
    """PyTorch's counterpart of each operation, by name: what it runs, and the inputs that get gradients."""
    torch = common.need("torch")
    functional = torch.nn.functional
    b, t, c, h, v = (getattr(arguments, name) for name in SIZES)
    d = c // h

    def inputs(*shapes):
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    targets = torch.randint(v, (b * t,))
    cos, sin = (torch.randn(t, d // 2) for _ in range(2))

    def rope(xs):
        first, second = xs.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def attention(qkv):
        q, k, v = (part.view(b, t, h, d).transpose(1, 2) for part in qkv.split(c, 2))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).reshape(b, t, c)

    def swiglu(xs):
        gate, up = xs.chunk(2, -1)
        return functional.silu(gate) * up

    layer = torch.nn.TransformerEncoderLayer(
        c, h, 4 * c, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    mask = torch.nn.Transformer.generate_square_subsequent_mask(t)

    def linear_cross_entropy(hidden, weight):
        return functional.cross_entropy(functional.linear(hidden, weight), targets)

    return {
        "linear": (functional.linear, inputs((b, t, c), (4 * c, c), (4 * c,))),
        "layer_norm": (lambda x, w, b: functional.layer_norm(x, (c,), w, b), inputs((b, t, c), (c,), (c,))),
        "rms_norm": (lambda x, w: functional.rms_norm(x, (c,), w), inputs((b, t, c), (c,))),
        "gelu": (lambda x: functional.gelu(x, approximate="tanh"), inputs((b, t, 4 * c))),
        "swiglu": (swiglu, inputs((b, t, 8 * c))),
        "rope": (rope, inputs((b, h, t, d))),
        "causal_attention": (attention, inputs((b, t, 3 * c))),
        "embedding": (lambda table: functional.embedding(targets, table), inputs((v, c))),
        "cross_entropy": (lambda logits: functional.cross_entropy(logits, targets), inputs((b * t, v))),
        "linear_cross_entropy": (linear_cross_entropy, inputs((b * t, c), (v, c))),
        "block": (lambda xs: layer(xs, src_mask=mask, is_causal=True), inputs((b, t, c))),
    }, list(layer.parameters())


def start_peer(arguments):
    """PyTorch's process."""
    torch = common.need("torch")
    known, parameters = operations(arguments)

    def run(name):
        operation, inputs = known[name]
        for tensor in [*inputs, *parameters]:
            tensor.grad = None
        started = time.perf_counter()
        result = operation(*inputs)
        result.backward(torch.ones_like(result))
        return time.perf_counter() - started

    return f"torch {torch.__version__}", run, None


def main():
    options = common.parser("Fused operations on the CPU: ferrozero, candle and PyTorch in turns.")
    for name, (size, meaning) in SIZES.items():
        options.add_argument(f"--{name}", type=int, default=size, help=meaning)
    options.add_argument(
        "--operations",
        nargs="+",
        choices=OPERATIONS,
        default=OPERATIONS,
        metavar="NAME",
        help="those to measure",
    )
    arguments = common.parse(options)
    if any(getattr(arguments, name) < 1 for name in SIZES) or arguments.hidden % (2 * arguments.heads):
        options.error("sizes must be at least 1, and --hidden a multiple of twice the --heads")
    if arguments.serve_peer:
        return common.serve(start_peer, arguments)

    command = [arguments.binary, "bench", "ops"]
    for name in SIZES:
        command += [f"--{name}", getattr(arguments, name)]
    sides = {OURS: "ours", CANDLE: "composed"}
    own = [common.Server(name, [*command, "--serve", side]) for name, side in sides.items()]
    peers = [(TORCH, "torch", {"OMP_NUM_THREADS": str(common.cpus())})]
    servers, unavailable = common.start_peers(peers, arguments)
    answers = common.take_turns([*own, *servers], arguments.operations, arguments.rounds, unavailable)
    for server in [*own, *servers]:
        if server.name in answers:
            server.finish()
    if OURS not in answers:
        sys.exit(f"{OURS}: {unavailable[OURS]}")
    times = {
        name: {each: common.median(seconds) for each, seconds in answers[name].items()} for name in answers
    }
    ratios = {
        name: {each: spread["median"] / times[OURS][each]["median"] for each, spread in times[name].items()}
        for name in times
        if name != OURS
    }
    versions = [server.versions for server in servers]
    if arguments.json:
        result = {
            "processor": common.processor(),
            "versions": versions,
            "rounds": arguments.rounds,
            "seconds": times,
            "ratio": ratios,
            "skipped": unavailable,
        }
        print(json.dumps(result))
        return None
    print(f"{common.cpus()} CPUs, {common.processor()}, {', '.join(versions)}\n")
    head = ["forward and backward", "ours", "least to most"]
    for name in ratios:
        head += [name, "its time / ours"]
    rows = []
    for each, spread in times[OURS].items():
        row = [each, f"{1e3 * spread['median']:.1f} ms"]
        row.append(f"{1e3 * spread['least']:.1f} to {1e3 * spread['most']:.1f}")
        for name, ratio in ratios.items():
            row += [f"{1e3 * times[name][each]['median']:.1f} ms", f"{ratio[each]:.2f}"]
        rows.append(row)
    common.table(head, rows)
    common.print_skipped(unavailable)
    return None


if __name__ == "__main__":
    main()
