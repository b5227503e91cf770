#!/usr/bin/env python3
"""Let PEFT load what `loratool resize` writes, and compare its merge with that of loratool.

    PEERS/bin/python tests/peers/resize.py --loratool target/release/loratool

Adapters and models are those of `fixtures/peft`; each adapter gets ranks by every kind of rule. Compared are all weights
in f32, relative to the largest of their tensor. Exit status: 0 all agree, 1 some do not, 2 nothing was judged.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "peft"
CASES = (
    "lora lora_all_linear lora_patterns lora_pattern_caret lora_rslora lora_embedding lora_lora_bias lora_bias_all "
    "lora_modules_to_save lora_dora"
).split()
RULES = [["--rank", "2"], ["--rank", "9"], ["--energy", "0.8"], ["--sv-ratio", "2"], ["--budget", "12kB"]]
LIMIT = 1e-6


def resized(tool, case, rule, room):
    """How far the two merges are apart at most."""
    folder = FIXTURES / "cases" / case
    base = FIXTURES / json.loads((folder / "case.json").read_text())["base"]
    small, merged = room / "small", room / "merged"
    subprocess.run([tool, "resize", folder / "adapter", "--output", small, "--quiet", *rule], check=True)
    command = [tool, "merge", "--base", base, "--adapter", small, "--output", merged, "--dtype", "f32", "--quiet"]
    subprocess.run(command, check=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of factors that it has no place for
        model = PeftModel.from_pretrained(model, small)
    theirs = model.merge_and_unload().state_dict()
    ours = load_file(merged / "model.safetensors")
    gaps = [float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours if name in theirs]
    assert len(gaps) > 10, f"only {len(gaps)} tensors have a counterpart"
    return max(gaps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loratool", type=Path, required=True)
    tool = parser.parse_args().loratool.resolve()
    judged, wrong = 0, 0
    print("| adapter | " + " | ".join(" ".join(rule) for rule in RULES) + " |")
    print("| --- |" + " --- |" * len(RULES))
    for case in CASES:
        cells = []
        for rule in RULES:
            with tempfile.TemporaryDirectory() as room:
                gap = resized(tool, case, rule, Path(room))
            judged, wrong = judged + 1, wrong + (gap > LIMIT)
            cells.append(f"{gap:.1e}" if gap <= LIMIT else f"**{gap:.1e}**")
        print(f"| {case} | " + " | ".join(cells) + " |")
    return 2 if not judged else int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
