#!/usr/bin/env python3
"""Eight adapters of rank 16 to rank 32, by `loratool combine` and by PEFT: see combine.sh.

    combine.py LORATOOL WORK ROUNDS
"""
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub

import peft
import torch
from safetensors.torch import load_file

COUNT, RANK, WANTED, SIDE = 8, 16, 32, 4096
tool, work, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
warnings.simplefilter("ignore")
torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(SIDE, SIDE, bias=False)


names = [f"a{index}" for index in range(COUNT)]
strengths = [0.3 + 0.1 * index for index in range(COUNT)]
config = lambda: peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"], init_lora_weights=False)
model = peft.get_peft_model(Model(), config(), adapter_name=names[0])
for name in names[1:]:
    model.add_adapter(name, config())
shutil.rmtree(work / "adapters", ignore_errors=True)
model.save_pretrained(work / "adapters")

command = [tool, "combine", "--rank", str(WANTED), "--quiet", "--force", "--output", str(work / "out")]
for name, strength in zip(names, strengths):
    command += ["--adapter", str(work / "adapters" / name), "--strength", str(strength)]


def ours() -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


ours()  # the page cache
before = [ours() for _ in range(rounds)]
start = time.perf_counter()
model.base_model.add_weighted_adapter(names, strengths, "all", combination_type="svd", svd_rank=WANTED)
theirs = time.perf_counter() - start
after = [ours() for _ in range(rounds)]


def change(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return b.double() @ a.double()


layer = model.base_model.model.layer
wanted = sum(w * 2 * change(layer.lora_A[n].weight, layer.lora_B[n].weight) for n, w in zip(names, strengths)).detach()
tensors = load_file(work / "out/adapter_model.safetensors")
key = "base_model.model.layer.lora_"
config = peft.LoraConfig.from_pretrained(work / "out")
scale = config.lora_alpha / config.r
left = lambda value: (wanted - value).norm() / wanted.norm()
seconds = statistics.median(before + after)
print(f"peft {peft.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads: {theirs:.2f} s, "
      f"residual {left(change(layer.lora_A['all'].weight, layer.lora_B['all'].weight)):.6f}")
print(f"loratool, median of {2 * rounds}: {seconds:.4f} s ({min(before + after):.4f} to {max(before + after):.4f}), "
      f"residual {left(scale * change(tensors[key + 'A.weight'], tensors[key + 'B.weight'])):.6f}")
print(f"ratio {theirs / seconds:.0f}")
