#!/usr/bin/env python3
"""Compare what `loratool extract` makes of two models with what other libraries make of them, and let them load it.

    PEERS/bin/python tests/peers/extract.py --loratool target/release/loratool --work WORK [--sd-scripts FOLDER]

Every peer that the interpreter can import is asked: mergekit and LyCORIS extract from the same pairs at the same rank,
PEFT, diffusers and LyCORIS load and merge what loratool wrote. `--sd-scripts` takes a source tree of kohya-ss/sd-scripts,
whose own functions extract and load. Pairs are those of `fixtures/extract`, and two larger ones made here.

Compared is ‖Δ − BA‖ of each layer, in f64, of the factors in the files: loratool may not be worse than a peer by
more than the tolerance that it promises, and not by more than the full SVD of numpy says that anything can be. A merge must
give the base plus BA, and the tuned tensor wherever there is no BA, so that nothing is lost.

`--selftest` needs no loratool: the full SVD of numpy takes its place, and must pass; one rank less must not.
Printed is a table in Markdown. Exit status: 0 nothing is worse, 1 something is, 2 nothing was judged.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
from convert import FIXTURES, Refused, relative

sys.path.insert(0, str(FIXTURES))
import make_extract as make

TOLERANCE = 1e-3  # the certificate of loratool, unless it is told another
ROUNDING = 1e-7  # of ‖Δ‖: what the rounding of factors to f32 may add
EXACT = 2e-6  # of the largest value: a merge in f32
WHOLE = r"norm|ln_|embed|lm_head|wte|wpe"  # what mergekit and the self-test keep whole


class Pair:
    """Two models, and how their tensors are called in adapters."""

    def __init__(self, folder, kind, rank):
        self.folder, self.name, self.kind, self.rank = folder, folder.name, kind, rank
        self.base, self.tuned = folder / "base", folder / "tuned"

    def load(self):
        """Tensors of both sides in f64, and the differences of matrices, one row per output."""
        self.before = {name: value for name, (value, _) in make.stored(self.base).items()}
        self.after = {name: value for name, (value, _) in make.stored(self.tuned).items()}
        self.deltas = {}
        for name, before in self.before.items():
            after = self.after[name]
            if before.ndim > 1 and before.shape == after.shape and (before != after).any():
                self.deltas[name] = self.matrix(name, after - before)
        self.names = {}
        for name in self.before:
            part, _, path = name.rpartition("/")
            path = path.removesuffix(".weight")
            if self.kind == "language":
                spellings = [path]
            elif part in ("", "unet"):
                spellings = [path, f"unet.{path}", f"lora_unet_{path}"]
            else:
                short = path.removeprefix("text_model.")
                stems = ("text_encoder.", "text_encoder.text_model.", "lora_te_text_model_")
                spellings = [f"{stem}{short}" for stem in stems]
            if part == "vae" or not name.endswith(".weight"):
                continue
            for spelling in spellings:
                spelling = spelling.replace(".", "_") if spelling.startswith("lora_") else spelling
                self.names[spelling] = name
        return self

    def inputs_first(self, name):
        return self.name == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.", name)

    def matrix(self, name, array):
        return array.T if self.inputs_first(name) else array.reshape(len(array), -1)

    def like(self, name, matrix):
        """The other way round."""
        return matrix.T if self.inputs_first(name) else matrix.reshape(self.before[name].shape)

    def adapter(self, path):
        """BA of every layer in a folder of PEFT's or a file, by the name of its weight."""
        config = {}
        if path.is_dir():
            config = json.loads((path / "adapter_config.json").read_text())
            path = path / "adapter_model.safetensors"
        tensors = {key: value.double().numpy() for key, value in load_file(path).items()}
        magnitude = re.compile(r"(?:base_model\.model\.)?(.*)\.lora_magnitude_vector(?:\.weight)?")
        matches = [match for match in map(magnitude.fullmatch, tensors) if match]
        self.magnitudes = {self.names[match[1]]: tensors[match[0]].ravel() for match in matches}
        found = {}
        for key, down in tensors.items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.(lora_A\.weight|lora_down\.weight|lora_embedding_A)", key)
            if not match:
                continue
            module, end = match.groups()
            up = tensors[key[: -len(end)] + end.replace("_A", "_B").replace("down", "up")]
            middle = tensors.get(f"{module}.lora_mid.weight")
            if middle is not None:  # LyCORIS: Tucker's decomposition of a kernel
                product = np.einsum("ijkl,jr,pi->prkl", middle, down.reshape(len(down), -1), up.reshape(len(up), -1))
                product = product.reshape(len(up), -1)
            else:
                product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            product = product.T if "embedding" in end else product
            rank = len(down)
            if config:
                looked_up = [next((value for pattern, value in (config.get(field) or {}).items()
                                   if re.match(rf"(.*\.)?({pattern})$", module)), config[default])
                             for field, default in (("alpha_pattern", "lora_alpha"), ("rank_pattern", "r"))]
                product *= looked_up[0] / (looked_up[1] ** 0.5 if config.get("use_rslora") else looked_up[1])
            else:
                product *= float(tensors.get(f"{module}.alpha", np.array(rank)).item()) / rank
            found[self.names[module]] = product
        return found

    def residuals(self, adapter):
        return {name: float(np.linalg.norm(self.deltas[name] - product)) for name, product in adapter.items()
                if name in self.deltas}


class Setup(convert.Setup):
    def extract(self, pair, to="peft", rank=None, extra=()):
        """What loratool makes of a pair; in a self-test what numpy makes of it."""
        rank = rank or pair.rank
        output = self.work / ("extracted" if to == "peft" else "extracted.safetensors")
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        if self.selftest:
            reference(pair, output, to, rank)
        else:
            told = self.ask("extract", "--base", pair.base, "--tuned", pair.tuned, "--output", output, "--rank", rank,
                            "--to", to, "--json", *extra)
            self.report = json.loads(told)
        return output

    def claims(self, pair, ours, best):
        """What loratool said of the residuals that were found here, and a word where it is not true."""
        wrong, highest, open_ones = [], 0.0, 0
        for module in self.report["modules"]:
            name = pair.names[module["path"]]
            norm = np.linalg.norm(pair.deltas[name])
            if abs(module["residual"] * norm - ours[name]) > ROUNDING * norm or abs(module["norm"] / norm - 1) > ROUNDING:
                wrong.append(f"{name}: says {module['residual']:.3e}, is {ours[name] / norm:.3e}")
            if "excess" in module:
                highest = max(highest, module["excess"])
                if ours[name] > best[name] * (1 + module["excess"]) + (module["rounding"] + ROUNDING) * norm:
                    wrong.append(f"{name}: proved {module['excess']:.3e}, is {ours[name] / best[name] - 1:.3e}")
            open_ones += module["proof"] == "not-proved"
        return wrong, f"proved to {highest:.1e}" + f", {open_ones} not proved" * bool(open_ones)

    def row(self, *cells):
        self.rows.append(tuple(str(cell).replace(str(self.work), "").replace("|", "\\|").replace("\n", " ")[:240]
                               for cell in cells))
        print("  ".join(self.rows[-1]), file=sys.stderr)

    def attempt(self, peer, pair, what, compute, fault=None):
        """Adds a row; `compute` gives its last two cells. `fault` says why the peer is known to fail."""
        try:
            result = compute()
        except Refused as error:
            result = ("refused", error)
        except Exception as error:  # noqa: BLE001  (whatever the peer does is a result)
            result = ("peer is worse", fault) if fault else ("**peer fails**", f"{type(error).__name__}: {error}")
        self.row(peer, pair.name, what, *result)

    def no_worse(self, pair, ours, theirs):
        """Cells for the residuals of two adapters of a pair, by layer."""
        shared = sorted(ours.keys() & theirs.keys())
        lost = sorted(theirs.keys() - ours.keys())
        if lost:
            return "**lost**", f"loratool has nothing for {len(lost)}: {lost[:3]}"
        if not shared:
            return "**nothing to compare**", "no layer is in both"
        ratios = []
        for name in shared:
            apart = abs(ours[name] - theirs[name]) > ROUNDING * np.linalg.norm(pair.deltas[name])
            ratios.append(ours[name] / max(theirs[name], 1e-300) if apart else 1.0)
        text = f"{len(shared)} layers: ours over theirs {min(ratios):.6f} to {max(ratios):.6f}"
        if max(ratios) > 1 + TOLERANCE:
            return "**worse**", text
        if min(ratios) < 1 - TOLERANCE:
            worse = sum(ratio < 1 - TOLERANCE for ratio in ratios)
            return "peer is worse", f"{text}; beyond the tolerance in {worse}"
        return "agrees", text

    def merged(self, pair, state, adapter, wanted_elsewhere):
        """Cells for a peer's merge: base + BA, and elsewhere what is given."""
        worst, where = 0.0, ""
        for name, before in pair.before.items():
            wanted = wanted_elsewhere[name]
            if name in adapter:
                wanted = before + pair.like(name, adapter[name])
            if name in pair.magnitudes:  # DoRA
                # Of an embedding PEFT takes the norms of what stands in one place of all vectors.
                matrix = pair.matrix(name, wanted)
                axis = 0 if re.search("embed_tokens|wte|wpe", name) else 1
                factors = pair.magnitudes[name] / np.linalg.norm(matrix, axis=axis)
                wanted = pair.like(name, matrix * np.expand_dims(factors, axis))
            if name in state:
                found = relative(state[name], wanted) if wanted.any() or state[name].any() else 0.0
                worst, where = max((worst, where), (found, name))
        absent = sorted(pair.before.keys() - state.keys() - {name for name in pair.before if name.startswith("vae/")})
        if absent:
            return "**differs**", f"not in the peer's model: {absent[:3]}"
        # Elements that are no number compare as no larger.
        fine = worst <= EXACT and all(np.isfinite(value).all() for value in state.values())
        return ("agrees", f"{worst:.1e} of the largest value") if fine else ("**differs**", f"{worst:.1e} at {where}")


def reference(pair, output, to, rank):
    """The best adapter in f32, and whole what WHOLE names."""
    tensors, saved = {}, set()
    spelling = {name: key for key, name in pair.names.items() if to == "peft" or key.startswith("lora_")}
    for name, delta in pair.deltas.items():
        if re.search(WHOLE, name) and pair.kind == "language":
            continue
        up, values, down = np.linalg.svd(delta, full_matrices=False)
        up, down = up[:, :rank] * np.sqrt(values[:rank]), np.sqrt(values[:rank])[:, None] * down[:rank]
        kept = min(rank, len(values))
        if pair.before[name].ndim == 4:
            up = up.reshape(*up.shape, 1, 1)
            down = down.reshape(kept, *pair.before[name].shape[1:])
        up, down = (torch.from_numpy(np.ascontiguousarray(value)).float() for value in (up, down))
        stem = f"base_model.model.{spelling[name]}" if to == "peft" else spelling[name]
        ends = ("lora_A", "lora_B") if to == "peft" else ("lora_down", "lora_up")
        tensors |= {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up}
        if to != "peft":
            tensors[f"{stem}.alpha"] = torch.tensor(float(kept))
    if to != "peft":
        save_file(tensors, output)
        return
    for name, after in pair.after.items():
        if re.search(WHOLE, name) and not np.array_equal(after, pair.before[name]):
            saved.add(name.split(".")[-2])
    for name, after in pair.after.items():
        if name.split(".")[-2] in saved:
            tensors[f"base_model.model.{name}"] = torch.from_numpy(after).float()
    targets = sorted({name.split(".")[-2] for name in pair.deltas} - saved)
    output.mkdir()
    save_file(tensors, output / "adapter_model.safetensors", {"format": "pt"})
    (output / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets,
        "modules_to_save": sorted(saved) or None, "fan_in_fan_out": pair.name == "gpt2", "inference_mode": True}))


# ---------------------------------------------------------------- pairs

def larger_llama(work):
    """A Llama of width 512 in bf16, tuned by 1 % with decaying spectra: a sixth of the difference is rounding."""
    import transformers

    folder = work / "llama512"
    if not folder.exists():
        sizes = dict(hidden_size=512, intermediate_size=1024, vocab_size=2000, num_hidden_layers=4, num_attention_heads=8,
                     num_key_value_heads=4)
        config = transformers.LlamaConfig(**{**make.LLAMA, **sizes})
        model = make.made("llama512", transformers.LlamaForCausalLM, config, torch.bfloat16)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        make.save(model, part / "base")
        make.seed("llama512, tuned")
        make.tune(model, lambda name: "_proj" in name or "norm" in name, relative=0.01)
        make.save(model, part / "tuned", max_shard_size="8MB")
        part.rename(folder)
    return Pair(folder, "language", 32)


def larger_unet(work):
    """A UNet of 32 and 64 channels in f16."""
    import diffusers

    folder = work / "unet64"
    if not folder.exists():
        config = dict(**make.UNET, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=48)
        model = make.made("unet64", diffusers.UNet2DConditionModel, config, torch.float16)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        make.save(model, part / "base")
        make.seed("unet64, tuned")
        make.tune(model, lambda name: name.endswith("weight") and "norm" not in name, relative=0.01)
        make.save(model, part / "tuned")
        part.rename(folder)
    return Pair(folder, "diffusion", 8)


def fixture(name, kind, rank):
    return Pair(FIXTURES / "extract" / name, kind, rank)


def language_pairs(work):
    names = ("llama", "lowrank", "qwen2", "gpt2", "grown", "mixed")
    return [*(fixture(name, "language", 4) for name in names), larger_llama(work)]


def diffusion_pairs(work):
    return [fixture("unet", "diffusion", 2), fixture("pipeline", "diffusion", 2), larger_unet(work)]


# ---------------------------------------------------------------- numpy

def numpy(setup):
    """The full SVD in f64, of the fixtures as it was when they were made; and whether the report is true."""
    for pair in [*language_pairs(setup.work), *diffusion_pairs(setup.work)]:
        if setup.selftest and pair.kind == "diffusion":
            continue
        pair.load()
        values = {name: np.linalg.svd(delta, compute_uv=False) for name, delta in pair.deltas.items()}
        to, extra = ("peft", ()) if pair.kind == "language" else ("kohya", PLAIN)
        for rank in sorted({1, 2, 4, 8, pair.rank}):

            def compute():
                adapter = pair.adapter(setup.extract(pair, to, rank, extra))
                best = {name: float(np.sqrt(np.sum(found[rank:][::-1] ** 2))) for name, found in values.items()
                        if name in adapter or not re.search(WHOLE, name)}
                ours = pair.residuals(adapter)
                result, text = setup.no_worse(pair, ours, best)
                if setup.selftest:
                    return result, text
                wrong, proved = setup.claims(pair, ours, best)
                return ("**says what is not**", "; ".join(wrong[:2])) if wrong else (result, f"{text}; {proved}")

            setup.attempt("numpy", pair, f"rank {rank}", compute)
    if setup.selftest:
        pair = fixture("llama", "language", 4).load()
        fewer = pair.residuals(pair.adapter(setup.extract(pair, rank=3)))
        four = pair.residuals(pair.adapter(setup.extract(pair, rank=4)))
        assert setup.no_worse(pair, fewer, four)[0] == "**worse**"
        assert setup.no_worse(pair, four, fewer)[0] == "peer is worse"
        assert setup.no_worse(pair, {}, four)[0] == "**lost**"


# ---------------------------------------------------------------- mergekit

def mergekit(setup):
    for pair in language_pairs(setup.work):
        pair.load()
        # Its factors are in the type of the checkpoint.
        same_type = () if setup.selftest or pair.name not in ("llama", "grown", "llama512") else (("--dtype", "bf16"),)
        for theirs, ours in [((), ()), (("--no-distribute-scale",), ()), *(((), extra) for extra in same_type)]:

            def compute():
                output = setup.work / "mergekit"
                shutil.rmtree(output, ignore_errors=True)
                command = [sys.executable, "-m", "mergekit.scripts.extract_lora", "--base-model", pair.base, "--model",
                           pair.tuned, "--out-path", output, "--max-rank", pair.rank, *theirs]
                done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr.strip().splitlines()[-1])
                found = pair.residuals(pair.adapter(output))
                return setup.no_worse(pair, pair.residuals(pair.adapter(setup.extract(pair, extra=ours))), found)

            what = f"rank {pair.rank}" + f", its {' '.join(theirs)}" * bool(theirs) + f", our {' '.join(ours)}" * bool(ours)
            fault = "stops: it knows no Conv1D, so there is nothing to decompose" if pair.name == "gpt2" else None
            setup.attempt("mergekit", pair, what, compute, fault)
        if pair.name == "qwen2":

            def biases():
                """What PEFT makes of mergekit's own adapter: is what was trained there?"""
                state, _ = merged_by_peft(pair, setup.work / "mergekit")
                changed = [name for name in pair.before if name.endswith("bias")
                           and not np.array_equal(pair.before[name], pair.after[name])]
                lost = sum(np.array_equal(state[name], pair.before[name]) for name in changed)
                return "peer is worse" if lost else "agrees", f"{lost} of {len(changed)} trained biases are lost in PEFT"

            setup.attempt("mergekit", pair, "its own adapter in PEFT", biases)


# ---------------------------------------------------------------- PEFT

def merged_by_peft(pair, folder):
    """The weights of the base after PEFT has loaded an adapter and merged it."""
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval()
    rows = len(pair.after[next(name for name in pair.after if re.search("embed_tokens|wte", name))])
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # as users of such adapters have to
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]
    return {name: value.detach().double().numpy() for name, value in merged.state_dict().items()}, missing


def peft(setup):
    for pair in language_pairs(setup.work):
        if setup.selftest and pair.name not in ("llama", "lowrank", "llama512"):
            continue
        pair.load()
        choices = ((), ("--embeddings", "full"), ("--dtype", "bf16"), ("--method", "dora"))
        for extra in choices[:1] if setup.selftest else choices:

            def compute():
                output = setup.extract(pair, extra=extra)
                state, missing = merged_by_peft(pair, output)
                result, text = setup.merged(pair, state, pair.adapter(output), pair.after)
                for module in () if setup.selftest else setup.report["modules"]:
                    name = pair.names[module["path"]]
                    left = np.linalg.norm(state[name] - pair.after[name]) / np.linalg.norm(pair.deltas[name])
                    if abs(left - module["residual"]) > 1e-5:
                        return "**says what is not**", f"{name}: says {module['residual']:.3e}, is {left:.3e}"
                return result, text + ("; PEFT misses layers that the configuration names" if missing else "")

            setup.attempt("PEFT", pair, " ".join(("loads", *extra)), compute)


# ---------------------------------------------------------------- diffusion

PLAIN = ("--norms", "skip", "--biases", "skip")  # what is no layer


class Named(torch.nn.Module):
    """A text encoder as transformers 4 named it, whose names are in files of adapters."""

    def __init__(self, model):
        super().__init__()
        self.text_model = getattr(model, "text_model", model)


def models(pair, side, dtype=None):
    """UNet and text encoder (or an empty list) of one side."""
    import diffusers
    import transformers

    folder = pair.base if side == "base" else pair.tuned
    whole = (folder / "model_index.json").exists()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet" if whole else folder, torch_dtype=dtype)
    text = [transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)] if whole else []
    return unet.eval(), [model.eval() for model in text]


def state_of(pair, unet, texts):
    """Weights by the names of the pair."""
    state = {}
    parts = [("unet/", unet), *(("text_encoder/", text) for text in texts)] if texts else [("", unet)]
    for part, model in parts:
        for name, value in model.state_dict().items():
            name = name.replace("org_module.0.", "").replace(".base_layer.", ".").removeprefix("text_model.")
            for name in (f"{part}{name}", f"{part}text_model.{name}"):
                if name in pair.before and "lora" not in name:
                    state[name] = value.detach().double().numpy()
    return state


def diffusers(setup):
    from diffusers import StableDiffusionPipeline

    for pair in diffusion_pairs(setup.work):
        pair.load()
        for to in ("kohya",) if setup.selftest else ("kohya", "diffusers", "peft"):
            if to == "peft" and pair.name == "pipeline":
                continue

            def compute():
                output = setup.extract(pair, to, extra=PLAIN)
                unet, texts = models(pair, "base", torch.float32)
                if to == "peft":
                    from peft import PeftModel

                    unet = PeftModel.from_pretrained(unet, output).merge_and_unload()
                else:
                    pipe = StableDiffusionPipeline(None, *(texts or [None]), None, unet, None, None, None,
                                                   requires_safety_checker=False)
                    pipe.load_lora_weights(str(output.parent), weight_name=output.name, local_files_only=True)
                    pipe.fuse_lora(components=["unet", *(["text_encoder"] if texts else [])])
                adapter = pair.adapter(output)
                missing = pair.deltas.keys() - adapter.keys()
                if missing:
                    return "**lost**", sorted(missing)[:3]
                return setup.merged(pair, state_of(pair, unet, texts), adapter, pair.before)

            setup.attempt("diffusers", pair, f"loads `{to}`", compute)


def lycoris(setup):
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
    from lycoris.utils import extract_diff

    # It makes a network of these before it makes that of a file, and finds layers of diffusers' UNet twice.
    LycorisNetworkKohya.apply_preset({f"{part}_target_{kind}": [] for part in ("unet", "text_encoder")
                                      for kind in ("module", "name")})
    for pair in diffusion_pairs(setup.work):
        pair.load()
        for tucker in (False, True):

            def compute():
                # In f32, because it has no SVD of f16 on a CPU.
                before, after = models(pair, "base", torch.float32), models(pair, "tuned", torch.float32)
                texts = [[Named(text) for text in side[1]] for side in (before, after)]
                with quiet():
                    tensors = extract_diff(*texts, before[0], after[0], "fixed", pair.rank, pair.rank, "cpu",
                                           small_conv=tucker)
                path = setup.work / "lycoris.safetensors"
                save_file({key: value for key, value in tensors.items() if ".diff" not in key}, path)
                whole = {key.split(".")[0] for key in tensors if key.endswith(".diff")}
                result, text = setup.no_worse(pair, pair.residuals(pair.adapter(setup.extract(pair, "kohya", extra=PLAIN))),
                                              pair.residuals(pair.adapter(path)))
                return result, f"{text}; keeps {len(whole)} whole"

            setup.attempt("LyCORIS", pair, f"rank {pair.rank}{', Tucker' if tucker else ''}", compute)

        def loads():
            output = setup.extract(pair, "kohya", extra=PLAIN)
            unet, texts = models(pair, "base", torch.float32)
            named = [Named(text) for text in texts]
            with quiet():
                network, _ = create_network_from_weights(1.0, str(output), None, named[0] if named else None, unet)
                network.merge_to(named[0] if named else None, unet, load_file(output), torch.float32, "cpu")
            return setup.merged(pair, state_of(pair, unet, texts), pair.adapter(output), pair.before)

        setup.attempt("LyCORIS", pair, "loads `kohya`", loads)


def sd_scripts(setup, folder):
    """Its own `svd` on models that it would not load by itself, because it builds those of Stable Diffusion alone."""
    sys.path[:0] = [str(folder), str(folder / "networks")]
    import extract_lora_from_models as program
    import lora as library

    program.args = types.SimpleNamespace(device=None)  # a global of the command that `svd` reads
    for pair in diffusion_pairs(setup.work):
        pair.load()

        def given(v2, path):
            unet, texts = models(pair, path, torch.float32)
            return Named(texts[0]) if texts else torch.nn.Module(), None, unet

        for quantile, clamped in ((0.99, "clamped as by default"), (1.0, "at quantile 1"), (None, "never clamped")):

            def compute():
                # With metadata and as safetensors it would import its trainer, which transformers 5 breaks.
                path = setup.work / "sd-scripts.pt"
                path.unlink(missing_ok=True)
                program.model_util.load_models_from_stable_diffusion_checkpoint = given
                # At quantile 1 it still clamps: to the largest value on both sides, however small the least one is.
                limits = mock.patch.object(torch, "quantile", lambda *_: np.inf) if quantile is None else quiet()
                with quiet(), limits:
                    program.svd("base", "tuned", str(path), dim=pair.rank, conv_dim=pair.rank, clamp_quantile=quantile,
                                min_diff=0.0, save_precision="float", no_metadata=True)
                save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
                theirs = pair.residuals(pair.adapter(path.with_suffix(".safetensors")))
                ours = pair.residuals(pair.adapter(setup.extract(pair, "kohya", extra=PLAIN)))
                return setup.no_worse(pair, ours, theirs)

            setup.attempt("sd-scripts", pair, f"rank {pair.rank}, {clamped}", compute)

        def loads():
            output = setup.extract(pair, "kohya", extra=PLAIN)
            unet, texts = models(pair, "base", torch.float32)
            named = Named(texts[0]) if texts else torch.nn.Module()
            adapter = pair.adapter(output)
            with quiet():
                network, state = library.create_network_from_weights(
                    1.0, str(output), None, named, unet, for_inference=True)
                known = {module.lora_name for module in network.unet_loras + network.text_encoder_loras}
                network.merge_to(named, unet, state, torch.float32, "cpu")
            # It knows the layers in blocks alone.
            known = {pair.names[name] for name in known}
            outside = len(adapter.keys() - known)
            result, text = setup.merged(pair, state_of(pair, unet, texts),
                                        {name: value for name, value in adapter.items() if name in known}, pair.before)
            return result, f"{text}; {len(known)} layers, {outside} outside of blocks are not read"

        setup.attempt("sd-scripts", pair, "loads `kohya`", loads)


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


PEERS = {
    "numpy": (numpy, ("numpy",)),
    "mergekit": (mergekit, ("mergekit", "torch", "transformers")),
    "peft": (peft, ("peft", "torch", "transformers")),
    "diffusers": (diffusers, ("diffusers", "peft", "torch")),
    "lycoris": (lycoris, ("lycoris-lora", "torch", "diffusers")),
}


def main():
    own = {"--sd-scripts": "a source tree of kohya-ss/sd-scripts, to be asked as well"}
    arguments = convert.read_arguments(__doc__, PEERS, own, "the full SVD of numpy in place of loratool")
    setup = Setup(arguments.loratool and arguments.loratool.resolve(), arguments.work.resolve(), arguments.selftest)
    logging.disable(logging.WARNING)
    versions = convert.ask(setup, PEERS, arguments.peer)
    if arguments.sd_scripts:
        sd_scripts(setup, arguments.sd_scripts.resolve())
    heads = ("peer", "pair", "as", "result", "residuals, largest difference, or why")
    results, bad = convert.print_table(setup, versions, heads)
    print(f"\n{results.count('agrees')} agree, {results.count('peer is worse')} peers are worse, {bad} do not agree, "
          f"{results.count('refused')} are refused")
    return 1 if bad else 0 if {"agrees", "peer is worse"} & set(results) else 2


if __name__ == "__main__":
    sys.exit(main())
