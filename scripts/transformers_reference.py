#!/usr/bin/env python3
"""Writes what tests/it/pretrained.rs compares with: tiny models with random weights as transformers saves
them, and their loss, gradients and greedy continuation.

    python3 -m pip install torch transformers safetensors
    python3 scripts/transformers_reference.py tests/data/pretrained
    python3 scripts/transformers_reference.py --gguf MODEL.gguf FOLDER  # of a real one; needs gguf
"""

import argparse
import json
import os
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Tokens that follow a prompt.
GENERATED = 50
# Numbers, quotes, line ends and a letter that is no ASCII.
TEXT = """Training a model of P parameters with AdamW in 32-bit numbers keeps 16·P bytes: the parameters, \
their gradients, and two
moments. A model of 1,300 million parameters therefore needs about 21 GB, and that doesn't count its \
activations. A machine with less
memory than that still has a disk, and a disk is fast when it is read and written in large, aligned requests \
that are known in advance.

"A training step is known in advance," said the engineer in 2021; "it does the same things in the same order \
every time."
"""

LLAMA = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
TINY = {
    "llama": transformers.LlamaConfig(
        **LLAMA,
        head_dim=8,
        tie_word_embeddings=False,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_yarn": transformers.LlamaConfig(
        **LLAMA,
        head_dim=12,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=4.0, original_max_position_embeddings=16),
    ),
    # Windows shorter than the text: of every layer, and of the second alone.
    "mistral": transformers.MistralConfig(
        **LLAMA, head_dim=8, tie_word_embeddings=False, rope_theta=10000.0, sliding_window=9
    ),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen2_window": transformers.Qwen2Config(
        **LLAMA, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=12, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


def tokens_of(count, vocabulary):
    """A text that needs no tokenizer: the same numbers as in the test."""
    state, tokens = 1, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        tokens.append((state >> 33) % vocabulary)
    return tokens


def write_reference(folder, model, tokens, prompt, every=1, text=None):
    """Writes the loss of a text, whole gradients of every so manieth parameter, and the greedy continuation
    of its first tokens.
    """
    model = model.eval()
    batch = torch.tensor([tokens])
    loss = model(batch, labels=batch).loss
    loss.backward()
    named = list(model.named_parameters())[::every]
    save_file(
        {name: parameter.grad.contiguous() for name, parameter in named}, folder / "gradients.safetensors"
    )
    continuation = model.generate(
        batch[:, :prompt],
        attention_mask=torch.ones(1, prompt, dtype=torch.long),
        do_sample=False,
        max_new_tokens=GENERATED,
        min_new_tokens=GENERATED,
        pad_token_id=0,
    )[0].tolist()
    reference = {"tokens": tokens, "loss": loss.item(), "prompt": prompt, "continuation": continuation}
    (folder / "reference.json").write_text(json.dumps(reference | ({"text": text} if text else {})))


def of_gguf(path, folder):
    """A real model on a real text, cut by the tokenizer that its file carries."""
    where, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    tokens = AutoTokenizer.from_pretrained(where, gguf_file=name)(TEXT, add_special_tokens=False).input_ids
    # Ten of 272, not always the same one of the nine of a layer.
    every = len(list(model.named_parameters())) // 10 + 2
    folder.mkdir(parents=True, exist_ok=True)
    write_reference(folder, model, tokens, 24, every, TEXT)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf")
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.gguf:
        return of_gguf(arguments.gguf, arguments.out)
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
        write_reference(folder, model, tokens_of(32, 96), 12)


if __name__ == "__main__":
    main()
