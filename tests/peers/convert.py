#!/usr/bin/env python3
"""Let other libraries load what `loratool convert` writes, and compare what they compute.

    PEERS/bin/python tests/peers/convert.py --loratool target/release/loratool --work WORK

Every peer that the interpreter can import is asked: PEFT, diffusers, llama.cpp (llama-cpp-python), MLX
(mlx-lm). Run it once in each environment that has one of them; README.md tells how to make them. Adapters and
what is expected of them are in `fixtures/formats` and `fixtures/lycoris`, written by the peers themselves: results
of transformers, of diffusers' `fuse_lora`, of LitGPT's and torchtune's merges.

`--selftest` needs no loratool: each peer gets files that it wrote itself, must agree with what is expected, and
must not agree without the adapter. Printed is a table in Markdown. Exit status: 0 all agree, 1 something differs,
2 nothing was judged.
"""
import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
FORMATS = FIXTURES / "formats"
LLAMA, QWEN2 = FORMATS / "gguf" / "llama", FORMATS / "gguf" / "qwen2"
UNET = FIXTURES / "lycoris" / "unet_attn"
EXACT = 1e-4  # of f32 sums in another order


class Refused(Exception):
    """loratool says that it will not do this, or the peer says so."""


class Setup:
    """What all peers need: the program, a folder, and the rows of the table."""

    def __init__(self, program, work, selftest):
        self.program, self.work, self.selftest, self.rows = program, work, selftest, []

    def convert(self, source, to, base=None, single=False, extra=()):
        """What loratool makes of a file; in a self-test the file itself."""
        if self.selftest:
            return source
        output = self.work / "converted"
        if single:
            output = output.with_suffix(".gguf" if to == "gguf" else ".safetensors")
        for old in (output, self.work / "converted"):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        extra = [*extra, "--base", base] if base else extra
        self.ask("convert", source, "--to", to, "--output", output, "--quiet", *extra)
        return output

    def merge(self, base, adapter):
        """What loratool computes of a base file and an adapter."""
        output = self.work / "merged.safetensors"
        self.ask("merge", "--base", base, "--adapter", adapter, "--output", output, "--force", "--quiet")
        return load_file(output)

    def ask(self, *arguments):
        done = subprocess.run([str(part) for part in (self.program, *arguments)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            first = next((n for n, line in enumerate(lines) if line.startswith("error")), len(lines) - 1)
            raise Refused("loratool: " + " ".join(line.strip() for line in lines[first : first + 2]))
        return done.stdout

    def judge(self, peer, source, to, limit, compute, fault=None):
        """Adds a row; `compute` gives the largest difference, relative to the largest value expected.

        `fault` says why the peer is known to compute something else, and of which tensors: without those `compute`
        must agree. Where it names none, the peer fails.
        """
        name = str(source.relative_to(FIXTURES)) if source.is_relative_to(FIXTURES) else source.name
        try:
            found = compute()
            if found <= limit:
                row = (peer, name, to, "agrees", f"{found:.1e}")
            elif fault and fault[1] and compute(re.compile(fault[1])) <= limit:
                row = (peer, name, to, "peer is wrong", fault[0])
            else:
                row = (peer, name, to, "**differs**", f"{found:.1e}")
        except Refused as error:
            row = (peer, name, to, "refused", str(error))
        except Exception as error:  # noqa: BLE001  (whatever the peer does with the file is a result)
            row = (peer, name, to, "**peer fails**", f"{type(error).__name__}: {error}")
            row = (peer, name, to, "peer is wrong", fault[0]) if fault and not fault[1] else row
        self.rows.append(tuple(cell.replace(str(self.work), "").replace(str(FIXTURES), "")
                               .replace("|", "\\|").replace("\n", " ")[:200] for cell in row))
        print("  ".join(self.rows[-1]), file=sys.stderr)


def relative(found, wanted, apart=None):
    """The largest difference of two arrays, or of the arrays of two files `apart` from some names."""
    if isinstance(wanted, dict):
        if set(found) != set(wanted):
            raise ValueError(f"other tensors: {sorted(set(found) ^ set(wanted))[:4]}")
        return max(relative(found[name], wanted[name]) for name in wanted if not (apart and apart.search(name)))
    if found.shape != wanted.shape:
        raise ValueError(f"shape {found.shape}, not {wanted.shape}")
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def logits(family):
    """What transformers computed for every adapter, and of which tokens."""
    path = family / "logits.safetensors"
    with safe_open(path, "np") as file:
        return load_file(path), json.loads(file.metadata()["tokens"])


def with_changes(base, changed):
    return {**load_file(base), **load_file(changed)}


# ---------------------------------------------------------------- PEFT

def peft(setup):
    import torch
    import transformers
    from peft import PeftModel

    def weights(model):
        return {key: value.detach().float().numpy() for key, value in model.state_dict().items()}

    def merged(model_class, base, adapter, probe):
        """Weights after merging, and outputs before it, of the adapter on a fresh base."""
        model = model_class.from_pretrained(base, dtype=torch.float32).eval()
        wrapped = PeftModel.from_pretrained(model, adapter).eval()
        missing = [name for name, module in wrapped.named_modules()
                   if getattr(module, "lora_B", None) and not any(p.abs().sum() for p in module.lora_B.parameters())]
        if missing:
            raise ValueError(f"PEFT found no weights for {missing[:3]}")
        with torch.no_grad():
            output = wrapped(torch.tensor([probe]))[0][0].float().numpy()
        return weights(wrapped.merge_and_unload()), output

    def outputs(model_class, base, state, probe):
        model = model_class.from_pretrained(base, dtype=torch.float32).eval()
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        with torch.no_grad():
            return model(torch.tensor([probe]))[0][0].float().numpy()

    causal = transformers.AutoModelForCausalLM
    cases = []  # source, base, weights expected, class
    for family in (LLAMA, QWEN2):
        for name in sorted(path.parent.name for path in family.glob("*/adapter_config.json")):
            path = family / f"{name}-merged.safetensors"
            path = path if path.exists() else family / f"{name}-changed.safetensors"
            sources = [family / name]
            # What its converter loses (peer.json) is gone from the GGUF file.
            if name in ("plain", "embedding"):
                sources.append(family / f"{name}.gguf")
            cases += [(source, family / "base", path, causal) for source in sources]
    for name in ("default", "all", "key", "query_key"):
        path = FORMATS / "litgpt" / f"{name}-changed-hub.safetensors"
        cases.append((FORMATS / "litgpt" / name, LLAMA / "base", path, causal))
    for name in ("lora", "dora"):
        path = FORMATS / "torchtune" / f"{name}-changed-hub.safetensors"
        cases.append((FORMATS / "torchtune" / name / "adapter_model.pt", LLAMA / "base", path, causal))
    for kind in ("bert-lora", "bert-lora-default", "bert-ia3", "gpt2-lora", "gpt2-lora-all", "gpt2-ia3"):
        folder = FORMATS / "adapterhub"
        path = folder / f"{kind}-{'function' if 'ia3' in kind else 'changed'}.safetensors"
        cases.append((folder / kind, folder / f"{kind.split('-')[0]}-base", path, transformers.AutoModel))
    for source, base, wanted, model_class in cases:
        written_by_peft = (source / "adapter_model.safetensors").exists() and source.parent in (LLAMA, QWEN2)
        if setup.selftest and not written_by_peft:
            continue

        def compute():
            adapter = setup.convert(source, "peft", base)
            probe = [1, 5, 17, 40, 2, 45, 33, 7]
            state = with_changes(base / "model.safetensors", wanted)
            found, before_merge = merged(model_class, base, adapter, probe)
            there = {key: value for key, value in found.items() if key in state}
            expected = {key: state[key] for key in there}
            if set(state) - set(found):
                raise ValueError(f"not in PEFT's model: {sorted(set(state) - set(found))[:4]}")
            function = outputs(model_class, base, found | state, probe)
            return max(relative(there, expected), relative(before_merge, function))

        setup.judge("PEFT", source, "peft", EXACT, compute)
    if setup.selftest:
        wanted, tokens = logits(LLAMA)
        _, plain = merged(causal, LLAMA / "base", LLAMA / "plain", tokens)
        blank = outputs(causal, LLAMA / "base", load_file(LLAMA / "base" / "model.safetensors"), tokens)
        assert relative(plain, wanted["plain"]) < EXACT and relative(blank, wanted["plain"]) > 0.01
        assert relative(blank, wanted["base"]) < EXACT


# ---------------------------------------------------------------- diffusers

SWAPPED = ("swaps shift and scale of final_layer.adaLN_modulation.1 in lora_A as well", r"^norm_out\.linear\.weight$")
# Formats, the layers of the original model that are written, the same in diffusers, and whether diffusers reads it.
SPELLINGS = [
    *((to, "", "", True) for to in ("diffusers", "kohya", "comfyui", "ai-toolkit")),
    ("xlabs", r"(img|txt)_attn|linear2", r"^transformer_blocks.*attn\.(to|add)_|single.*proj_out", True),
    ("onetrainer", r"(img|txt)_attn", r"^transformer_blocks.*attn\.", True),
    *((to, "", "", False) for to in ("onetrainer", "onetrainer-original", "omi")),
]
CONTROLS = [("bfl", "", "", True), ("comfyui", "", "", False)]


def tiny_unet():
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 1, 2), cross_attention_dim=12, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    state = load_file(UNET / "unet.safetensors")
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return model


def diffusers(setup):
    import torch
    from diffusers import StableDiffusionXLPipeline
    from diffusers.loaders import lora_conversion_utils, lora_pipeline

    sys.path.insert(0, str(FIXTURES))
    import make_formats_flux as flux  # also replaces the sizes that diffusers' converters have built in

    def fused(pipe, model, component, path):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        pipe.fuse_lora(components=[component])
        return {key.replace(".base_layer.", "."): value.detach().float().numpy()
                for key, value in model.state_dict().items() if ".lora_" not in key}

    def on_flux(path):
        model = flux.base()
        return fused(flux.pipeline(model), model, "transformer", path)

    def full_depth():
        """All 19 and 38 blocks of FLUX.1, of the width of the tiny one: the converters count blocks.

        One adapter in every spelling: diffusers loads those that it knows, and loratool merges all of them.
        """
        folder = setup.work / "full"
        folder.mkdir(exist_ok=True)
        base = folder / "base.safetensors"
        widths = {key: value for key, value in flux.NUMBERS.items() if key > 38}
        config = {**flux.CONFIG, "num_layers": 19, "num_single_layers": 38}
        names = ("kohya_flux_lora", "xlabs_flux_lora", "bfl_flux_control_lora")
        names = [f"_convert_{name}_to_diffusers" for name in names]

        def numbered(shapes):
            """The layers of all blocks, of those of the first."""
            for name, shape in shapes.items():
                depth = 19 if name.startswith("double") else 38 if name.startswith("single") else 1
                if re.search(r"_blocks\.[1-9]", name) is None:
                    yield from ((re.sub(r"(?<=_blocks\.)0", str(n), name), shape) for n in range(depth))

        def kohya():
            adapter = {}
            for layer, (outputs, inputs) in numbered(flux.blocks()):
                flux.seed(layer)
                flat = "lora_unet_" + layer.replace(".", "_")
                keys = [f"{flat}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
                adapter |= flux.low_rank(torch.empty(outputs, inputs), *keys)
            return adapter

        def control():
            adapter = {}
            stems = ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0")
            norms = {f"{stem}.norm": None for stem in stems}
            for layer, shape in numbered(flux.bfl_layers() | norms):
                flux.seed(layer)
                if shape:
                    shape = (shape[0], 2 * shape[1]) if layer == "img_in" else shape
                    adapter |= flux.low_rank(torch.empty(shape), f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
                    adapter[f"{layer}.lora_B.bias"] = flux.normal(shape[0])
                else:
                    adapter |= {f"{layer}.{side}_norm.scale": 1 + flux.normal(8) for side in ("query", "key")}
            return adapter

        with mock.patch.object(flux, "NUMBERS", widths), mock.patch.object(flux, "CONFIG", config), \
                mock.patch.multiple(lora_pipeline, **{
                    name: flux.scaled(getattr(lora_conversion_utils, name)) for name in names}):
            flux.save_file(flux.own(flux.base().state_dict()), base)
            untouched = load_file(base)
            for made, cases in ((kohya, SPELLINGS), (control, CONTROLS)):
                source = folder / f"flux, 19 and 38 blocks, {made.__name__}.safetensors"
                flux.save_file(flux.own(made()), source)
                wanted = on_flux(source)
                assert relative(wanted | untouched, wanted, re.compile("x_embedder")) > 0.01
                fault = SWAPPED if made is control else None
                for to, only, part, is_read in cases:
                    if setup.selftest and to != "kohya":
                        continue
                    expected = {key: value if re.search(part, key) else untouched[key] for key, value in wanted.items()}
                    extra = ("--only", only) if only else ()

                    def fused_there(apart=None):
                        path = setup.convert(source, to, base, single=True, extra=extra)
                        return relative(on_flux(path), expected, apart)

                    def merged_here(apart=None):
                        path = setup.convert(source, to, base, single=True, extra=extra)
                        return relative(setup.merge(base, path), expected, apart)

                    if is_read:
                        setup.judge("diffusers", source, to, EXACT, fused_there, fault)
                    if not setup.selftest:
                        setup.judge("diffusers", source, f"{to}, `merge`", EXACT, merged_here, fault)

    def on_unet(path):
        model = tiny_unet()
        pipe = StableDiffusionXLPipeline(None, None, None, None, None, model, None)
        return fused(pipe, model, "unet", path)

    folder = FORMATS / "flux"
    untouched = load_file(folder / "base.safetensors")
    names = sorted(path.stem for path in folder.glob("*.safetensors") if not path.stem.endswith("-changed"))
    targets = ("diffusers", "kohya", "onetrainer", "comfyui", "ai-toolkit", "xlabs", "bfl")
    for name in names:
        if name == "base":
            continue
        stem = "onetrainer" if name.startswith("onetrainer") else name
        wanted = with_changes(folder / "base.safetensors", folder / f"{stem}-changed.safetensors")
        for to in targets[:1] if setup.selftest else targets:
            # What diffusers cannot read, or reads wrongly (README.md), is no self-test.
            if setup.selftest and (name.startswith("onetrainer") or name.startswith("bfl")):
                continue
            source = folder / f"{name}.safetensors"

            # Of OneTrainer's names diffusers knows the attention only (and fails for others).
            attention = to == "onetrainer"
            if attention and name not in ("diffusers", "diffusers-bare", "diffusers-patterns", "xlabs"):
                continue

            def compute(apart=None):
                extra = ("--only", r"attn\.") if attention else ()
                path = setup.convert(source, to, folder / "base.safetensors", single=True, extra=extra)
                expected = {key: value if not attention or ".attn." in key else untouched[key]
                            for key, value in wanted.items()}
                return relative(on_flux(path), expected, apart)

            fault = None
            if name in ("diffusers", "bfl-names-in-peft") and to in ("kohya", "comfyui"):
                fault = ("drops layers outside of the blocks (img_in, final_layer)", r"^(x_embedder|proj_out)\.")
            if to == "bfl":
                fault = SWAPPED
            if name == "bfl-control" and to == "comfyui":
                fault = ("does not read set_weight, reshape_weight and diff_b, and says so", None)
            setup.judge("diffusers", source, to, EXACT, compute, fault)
    full_depth()
    wanted = load_file(UNET / "unet_merged.safetensors")
    for name in ("diffusers_new", "diffusers_mid", "diffusers_old", "kohya", "kohya_sgm", "comfy_native"):
        source = UNET / f"{name}.safetensors"
        if setup.selftest and name == "comfy_native" or not source.exists():
            continue
        targets = ("diffusers", "diffusers-mid", "diffusers-old", "kohya")
        for to in targets[:1] if setup.selftest else targets:

            def compute():
                path = setup.convert(source, to, UNET / "unet.safetensors", single=True)
                return relative(on_unet(path), wanted)

            setup.judge("diffusers", source, to, EXACT, compute)
    if setup.selftest:
        assert relative(untouched, with_changes(folder / "base.safetensors", folder / "kohya-changed.safetensors")) > 0.01


# ---------------------------------------------------------------- cloneofsimo

def simo(setup, program):
    """`program` is lora_diffusion/lora.py of cloneofsimo/lora, which alone is imported."""
    spec = importlib.util.spec_from_file_location("simo_lora", program)
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    wanted = load_file(UNET / "unet_merged.safetensors")
    model = tiny_unet()
    names = {module: name for name, module in model.named_modules()}
    # Adapted is attention alone.
    layers = [names[module] for *_, module in library._find_modules(model, {"CrossAttention", "Attention"})]
    order = setup.work / "order.txt"
    order.write_text("".join(f"unet.{layer}\n" for layer in layers))
    for name in ("diffusers_new", "diffusers_mid", "diffusers_old", "kohya", "kohya_sgm", "comfy_native"):
        source = UNET / f"{name}.safetensors"

        def compute():
            model = tiny_unet()
            extra = ("--order", order)
            path = setup.convert(source, "simo", UNET / "unet.safetensors", single=True, extra=extra)
            with safe_open(path, "pt") as file:
                library.monkeypatch_or_replace_safeloras(types.SimpleNamespace(unet=model), file)
            with contextlib.redirect_stdout(None):
                library.collapse_lora(model)
            return relative({key.replace(".linear.", "."): value.detach().numpy()
                             for key, value in model.state_dict().items() if ".lora_" not in key}, wanted)

        setup.judge("cloneofsimo", source, "simo", EXACT, compute)


# ---------------------------------------------------------------- llama.cpp

def llama_cpp(setup):
    import llama_cpp as library

    def answer(base, adapter, tokens):
        # Type 0 is f32; keys and values are in f16 otherwise.
        model = library.Llama(str(base), lora_path=str(adapter) if adapter else None, logits_all=True, n_ctx=64,
                              n_threads=1, type_k=0, type_v=0, verbose=False)
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])

    for family in (LLAMA, QWEN2):
        wanted, tokens = logits(family)
        for name in sorted(set(wanted) - {"base"}):
            kept = "lost" not in lost(family, name)
            if setup.selftest and not kept:
                continue
            own = family / f"{name}.gguf"
            for source in [own] if setup.selftest else [family / name, own]:
                if source == own and not kept:
                    continue

                def compute():
                    adapter = setup.convert(source, "gguf", family / "base", single=True)
                    return relative(answer(family / "base-f32.gguf", adapter, tokens), wanted[name])

                setup.judge("llama.cpp", source, "gguf", EXACT, compute)
    if setup.selftest:
        wanted, tokens = logits(LLAMA)
        blank = answer(LLAMA / "base-f32.gguf", None, tokens)
        assert relative(blank, wanted["base"]) < EXACT < 0.01 < relative(blank, wanted["plain"])


def lost(family, name):
    """What llama.cpp's own converter loses of an adapter."""
    notes = json.loads((family / "peer.json").read_text())[name]
    scales = set(notes.get("applied_over_true", {"": None}).values())
    return "nothing" if scales == {1.0} else "lost"


# ---------------------------------------------------------------- MLX

def mlx(setup):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)

    def answer(base, adapter, tokens):
        # transformers 5 writes it into `rope_parameters`, where mlx-lm does not look.
        model, _ = load_model(base, model_config={"rope_theta": 10000.0})
        if adapter:
            archive = adapter / "adapters.npz"
            model = load_archive(model, archive) if archive.exists() else load_adapters(model, str(adapter))
        model.eval()
        return np.array(model(mx.array([tokens]))[0].astype(mx.float32))

    def load_archive(model, path):
        """What `load_adapters` does, which knows no other file than adapters.safetensors any more."""
        config = json.loads((path.parent / "adapter_config.json").read_text())
        dora = config["fine_tune_type"] == "dora"
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=dora)
        shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
        arrays = mx.load(str(path))
        strangers = [name for name, value in arrays.items() if shapes.get(name) != value.shape]
        if strangers:
            raise ValueError(f"not in the model: {strangers[:4]}")
        model.load_weights(str(path), strict=False)
        return model

    def by_hand(folder):
        """MLX trains in its own layout; for the self-test PEFT's factors are turned."""
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        output = setup.work / "by_hand"
        output.mkdir(exist_ok=True)
        factors = {}
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            key = key.removeprefix("base_model.model.").removesuffix(".weight")
            factors[key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = np.ascontiguousarray(value.T)
        keys = sorted({key.split(".", 3)[3].rsplit(".", 1)[0] for key in factors if key.startswith("model.layers.")})
        told = {"fine_tune_type": "lora", "num_layers": 2,
                "lora_parameters": {"rank": config["r"], "scale": scale, "dropout": 0.0, "keys": keys}}
        save_file(factors, output / "adapters.safetensors")
        (output / "adapter_config.json").write_text(json.dumps(told))
        return output

    for family in (LLAMA, QWEN2):
        wanted, tokens = logits(family)
        for name in sorted(set(wanted) - {"base"}):
            source = family / name
            if setup.selftest and source != QWEN2 / "plain":
                continue
            for to in ("mlx",) if setup.selftest else ("mlx", "mlx-npz"):

                def compute():
                    adapter = by_hand(source) if setup.selftest else setup.convert(source, to, family / "base")
                    return relative(answer(family / "base", adapter, tokens), wanted[name])

                setup.judge("MLX", source, to, EXACT, compute)
    if setup.selftest:
        wanted, tokens = logits(LLAMA)
        blank = answer(LLAMA / "base", None, tokens)
        assert relative(blank, wanted["base"]) < EXACT and relative(blank, wanted["plain"]) > 0.01


PEERS = {
    "peft": (peft, ("peft", "torch", "transformers")),
    "diffusers": (diffusers, ("diffusers", "peft", "torch")),
    "llama_cpp": (llama_cpp, ("llama_cpp_python",)),
    "mlx_lm": (mlx, ("mlx", "mlx_lm")),
}


def read_arguments(description, peers, own, selftest):
    """The arguments that all comparisons take, and `own` ones by name with their help."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--loratool", type=Path, help="the program to test")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is written")
    parser.add_argument("--peer", choices=peers, action="append", help="only this one (repeatable)")
    for name, text in own.items():
        parser.add_argument(name, type=Path, help=text)
    parser.add_argument("--selftest", action="store_true", help=selftest)
    arguments = parser.parse_args()
    if not arguments.selftest and not arguments.loratool:
        parser.error("--loratool or --selftest")
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments


def ask(setup, peers, only):
    """Asks the peers that are installed; their versions."""
    versions = []
    for name in only or peers:
        check, packages = peers[name]
        if not importlib.util.find_spec(name):
            print(f"{name} is not installed here", file=sys.stderr)
            continue
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{package} {importlib.metadata.version(package)}")
        check(setup)
    return versions


def print_table(setup, versions, heads):
    """Prints what was found; the results, and how many are bad."""
    versions = ", ".join(dict.fromkeys(versions))
    print(f"\n{versions or 'no peer'}; Python {sys.version.split()[0]}\n")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in setup.rows:
        print("| " + " | ".join(row) + " |")
    results = [row[3] for row in setup.rows]
    return results, sum(result.startswith("**") for result in results)


def main():
    own = {"--simo": "lora_diffusion/lora.py of cloneofsimo/lora, to be asked as well"}
    arguments = read_arguments(__doc__, PEERS, own, "only files that the peers wrote")
    setup = Setup(arguments.loratool and arguments.loratool.resolve(), arguments.work.resolve(), arguments.selftest)
    versions = ask(setup, PEERS, arguments.peer)
    if arguments.simo and not arguments.selftest:
        simo(setup, arguments.simo)
    heads = ("peer", "adapter", "as", "result", "largest difference, or why")
    results, bad = print_table(setup, versions, heads)
    print(f"\n{results.count('agrees')} agree, {bad} do not, {results.count('refused')} are refused")
    return 1 if bad else 0 if "agrees" in results else 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of MLX 0.32.4 abort about every second interpreter that ends by itself
