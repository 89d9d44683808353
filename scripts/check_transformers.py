#!/usr/bin/env python3
"""Checks that a folder which `ferrozero finetune` wrote is loaded by transformers, with all of its weights.

    python3 -m pip install torch transformers
    python3 scripts/check_transformers.py DIR [--text TEXT]
"""

import argparse
import sys

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    sys.exit(f"{error}: python3 -m pip install torch transformers")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--text", default="The quick brown fox jumps over the lazy dog.")
    arguments = parser.parse_args()
    model, loading = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: value for key, value in loading.items() if value}
    if wrong:
        sys.exit(f"{arguments.folder}: {wrong}")
    tokens = AutoTokenizer.from_pretrained(arguments.folder)(arguments.text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    if not 0 < loss < float("inf"):
        sys.exit(f"{arguments.folder}: the loss is {loss}")
    print(f"{arguments.folder}: loaded by transformers, {tokens.shape[1]} tokens, loss {loss:.4f}")


if __name__ == "__main__":
    main()
