#!/usr/bin/env python3
"""The arithmetic of a merge in torch on a GPU: W + scale * B A of each layer, from host memory to host memory, in bf16.

    devices.py BASE ADAPTER ROUNDS

Prints seconds for each round. Files are read before, nothing is written: a yardstick for the products and the carrying
alone. f32 and TF32 off, as people merge.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

base, adapter, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
weights = {}
for shard in sorted(base.glob("*.safetensors")):
    weights |= load_file(shard)
factors = load_file(adapter / "adapter_model.safetensors")
config = json.loads((adapter / "adapter_config.json").read_text())
scale = config["lora_alpha"] / config["r"]
pairs = []
for key, down in factors.items():
    if key.endswith("lora_A.weight"):
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        pairs.append((weights[name], down, factors[key.replace("lora_A", "lora_B")]))
assert pairs, "the adapter fits the base"
times = []
for _ in range(rounds + 1):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for weight, down, up in pairs:
        delta = (up.cuda() @ down.cuda()) * scale
        (weight.cuda().float() + delta).to(torch.bfloat16).cpu()
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
times = times[1:]  # the first loads kernels
print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}: {statistics.median(times):.3f} s "
      f"for {len(pairs)} layers ({' '.join(f'{t:.3f}' for t in times)})")
