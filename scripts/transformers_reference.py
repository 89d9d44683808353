#!/usr/bin/env python3
"""Writes what tests/pretrained.rs compares with: tiny models with random weights as transformers saves them, and their loss,
gradients and greedy continuation.

    python3 -m pip install torch transformers safetensors
    python3 scripts/transformers_reference.py tests/data/pretrained
    python3 scripts/transformers_reference.py --gguf MODEL.gguf reference.json     # of a real one (and pip install gguf)
"""

import argparse
import json
import os
import pathlib

import torch
import transformers
from transformers import AutoModelForCausalLM

LLAMA = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None)
TINY = {
    "llama": transformers.LlamaConfig(
        **LLAMA, head_dim=8, tie_word_embeddings=False, rope_theta=500000.0,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=16)),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=12, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0,
                                    embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None),
}


def tokens_of(count, vocabulary):
    """A text that needs no tokenizer: the same numbers as in the test."""
    state, tokens = 1, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        tokens.append((state >> 33) % vocabulary)
    return tokens


def reference(model, tokens, generated, every):
    """Loss and gradients of a text, and what follows its beginning."""
    model = model.eval()
    model.zero_grad()
    batch = torch.tensor([tokens])
    loss = model(batch, labels=batch).loss
    loss.backward()
    named = list(model.named_parameters())
    gradients = {name: parameter.grad.flatten().tolist()[:64] for name, parameter in named[::every]}
    context = tokens[: len(tokens) // 2]
    with torch.no_grad():
        for _ in range(generated):
            context = context + [int(model(torch.tensor([context])).logits[0, -1].argmax())]
    return {"tokens": tokens, "loss": loss.item(), "gradients": gradients, "continuation": context}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf")
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.gguf:
        folder, name = os.path.split(os.path.abspath(arguments.gguf))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokens = tokens_of(64, 49000)
        every = max(1, len(list(model.named_parameters())) // 10)
        arguments.out.write_text(json.dumps(reference(model, tokens, 50, every)))
        return
    for name, config in TINY.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model = model.to(torch.bfloat16).float()
        folder = arguments.out / name
        model.to(torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "reference.json").write_text(json.dumps(reference(model, tokens_of(32, 96), 12, 1)))


if __name__ == "__main__":
    main()
