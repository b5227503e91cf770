#!/usr/bin/env python3
"""Pairs for benches/extract.sh, and the times of single layers. Needs the environment of tests/peers/README.md.

    extract.py layers WORK                        pairs of one layer of 4096 x 4096
    extract.py pair DIR [--layers 3 --vocabulary 32000]    layers shaped as those of an 8B Llama, bf16
    extract.py time LORATOOL WORK [ROUNDS]        torch's SVDs against loratool, in the same rounds

Weights are random. A difference that decays has singular values 1, 1/2, 1/3 … and 1 % of the norm of the weights; the
tuned side is rounded to bf16 like a checkpoint, which adds noise of about a seventh of that. `clean` is not rounded.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of torch must not spin while loratool runs

import torch
from safetensors.torch import load_file, save_file

SIDE, RANK, RELATIVE = 4096, 32, 0.01
NAME = "model.layers.0.mlp.up_proj"
HIDDEN, INNER, KV = 4096, 14336, 1024
PARAMETERS_8B = 8_030_261_248  # Llama-3-8B: 32 layers, a vocabulary of 128,256 in embedding and head
LAYERS = [("decaying", "bf16"), ("decaying", "f32"), ("noise", "bf16"), ("noise", "f32"), ("clean", "f32")]
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def weights(*shape):
    return (0.02 * torch.randn(shape)).bfloat16().float()


def tuned(base, kind):
    """The base and a difference of that kind, in f32."""
    rows, columns = base.shape
    if kind == "noise":
        delta = torch.randn(rows, columns)
    elif rows == columns:  # every singular value
        left, right = (torch.linalg.qr(torch.randn(rows, rows))[0] for _ in range(2))
        delta = left / torch.arange(1, rows + 1) @ right
    else:  # the first 256, of directions that are nearly orthogonal
        delta = torch.randn(rows, 256) / torch.arange(1, 257) @ torch.randn(256, columns)
    return base + delta * (RELATIVE * base.norm() / delta.norm())


def write(folder, tensors, shards=1):
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = [names[n::shards] for n in range(shards)]
    index = {}
    for n, part in enumerate(parts):
        file = "model.safetensors" if shards == 1 else f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        index |= {name: file for name in part}
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def complete(folder, make):
    """Made under another name first: a run that was cut off leaves nothing that looks complete."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(folder)


def make_layers(work):
    for kind in ("decaying", "noise", "clean"):

        def make(part):
            torch.manual_seed(1)
            base = weights(SIDE, SIDE)
            after = tuned(base, kind)
            for dtype in [dtype for name, dtype in LAYERS if name == kind]:
                rounded = after if kind == "clean" else after.bfloat16()
                write(part / dtype / "base", {f"{NAME}.weight": base.to(TYPES[dtype])})
                write(part / dtype / "tuned", {f"{NAME}.weight": rounded.to(TYPES[dtype])})

        complete(work / kind, make)


def make_pair(folder, layers, vocabulary):
    def make(part):
        torch.manual_seed(2)
        shapes = {"model.embed_tokens": (vocabulary, HIDDEN)}
        if layers:
            shapes |= {"lm_head": (vocabulary, HIDDEN), "model.norm": (HIDDEN,)}
        for n in range(layers):
            attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
            shapes |= {f"{attention}.{name}_proj": (out, HIDDEN) for name, out in zip("qkvo", (HIDDEN, KV, KV, HIDDEN))}
            shapes |= {f"{mlp}.gate_proj": (INNER, HIDDEN), f"{mlp}.up_proj": (INNER, HIDDEN)}
            shapes |= {f"{mlp}.down_proj": (HIDDEN, INNER)}
            shapes |= {f"model.layers.{n}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
        before, after = {}, {}
        for name, shape in shapes.items():
            base = weights(*shape)
            changed = tuned(base, "decaying") if len(shape) > 1 else base + weights(*shape)
            before[f"{name}.weight"], after[f"{name}.weight"] = base.bfloat16(), changed.bfloat16()
        write(part / "base", before, 3 if layers else 1)
        write(part / "tuned", after, 4 if layers else 1)
        count = sum(tensor.numel() for tensor in before.values())
        (part / "parameters").write_text(f"{count} {PARAMETERS_8B / count:.4f}\n")

    complete(folder, make)


# ---------------------------------------------------------------- times

def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def loratool(program, pair, output, *options):
    """Seconds of the whole command, and of the arithmetic of the layer."""
    shutil.rmtree(output, ignore_errors=True)
    command = [program, "extract", "--base", pair / "base", "--tuned", pair / "tuned", "--output", output, "--rank", RANK,
               "--json", "--quiet", *options]
    seconds, done = timed(lambda: subprocess.run([str(part) for part in command], capture_output=True, text=True))
    if done.returncode:
        sys.exit(f"exit status {done.returncode}: {done.stderr}")
    return seconds, json.loads(done.stdout)["modules"][0]["seconds"]


def excess(delta, factors, best):
    """How far a residual is above the least possible one."""
    up, down = (factor.double() for factor in factors)
    return float((delta.double() - up @ down).norm()) / best - 1


def measure(program, work, rounds):
    torch.set_num_threads(os.cpu_count())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {SIDE} x {SIDE}, rank {RANK}, {rounds} rounds")
    ways = {"certified": (), "not certified": ("--tolerance", "none")}
    for kind, dtype in LAYERS:
        pair, output = work / kind / dtype, work / "out-layer"
        sides = [load_file(pair / side / "model.safetensors")[f"{NAME}.weight"].float() for side in ("base", "tuned")]
        delta = sides[1] - sides[0]
        found = {"full": [], "lowrank": []} | {f"{way}, {part}": [] for way in ways for part in ("command", "arithmetic")}
        apart = {}
        for n in range(rounds + 1):  # the first is not counted
            seconds, values = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
            best = float(values[1][RANK:].double().norm())
            found["full"].append(seconds)
            del values
            seconds, (up, values, down) = timed(lambda: torch.svd_lowrank(delta, q=48))
            found["lowrank"].append(seconds)
            apart["lowrank"] = excess(delta, (up[:, :RANK] * values[:RANK], down[:, :RANK].T), best)
            for way, options in ways.items():
                time.sleep(0.2)
                command, arithmetic = loratool(program, pair, output, *options)
                found[f"{way}, command"].append(command)
                found[f"{way}, arithmetic"].append(arithmetic)
                stem = f"base_model.model.{NAME}.lora_"
                tensors = load_file(output / "adapter_model.safetensors")
                apart[way] = excess(delta, (tensors[f"{stem}B.weight"], tensors[f"{stem}A.weight"]), best)
            shutil.rmtree(output)
        found = {name: seconds[1:] for name, seconds in found.items()}
        print(f"== {kind}, {dtype}: full SVD {statistics.median(found['full']):.2f} s (median)")
        for name, seconds in found.items():
            if name == "full":
                continue
            ratios = [full / other for full, other in zip(found["full"], seconds)]
            above = apart[name.split(", ")[0]]
            print(f"{name:26} {statistics.median(seconds):.3f} s, {statistics.median(ratios):6.1f} times faster "
                  f"({min(ratios):.1f} to {max(ratios):.1f}), residual {above:.1e} above the least possible")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    layers = commands.add_parser("layers")
    layers.add_argument("work", type=Path)
    pair = commands.add_parser("pair")
    pair.add_argument("folder", type=Path)
    pair.add_argument("--layers", type=int, default=3)
    pair.add_argument("--vocabulary", type=int, default=32000)
    times = commands.add_parser("time")
    times.add_argument("program", type=Path)
    times.add_argument("work", type=Path)
    times.add_argument("rounds", type=int, nargs="?", default=5)
    arguments = parser.parse_args()
    if arguments.what == "layers":
        make_layers(arguments.work)
    elif arguments.what == "pair":
        make_pair(arguments.folder, arguments.layers, arguments.vocabulary)
    else:
        measure(arguments.program.resolve(), arguments.work, arguments.rounds)


if __name__ == "__main__":
    main()
