#!/usr/bin/env python3
"""Checks that a folder which `ferrozero finetune` wrote is loaded by transformers, with all of its weights;
with --adapters, that PEFT puts the adapters of another folder into a model and comes to the weights that
`--lora-merge` wrote into DIR.

    python3 -m pip install torch transformers
    python3 scripts/check_transformers.py DIR [--text TEXT]
    python3 -m pip install peft
    python3 scripts/check_transformers.py MERGED_DIR --adapters ADAPTERS_DIR --base MODEL_DIR
"""

import argparse
import sys

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    sys.exit(f"{error}: python3 -m pip install torch transformers")


def check_adapters(merged, adapters, base):
    try:
        from peft import PeftModel
    except ImportError as error:
        sys.exit(f"{error}: python3 -m pip install peft")
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(load(base), adapters).merge_and_unload()
    ours = load(merged).state_dict()
    furthest = max((value - ours[name]).abs().max().item() for name, value in model.state_dict().items())
    print(f"{adapters}: loaded by PEFT, merged weights within {furthest:.1e} of {merged}")
    if furthest > 1e-6:
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--text", default="The quick brown fox jumps over the lazy dog.")
    parser.add_argument("--adapters")
    parser.add_argument("--base")
    arguments = parser.parse_args()
    if arguments.adapters:
        return check_adapters(arguments.folder, arguments.adapters, arguments.base)
    model, loading = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: value for key, value in loading.items() if value}
    if wrong:
        sys.exit(f"{arguments.folder}: {wrong}")
    tokens = AutoTokenizer.from_pretrained(arguments.folder)(arguments.text, return_tensors="pt").input_ids
    if tokens.shape[1] < 2:
        sys.exit(
            f"{arguments.folder}: its tokenizer makes {tokens.shape[1]} tokens of the text: "
            "give a longer --text, or see what class tokenizer_config.json says"
        )
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    if not 0 < loss < float("inf"):
        sys.exit(f"{arguments.folder}: the loss is {loss}")
    print(f"{arguments.folder}: loaded by transformers, {tokens.shape[1]} tokens, loss {loss:.4f}")


if __name__ == "__main__":
    main()
