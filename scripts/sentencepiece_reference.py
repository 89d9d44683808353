#!/usr/bin/env python3
"""Writes what tests/it/gguf.rs compares with: a small vocabulary that SentencePiece has learnt, as a GGUF
file has it, and how SentencePiece cuts some texts with it.

    python3 -m pip install sentencepiece
    python3 scripts/sentencepiece_reference.py tests/data/sentencepiece.json
"""

import json
import pathlib
import sys
import tempfile

import sentencepiece

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Spaces of all kinds, numbers, characters that are no pieces, and words that were not learnt from.
TEXTS = [
    "A training step is known in advance.",
    " two spaces before,  two within, one behind ",
    "numbers: 1234567890, 3.14159, 0x1f",
    "naïve façade, 16·P bytes, 日本語, 🦀🦀",
    "line one\n\tline two\n\nline four\r\n",
    "aaaaaaa bbbbb the the thethethe THE",
    'fn main() { println!("{}", 1 + 2); }',
    "▁ is what it writes for a space",
    "zymurgy quixotic xylophone",
    "a",
    # What GGUF files are read by puts a space behind it, and SentencePiece does not.
    "a user's piece at the end <extra>",
]


def main():
    options = dict(
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.999,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<extra>"],
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/model"
        sentencepiece.SentencePieceTrainer.train(
            input=str(ROOT / "ARCHITECTURE.md"), model_prefix=prefix, **options
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")

    def kind(token):
        tests = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6), (model.is_unused, 5)]
        return next(
            (number for test, number in tests if test(token)),
            4 if model.id_to_piece(token) == "<extra>" else 1,
        )

    tokens = range(model.get_piece_size())
    reference = {
        "tokens": [model.id_to_piece(token) for token in tokens],
        "scores": [model.get_score(token) for token in tokens],
        "kinds": [kind(token) for token in tokens],
        "texts": [{"text": text, "tokens": model.encode(text)} for text in TEXTS],
    }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(reference, ensure_ascii=False) + "\n")


main()
