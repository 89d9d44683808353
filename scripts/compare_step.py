#!/usr/bin/env python3
"""Compares training steps on the CPU: ferrozero with states on disk, PyTorch, and DeepSpeed's ZeRO-Infinity.

The model is a GPT in f32 whose blocks are recomputed in the backward pass, unless --keep-graphs, trained by
AdamW. With --config FILE it is the Llama-like model of a Hugging Face config.json, random, and PyTorch's is
transformers' own (pip install transformers); --smollm2 takes the shape of SmolLM2-135M:

- ferrozero: `bench step --placement disk`;
- PyTorch: everything in memory, torch.utils.checkpoint around each block, torch.optim.AdamW(fused=True);
- DeepSpeed: ZeRO stage 3 with parameters and optimizer offloaded to a folder on disk, the same checkpointing.

Each runs in a process of its own, and they take turns step by step, so that all see the same machine. The
peak resident memory is the whole process's, from its start on, as the kernel counts it (VmHWM). PyTorch and
DeepSpeed start from the same weights and see the same tokens, so their losses should agree; the report says
where they don't. Set-up and use, from the project's root:

    cargo build --release
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy setuptools wheel
    DS_ACCELERATOR=cpu /tmp/peers/bin/pip install --no-build-isolation deepspeed
    /tmp/peers/bin/python scripts/compare_step.py --dir /path/on/the/disk

DeepSpeed builds its extensions at first use, which takes minutes and needs g++, libaio's and Python's headers
(Debian: g++, libaio-dev, python3-dev). Page-locked memory counts against `ulimit -l`.
"""

import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import compare_common as common

OURS, TORCH, DEEPSPEED = "ferrozero, states on disk", "PyTorch, in memory", "DeepSpeed ZeRO-Infinity"
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SIZES = {
    "layers": (12, "transformer blocks"),
    "hidden": (768, "width of the model"),
    "heads": (12, "attention heads"),
    "vocab": (8192, "different tokens"),
    "seq": (256, "tokens of a sequence"),
    "batch": (4, "sequences of a step"),
}

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}

# What rounding changes in the loss of the second step is far below this; a wrong gradient is above it.
LOSS_TOLERANCE = 1e-3


def parameter_count(arguments):
    """Parameters of the model."""
    if arguments.config:
        shape = json.loads(arguments.config.read_text())
        width, layers, wide = (
            shape[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")
        )
        keys = shape["num_key_value_heads"] * width // shape["num_attention_heads"]
        heads = 1 if shape.get("tie_word_embeddings") else 2
        layer = 2 * width * (width + keys) + 3 * width * wide + 2 * width
        return heads * shape["vocab_size"] * width + layers * layer + width
    width = arguments.hidden
    embeddings = (arguments.vocab + arguments.seq) * width
    return embeddings + arguments.layers * (12 * width * width + 13 * width) + 2 * width


def gpt(arguments, use_reentrant):
    """GPT-2 with pre-norm blocks, tanh GELU and a head tied to the token embedding, as ferrozero's own."""
    torch = common.need("torch")
    nn, functional = torch.nn, torch.nn.functional
    checkpoint = common.need("torch.utils.checkpoint").checkpoint
    width = arguments.hidden

    # Initial values are made while a layer is: afterwards, ZeRO has them on disk.
    class Linear(nn.Linear):
        def __init__(self, inputs, outputs, stdev=0.02):
            self.stdev = stdev
            super().__init__(inputs, outputs)

        def reset_parameters(self):
            nn.init.normal_(self.weight, std=self.stdev)
            nn.init.zeros_(self.bias)

    class Embedding(nn.Embedding):
        def __init__(self, count, stdev):
            self.stdev = stdev
            super().__init__(count, width)

        def reset_parameters(self):
            nn.init.normal_(self.weight, std=self.stdev)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            residual = 0.02 / math.sqrt(2 * arguments.layers)
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.c_attn, self.c_proj = Linear(width, 3 * width), Linear(width, width, residual)
            self.c_fc, self.mlp_c_proj = Linear(width, 4 * width), Linear(4 * width, width, residual)

        def forward(self, xs):
            batch, tokens, _ = xs.shape
            qkv = self.c_attn(self.ln_1(xs)).split(width, 2)
            q, k, v = (part.view(batch, tokens, arguments.heads, -1).transpose(1, 2) for part in qkv)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            xs = xs + self.c_proj(attended.transpose(1, 2).reshape(batch, tokens, width))
            return xs + self.mlp_c_proj(functional.gelu(self.c_fc(self.ln_2(xs)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = Embedding(arguments.vocab, 0.02), Embedding(arguments.seq, 0.01)
            self.h = nn.ModuleList(Block() for _ in range(arguments.layers))
            self.ln_f = nn.LayerNorm(width)

        def forward(self, inputs, targets):
            xs = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1]))
            for block in self.h:
                keep = arguments.keep_graphs
                xs = block(xs) if keep else checkpoint(block, xs, use_reentrant=use_reentrant)
            logits = functional.linear(self.ln_f(xs), self.wte.weight)
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Gpt


def llama(arguments):
    """transformers' model of a config.json, with its layers recomputed in the backward pass unless their
    graphs are kept.
    """
    torch, transformers = common.need("torch"), common.need("transformers")
    config = transformers.AutoConfig.for_model(**json.loads(arguments.config.read_text()))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if not arguments.keep_graphs:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def loss(inputs, targets):
        logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss.parameters = model.parameters
    return loss


def decay_groups(model):
    """Parameters by whether they decay: matrices do. ZeRO keeps the whole shape beside what it partitions."""
    decay, others = [], []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decay if len(shape) >= 2 else others).append(parameter)
    return [{"params": decay}, {"params": others, "weight_decay": 0.0}]


def start_torch(arguments):
    """PyTorch with everything in memory. Returns its version, and what makes a step and returns the loss."""
    torch = common.need("torch")
    model = llama(arguments) if arguments.config else gpt(arguments, use_reentrant=False)()
    optimizer = torch.optim.AdamW(decay_groups(model), fused=True, **SETTINGS)

    def step(inputs, targets):
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return f"torch {torch.__version__}", step


def ask_once():
    """Works around DeepSpeed's issue 4072: it prefetches a recomputed block's parameters twice, and fails."""
    module = common.need("deepspeed.runtime.swap_tensor.partitioned_param_swapper")
    swapper = module.AsyncPartitionedParameterSwapper
    swap_in = swapper.swap_in

    def swap_in_once(self, params, *arguments, **options):
        return swap_in(self, list(dict.fromkeys(params)), *arguments, **options)

    swapper.swap_in = swap_in_once


def start_deepspeed(arguments):
    """ZeRO stage 3 with parameters and optimizer on disk, by DeepSpeed's own optimizer for that."""
    deepspeed = common.need("deepspeed")
    for builder in ("AsyncIOBuilder", "CPUAdamBuilder"):
        if not getattr(common.need("deepspeed.ops.op_builder"), builder)().is_compatible(verbose=False):
            raise common.Unavailable(f"{builder} finds nothing to build with (Debian: g++, libaio-dev)")
    # Alone, but ZeRO wants a process group.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)

    ask_once()
    folder = str(arguments.dir / "deepspeed")
    # A buffer holds the largest parameter, and there are enough for what one block uses and prefetches.
    largest = max(arguments.vocab, 4 * arguments.hidden, arguments.seq) * arguments.hidden
    config = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "sub_group_size": arguments.sub_group_size,
            "reduce_bucket_size": largest,
            "stage3_max_live_parameters": 4 * largest,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": largest,
            "stage3_param_persistence_threshold": 4 * arguments.hidden,
            "offload_param": {
                "device": "nvme",
                "nvme_path": folder,
                "pin_memory": False,
                "buffer_count": 8,
                "buffer_size": largest,
                "max_in_cpu": 0,
            },
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": folder,
                "pin_memory": False,
                "buffer_count": 12 if arguments.pipeline else 4,
                "pipeline_read": arguments.pipeline,
                "pipeline_write": arguments.pipeline,
            },
        },
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        # The other way keeps the weights that a recomputation used, whose buffers ZeRO reads others into
        # meanwhile: the gradients are then wrong, with no error.
        model = gpt(arguments, use_reentrant=True)()
    # The head uses it outside the module that owns it.
    deepspeed.zero.register_external_parameter(model, model.wte.weight)
    adam = common.need("deepspeed.ops.adam").DeepSpeedCPUAdam
    optimizer = adam(decay_groups(model), adamw_mode=True, **SETTINGS)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(inputs, targets):
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        return loss

    return f"deepspeed {deepspeed.__version__}", step


def start_peer(arguments):
    """A peer's process."""
    torch = common.need("torch")
    torch.manual_seed(1)
    versions, step = {"torch": start_torch, "deepspeed": start_deepspeed}[arguments.serve_peer](arguments)
    shape = (arguments.batch, arguments.seq)
    vocabulary = (
        json.loads(arguments.config.read_text())["vocab_size"] if arguments.config else arguments.vocab
    )

    def respond(_):
        inputs, targets = (torch.randint(vocabulary, shape) for _ in range(2))
        started = time.perf_counter()
        loss = step(inputs, targets).item()
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise common.Unavailable(f"its loss is {loss}")
        return {"step_s": seconds, "loss": loss}

    return versions, respond, lambda: {"peak_resident_bytes": common.peak_resident_bytes()}


def main():
    options = common.parser("Training steps on the CPU: ferrozero, PyTorch and DeepSpeed in turns.")
    for name, (size, meaning) in SIZES.items():
        options.add_argument(f"--{name}", type=int, default=size, help=meaning)
    folder = "folder for the states; removed afterwards"
    options.add_argument("--dir", type=Path, default="ferrozero-compare", help=folder)
    sub_group = "parameters that DeepSpeed updates at a time (its sub_group_size)"
    options.add_argument("--sub-group-size", type=int, default=10_000_000, help=sub_group)
    pipeline = "let DeepSpeed read and write states beside its updates, with three times the buffers"
    options.add_argument("--pipeline", action="store_true", help=pipeline)
    options.add_argument("--config", type=Path, help="config.json of a Llama-like model, in place of the GPT")
    keep = "compute nothing again in the backward, here and in PyTorch; without DeepSpeed"
    options.add_argument("--keep-graphs", action="store_true", help=keep)
    options.add_argument("--smollm2", action="store_true", help="the shape of SmolLM2-135M")
    arguments = common.parse(options)
    for name in SIZES:
        if getattr(arguments, name) < 1:
            options.error(f"--{name} must be at least 1")
    if arguments.hidden % arguments.heads:
        options.error("--hidden must be a multiple of --heads")
    if arguments.serve_peer:
        return common.serve(start_peer, arguments)
    if arguments.dir.exists():
        options.error(f"{arguments.dir} exists already; name a folder that can be removed afterwards")
    arguments.dir.mkdir(parents=True)
    try:
        if arguments.smollm2:
            arguments.config = arguments.dir / "config.json"
            arguments.config.write_text(json.dumps(SMOLLM2))
            # The processes of the peers are started with the same options.
            sys.argv = [each for each in sys.argv if each != "--smollm2"] + [
                "--config",
                str(arguments.config),
            ]
        return compare(arguments)
    finally:
        shutil.rmtree(arguments.dir, ignore_errors=True)


def compare(arguments):
    """Measures and reports."""
    command = [arguments.binary, "bench", "step", "--serve", "--placement", "disk"]
    if arguments.config:
        command += ["--config", arguments.config]
    for name in SIZES:
        command += [f"--{name}", getattr(arguments, name)]
    if arguments.keep_graphs:
        layers = (
            json.loads(arguments.config.read_text())["num_hidden_layers"]
            if arguments.config
            else arguments.layers
        )
        command += ["--kept", layers]
    ours = common.Server(OURS, [*command, "--dir", arguments.dir / "ferrozero"])
    environment = {"OMP_NUM_THREADS": str(common.cpus()), "DS_ACCELERATOR": "cpu"}
    peers = [(TORCH, "torch", environment)]
    if not (arguments.config or arguments.keep_graphs):
        peers.append((DEEPSPEED, "deepspeed", environment))
    servers, unavailable = common.start_peers(peers, arguments)
    answers = common.take_turns([ours, *servers], ["step"], arguments.rounds, unavailable)
    tokens = arguments.batch * arguments.seq
    measured, versions = {}, []
    for server in [ours, *servers]:
        if server.name not in answers:
            continue
        steps = common.median([step["step_s"] for step in answers[server.name]["step"]])
        if server is not ours:
            versions.append(server.versions)
        peak = server.finish(last_answer=True)["peak_resident_bytes"]
        speed = tokens / steps["median"]
        measured[server.name] = {"step_s": steps, "tokens_per_s": speed, "peak_resident_bytes": peak}
    # Above 1: ferrozero is faster, or takes less memory.
    ratio = {
        name: {
            "time": each["step_s"]["median"] / measured[OURS]["step_s"]["median"],
            "memory": each["peak_resident_bytes"] / measured[OURS]["peak_resident_bytes"],
        }
        for name, each in measured.items()
        if name != OURS
    }
    # The first measured step is the second one taken: it has the first update behind it.
    losses = {name: answers[name]["step"][0]["loss"] for name in (TORCH, DEEPSPEED) if name in answers}
    if arguments.json:
        result = {
            "processor": common.processor(),
            "cpus": common.cpus(),
            "versions": versions,
            "sizes": {name: getattr(arguments, name) for name in SIZES},
            "parameters": parameter_count(arguments),
            "rounds": arguments.rounds,
            "measured": measured,
            "ratio": ratio,
            "second_loss": losses,
            "skipped": unavailable,
        }
        print(json.dumps(result))
        return None
    facts = [f"{parameter_count(arguments) / 1e6:.1f} million parameters", f"{tokens} tokens a step"]
    print(", ".join([*facts, f"{common.cpus()} CPUs", common.processor(), *versions]) + "\n")
    rows = []
    for name, each in measured.items():
        spread = each["step_s"]
        row = [name, f"{spread['median']:.2f} s ({spread['least']:.2f} to {spread['most']:.2f})"]
        row += [f"{each['tokens_per_s']:.0f}", f"{each['peak_resident_bytes'] / 2**20:.0f} MiB"]
        row += [f"{ratio[name][of]:.2f}" if name in ratio else "" for of in ("time", "memory")]
        rows.append(row)
    head = ["engine", "median step", "tokens/s", "peak resident", "its time / ours", "its memory / ours"]
    common.table(head, rows)
    if len(losses) == 2 and abs(losses[TORCH] - losses[DEEPSPEED]) > LOSS_TOLERANCE:
        both = f"{losses[DEEPSPEED]:.5f} instead of {losses[TORCH]:.5f}"
        print(f"\nDeepSpeed's loss after the first update is {both}: it did not train what PyTorch did.")
    common.print_skipped(unavailable)
    return None


if __name__ == "__main__":
    sys.exit(main())
