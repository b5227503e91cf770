#!/usr/bin/env python3
"""Let torchtune, LitGPT, loralib and AdapterHub load what `loratool convert` writes, and merge it themselves.

    LLM/bin/python tests/peers/convert_llm.py --loratool target/release/loratool --work WORK

Works as `convert.py`, whose options it has; the sources are the fixtures of the other libraries among these four,
and PEFT's. Everything is converted twice, through PEFT, unless it is PEFT's already.
"""
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import convert
from convert import EXACT, FORMATS, LLAMA, relative, with_changes

RANK, ALPHA = 4, 6  # of the fixtures
HEADS = dict(num_heads=4, num_kv_heads=2, dim=32)


def on_llama():
    """Adapters of the tiny Llama: the source and the hub's weights after its own library's merge."""
    cases = []
    for name in sorted(path.parent.name for path in LLAMA.glob("*/adapter_config.json")):
        path = LLAMA / f"{name}-merged.safetensors"
        cases.append((LLAMA / name, path if path.exists() else LLAMA / f"{name}-changed.safetensors"))
    for name in ("default", "all", "key", "query_key"):
        cases.append((FORMATS / "litgpt" / name, FORMATS / "litgpt" / f"{name}-changed-hub.safetensors"))
    for name in ("lora", "dora"):
        cases.append((FORMATS / "torchtune" / name, FORMATS / "torchtune" / f"{name}-changed-hub.safetensors"))
    return [(source, with_changes(LLAMA / "base" / "model.safetensors", wanted)) for source, wanted in cases]


def through_peft(setup, source, to, base, extra=()):
    """The source in a format of another library, never copied from one of its own."""
    if source == LLAMA / "plain":
        extra = ("--allow-losses",)  # a copy of the base's output layer
    if setup.selftest or (source / "adapter_config.json").exists() and "peft_type" in (
            source / "adapter_config.json").read_text() and not list(source.glob("*.pt")):
        return setup.convert(source, to, base, extra=extra)
    between = setup.work / "between"
    shutil.rmtree(between, ignore_errors=True)
    shutil.move(setup.convert(source, "peft", base, extra=extra), between)
    return setup.convert(between, to, base)


def arrays(state):
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}


# ---------------------------------------------------------------- torchtune

def torchtune(setup):
    import torch
    from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.modules.peft import get_merged_lora_ckpt

    to_own = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}

    def merged(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        targets = set(config["target_modules"])
        mlp = targets & {"gate_proj", "up_proj", "down_proj"}
        model = lora_llama3_1(
            lora_attn_modules=[to_own[name] for name in sorted(targets) if name in to_own], apply_lora_to_mlp=bool(mlp),
            apply_lora_to_output="lm_head" in targets, vocab_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
            embed_dim=32, max_seq_len=64, intermediate_dim=48, lora_rank=config["r"],
            lora_alpha=config["lora_alpha"], use_dora=config["use_dora"])
        hub = {name: torch.from_numpy(value) for name, value in load_file(LLAMA / "base" / "model.safetensors").items()}
        base = hf_to_tune(hub, **HEADS)
        model.load_state_dict(base, strict=False)
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        state = torch.load(folder / "adapter_model.pt", weights_only=True, mmap=True)
        result = model.load_state_dict(state, strict=False)
        if result.unexpected_keys:
            raise ValueError(f"unexpected: {result.unexpected_keys[:3]}")
        # A layer that the file does not have adapts nothing: `lora_b` starts as zeros.
        state = get_merged_lora_ckpt(dict(model.state_dict()), config["r"], config["lora_alpha"])
        return arrays(tune_to_hf(state, **HEADS))

    for source, wanted in on_llama():
        if setup.selftest and source.parent.name != "torchtune":
            continue
        setup.judge("torchtune", source, "torchtune", EXACT,
                    lambda: relative(merged(through_peft(setup, source, "torchtune", LLAMA / "base")), wanted))


# ---------------------------------------------------------------- LitGPT

def litgpt(setup):
    import torch
    import yaml
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from litgpt.scripts.merge_lora import merge_lora
    from litgpt.utils import save_config

    config = Config(
        name="tiny", block_size=64, vocab_size=96, padded_vocab_size=96, n_layer=2, n_head=4, n_embd=32,
        n_query_groups=2, head_size=8, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48)

    def merged(folder):
        tuned, pretrained = setup.work / "tuned", setup.work / "pretrained"
        for path in (tuned, pretrained):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, tuned)
        pretrained.mkdir()
        own = yaml.safe_load((tuned / "model_config.yaml").read_text()) if (tuned / "model_config.yaml").exists() else {}
        for path in (tuned, pretrained):
            save_config(config, path)  # that of the model; an adapter tells of it what its factors depend on
            for file in ("tokenizer.json", "tokenizer_config.json"):  # asked for, not read
                (path / file).write_text("{}")
        whole = yaml.safe_load((tuned / "model_config.yaml").read_text())
        if any(whole[name] != value for name, value in own.items()):
            raise ValueError(f"model_config.yaml says {own}")
        hub = {name: torch.from_numpy(value) for name, value in load_file(LLAMA / "base" / "model.safetensors").items()}
        base = {}
        copy_weights_hf_llama(config, {}, base, hub)
        torch.save(base, pretrained / "lit_model.pth")
        merge_lora(tuned, pretrained, precision="32-true")
        state = {}
        copy_weights_llama(config, state, torch.load(tuned / "lit_model.pth", weights_only=True))
        return arrays(state)

    for source, wanted in on_llama():
        if setup.selftest and source.parent.name != "litgpt":
            continue
        setup.judge("LitGPT", source, "litgpt", EXACT,
                    lambda: relative(merged(through_peft(setup, source, "litgpt", LLAMA / "base")), wanted))


# ---------------------------------------------------------------- loralib

def loralib(setup):
    import loralib as library
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            fields = dict(r=RANK, lora_alpha=ALPHA)
            self.wte = library.Embedding(24, 12, **fields)
            self.query = library.Linear(12, 12, **fields)
            self.value = library.Linear(12, 8, **fields)
            self.c_fc = library.Linear(12, 20, fan_in_fan_out=True, **fields)
            self.norm = nn.LayerNorm(12)

    folder = FORMATS / "loralib"
    for name in ("plain", "lora_only"):
        source = folder / f"{name}.pt"

        def compute():
            model = Plain().train()
            base = {key: torch.from_numpy(value) for key, value in load_file(folder / f"{name}-base.safetensors").items()}
            model.load_state_dict(base, strict=False)
            if setup.selftest:
                path = source
            else:
                extra = ("--adapter-alpha", str(ALPHA))
                path = through_peft(setup, source, "loralib", folder / f"{name}-base.safetensors", extra) / "lora.pt"
            state = torch.load(path, weights_only=True)
            result = model.load_state_dict(state, strict=False)
            missing = [key for key in result.missing_keys if "lora_" in key]
            if missing or result.unexpected_keys:
                raise ValueError(f"missing {missing}, unexpected {result.unexpected_keys}")
            model.eval()
            found = {key: value for key, value in arrays(model.state_dict()).items() if "lora_" not in key}
            return relative(found, with_changes(folder / f"{name}-base.safetensors", folder / f"{name}-changed.safetensors"))

        setup.judge("loralib", source, "loralib", EXACT, compute)


# ---------------------------------------------------------------- AdapterHub

def adapters(setup):
    import adapters as library
    import torch
    import transformers

    folder = FORMATS / "adapterhub"
    tokens = torch.arange(8)[None]

    def output(model):
        with torch.no_grad():
            return model.eval()(tokens).last_hidden_state[0].numpy()

    for name in ("bert-lora", "bert-lora-default", "bert-ia3", "gpt2-lora", "gpt2-lora-all", "gpt2-ia3"):
        base = folder / f"{name.split('-')[0]}-base"

        def compute():
            kind = "function" if "ia3" in name else "changed"
            wanted = transformers.AutoModel.from_pretrained(base)
            state = with_changes(base / "model.safetensors", folder / f"{name}-{kind}.safetensors")
            wanted.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
            model = transformers.AutoModel.from_pretrained(base)
            library.init(model)
            path = through_peft(setup, folder / name, "adapterhub", base)
            loaded = {}
            own = model.load_adapter(str(path), loading_info=loaded, use_safetensors=True)
            if loaded.get("unexpected_keys") or loaded.get("missing_keys"):
                raise ValueError(str(loaded))
            model.set_active_adapters(own)
            blank = output(transformers.AutoModel.from_pretrained(base))
            expected = output(wanted)
            assert relative(blank, expected) > 0.001
            return relative(output(model), expected)

        setup.judge("AdapterHub", folder / name, "adapterhub", EXACT, compute)


convert.PEERS = {
    "torchtune": (torchtune, ("torchtune", "torchao", "torch")),
    "litgpt": (litgpt, ("litgpt", "torch")),
    "loralib": (loralib, ("loralib", "torch")),
    "adapters": (adapters, ("adapters", "transformers", "torch")),
}

if __name__ == "__main__":
    raise SystemExit(convert.main())
