#!/usr/bin/env python3
"""Compares forward and backward of ferrozero's fused operations on the CPU with PyTorch's.

All in f32, each side in a process of its own with the same number of threads; they take turns operation by operation, so
that both see the same machine. `block` is a pre-norm transformer block; PyTorch's is its TransformerEncoderLayer with a
causal mask. A ratio of 1.0 or more means that ferrozero is at least as fast. Set-up and use, from the project's root:

    cargo build --release
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy
    /tmp/peers/bin/python scripts/compare_ops.py
"""

import json
import time

import compare_common as common

OURS, TORCH = "ferrozero", "PyTorch"
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
    options = common.parser("Fused operations on the CPU: ferrozero and PyTorch in turns.")
    for name, (size, meaning) in SIZES.items():
        options.add_argument(f"--{name}", type=int, default=size, help=meaning)
    arguments = common.parse(options)
    if any(getattr(arguments, name) < 1 for name in SIZES) or arguments.hidden % (2 * arguments.heads):
        options.error("sizes must be at least 1, and --hidden a multiple of twice the --heads")
    if arguments.serve_peer:
        return common.serve(start_peer, arguments)

    command = [arguments.binary, "bench", "ops", "--serve"]
    for name in SIZES:
        command += [f"--{name}", getattr(arguments, name)]
    ours = common.Server(OURS, command)
    peers = [(TORCH, "torch", {"OMP_NUM_THREADS": str(common.cpus())})]
    servers, unavailable = common.start_peers(peers, arguments)
    answers = common.take_turns([ours, *servers], OPERATIONS, arguments.rounds, unavailable)
    for server in [ours, *servers]:
        if server.name in answers:
            server.finish()
    times = {name: {each: common.median(answers[name][each]) for each in OPERATIONS} for name in answers}
    theirs = times.get(TORCH, {})
    ratios = {each: theirs[each]["median"] / times[OURS][each]["median"] for each in theirs}
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
    rows = []
    for each in OPERATIONS:
        spread = times[OURS][each]
        row = [each, f"{1e3 * spread['median']:.1f} ms"]
        row.append(f"{1e3 * spread['least']:.1f} to {1e3 * spread['most']:.1f}")
        if each in theirs:
            row += [f"{1e3 * theirs[each]['median']:.1f} ms", f"{ratios[each]:.2f}"]
        rows.append(row)
    common.table(["forward and backward", "ours", "least to most", "PyTorch", "its time / ours"], rows)
    common.print_skipped(unavailable)
    return None


if __name__ == "__main__":
    main()
