#!/usr/bin/env python3
"""Writes the losses that tests/it/parity.rs compares the engine with: 20 steps of a small GPT in PyTorch, in
f32.

The initial values are the engine's own, which the test exports. Set-up and use, from the project's root:

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy safetensors
    FERROZERO_EXPORT_INITIAL=/tmp/initial.safetensors cargo test --test it parity pytorch  # may fail
    /tmp/peers/bin/python scripts/torch_reference.py /tmp/initial.safetensors >tests/data/torch_reference.json
"""

import json
import math
import struct
import sys

import torch
import torch.nn.functional as F

LAYERS, HIDDEN, HEADS, VOCABULARY, SEQUENCE, BATCH, STEPS = 4, 64, 4, 96, 32, 2, 20


def load(path):
    """Reads a safetensors file of f32 tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = bytearray(file.read())
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            values = torch.frombuffer(data[start:end], dtype=torch.float32).clone()
            weights[name] = values.reshape(entry["shape"]).requires_grad_()
    return weights


def batch(step):
    """The tokens of a step, from the same congruential generator as in the test."""
    state, tokens = step + 1, []
    for _ in range(BATCH * (SEQUENCE + 1)):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        tokens.append((state >> 33) % VOCABULARY)
    tokens = torch.tensor(tokens).reshape(BATCH, SEQUENCE + 1)
    return tokens[:, :-1], tokens[:, 1:]


def loss(weights, inputs, targets):
    """GPT-2 with pre-norm blocks, tanh GELU and a head tied to the token embedding."""

    def norm(xs, name):
        return F.layer_norm(xs, (HIDDEN,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(xs, name):
        return F.linear(xs, weights[f"{name}.weight"], weights[f"{name}.bias"])

    xs = weights["wte.weight"][inputs] + weights["wpe.weight"][: inputs.shape[1]]
    for i in range(LAYERS):
        qkv = linear(norm(xs, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (
            part.reshape(BATCH, -1, HEADS, HIDDEN // HEADS).transpose(1, 2) for part in qkv.split(HIDDEN, 2)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(HIDDEN // HEADS)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(mask, -math.inf).softmax(-1) @ v
        xs = xs + linear(attended.transpose(1, 2).reshape(BATCH, -1, HIDDEN), f"h.{i}.attn.c_proj")
        hidden = F.gelu(linear(norm(xs, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        xs = xs + linear(hidden, f"h.{i}.mlp.c_proj")
    logits = norm(xs, "ln_f") @ weights["wte.weight"].T
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))


def main():
    weights = load(sys.argv[1])
    decays = [weight for weight in weights.values() if weight.dim() >= 2]
    others = [weight for weight in weights.values() if weight.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(STEPS):
        value = loss(weights, *batch(step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(round(value.item(), 7))
    print(
        json.dumps(
            {
                "made_by": "scripts/torch_reference.py",
                "torch": torch.__version__.split("+")[0],
                "losses": losses,
            },
            indent=1,
        )
    )


main()
