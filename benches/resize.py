#!/usr/bin/env python3
"""The input of benches/resize.sh, and its times. Needs the environment of tests/peers/README.md.

    resize.py make FILE                                     a LoRA of rank 64, kohya's spelling, f32
    resize.py time LORATOOL WORK SD_SCRIPTS [ROUNDS]        sd-scripts and PEFT against loratool, in the same rounds

Factors are random, with singular values that fall like 1, 1/2, 1/3 …
"""

import os
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of torch must not spin while loratool runs

import torch
from safetensors.torch import load_file, save_file

RANK, SMALLER = 64, 16
# Width of a block of Stable Diffusion 1, and its number in `down_blocks`.
WIDTHS = {0: 320, 1: 640, 2: 1280}
TEXT = 768


def layers():
    """Flattened name, outputs and inputs of each layer."""
    for block, width in WIDTHS.items():
        for number in range(2):
            name = f"lora_unet_down_blocks_{block}_attentions_{number}_transformer_blocks_0"
            for attention, context in (("attn1", width), ("attn2", TEXT)):
                for part, inputs in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out_0", width)):
                    yield f"{name}_{attention}_{part}", width, inputs


def make(path):
    torch.manual_seed(3)
    tensors = {}
    falling = 1 / torch.arange(1, RANK + 1)
    for name, outputs, inputs in layers():
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, inputs) / inputs**0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, RANK) / outputs**0.5 * falling
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)


def sd_scripts(tree):
    """sd-scripts' own function, without the rest of it."""
    names = ("library", "library.train_util", "library.model_util", "library.utils", "tqdm")
    fakes = {name: types.ModuleType(name) for name in names}
    fakes["library"].train_util = fakes["library.train_util"]
    fakes["library"].model_util = fakes["library.model_util"]
    fakes["library.utils"].setup_logging = lambda: None
    fakes["tqdm"].tqdm = lambda items: items
    known = {name: sys.modules.get(name) for name in names}
    sys.modules.update(fakes)
    sys.path.insert(0, tree)
    try:
        from networks import resize_lora
    finally:
        sys.path.remove(tree)
        for name, module in known.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    return lambda tensors: resize_lora.resize_lora_model(
        tensors, SMALLER, SMALLER, torch.float32, "cpu", None, None, False
    )


def peft(tensors):
    """A model of the same layers with the adapter, and what resizes it."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Module()
    names = {name: name.removeprefix("lora_") for name, _, _ in layers()}  # PEFT passes over names with `lora_`
    for name, outputs, inputs in layers():
        model.add_module(names[name], torch.nn.Linear(inputs, outputs, bias=False))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(names.values())))
    with torch.no_grad():
        for name, own in names.items():
            layer = model.base_model.model.get_submodule(own)
            layer.lora_A["default"].weight.copy_(tensors[f"{name}.lora_down.weight"])
            layer.lora_B["default"].weight.copy_(tensors[f"{name}.lora_up.weight"])

    def resize():
        # Half of it twice: of one adapter alone it takes no SVD, and gives another rank to its configuration only.
        model.add_weighted_adapter(
            ["default"] * 2, [0.5] * 2, "smaller", combination_type="svd", svd_rank=SMALLER, svd_full_matrices=False
        )
        model.delete_adapter("smaller")

    return resize


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(tool, work, scripts, rounds):
    torch.set_num_threads(os.cpu_count())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; rank {RANK} to {SMALLER}, {rounds} rounds")
    source = Path(work) / "lora.safetensors"
    tensors = load_file(source)
    kohya, with_peft = sd_scripts(scripts), peft(tensors)
    seconds = {"loratool": [], "sd-scripts": [], "PEFT": []}
    for number in range(rounds):
        output = Path(work) / f"out-{number}.safetensors"
        command = [tool, "resize", source, "--rank", SMALLER, "--output", output, "--quiet"]
        command = [str(part) for part in command]
        seconds["loratool"].append(timed(lambda: subprocess.run(command, check=True)))
        seconds["sd-scripts"].append(timed(lambda: kohya(tensors)))
        seconds["PEFT"].append(timed(with_peft))
    for name, taken in seconds.items():
        ratios = [other / own for other, own in zip(taken, seconds["loratool"])]
        print(
            f"{name}: median {statistics.median(taken):.2f} s ({' '.join(f'{t:.2f}' for t in taken)}), "
            f"{statistics.median(ratios):.0f} times as long ({min(ratios):.0f} to {max(ratios):.0f})"
        )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", path]:
            make(path)
        case ["time", tool, work, scripts, *rounds]:
            times(tool, work, scripts, int(rounds[0]) if rounds else 3)
        case _:
            sys.exit(__doc__)
