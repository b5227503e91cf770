#!/usr/bin/env python3
"""Make the benchmark's inputs: a Llama base, a LoRA adapter for it, a file of many tensors. Standard library only.

    generate.py base    DIR [--scale 10 --width 2 --sparse]   bf16, laid out and sized like Llama-3.2-1B
    generate.py adapter DIR [--rank 16 ...same shape options]  PEFT folder, all linear layers
    generate.py many    FILE [--tensors 5000]                  one safetensors file of 1 GB
    generate.py flux    FILE [--rank 64]                       LoRA of FLUX.1 in diffusers' names, all linear layers

The same options give the same bytes. Values look like weights (about 0.02, never NaN or infinite) but repeat:
random bytes are made once, 8 MiB, and each tensor starts somewhere else in them. That makes 2.5 GB take
seconds; nothing measured here depends on the values, only on their being ordinary numbers.
"""
import argparse
import array
import json
import random
import sys
from pathlib import Path

BLOCK = 8 << 20
SHARDS = 3
DTYPE_SIZE = {"F32": 4, "BF16": 2}
VOCAB = 128256

# High byte of a bf16 (sign and upper 7 exponent bits) as for a normal distribution of deviation 0.02:
# 0x3d is [0.031, 0.125), 0x3c [0.0078, 0.031), and so on; 128 entries, then the same with the sign bit.
HIGH = bytes([0x3D] * 15 + [0x3C] * 74 + [0x3B] * 29 + [0x3A] * 8 + [0x39] * 2)
HIGH += bytes(h | 0x80 for h in HIGH)


class Values:
    """Endless values of one kind: a block of them, entered at another place for each tensor."""

    def __init__(self, block, seed):
        self.block = memoryview(block + block)  # doubled, so that any rotation is one slice
        self.size = len(block)
        self.rng = random.Random(seed)

    def write(self, out, count):
        start = self.rng.randrange(self.size // 64) * 64  # 64: never splits a value
        while count > 0:
            n = min(count, self.size)
            out.write(self.block[start:start + n])
            count -= n


def weights(seed):
    """bf16 values like trained weights."""
    rng = random.Random(seed)
    block = bytearray(BLOCK)
    block[0::2] = rng.randbytes(BLOCK // 2)
    block[1::2] = rng.randbytes(BLOCK // 2).translate(HIGH)
    return Values(bytes(block), seed + 1)


def uniform(seed, bound, dtype):
    """Uniform in [-bound, bound): how PEFT starts A; for B a small bound gives a delta like a trained one's."""
    rng = random.Random(seed)
    block = array.array("f", ((2 * rng.random() - 1) * bound for _ in range(1 << 19)))
    if sys.byteorder == "big":
        block.byteswap()
    block = block.tobytes()
    if dtype == "BF16":  # the upper half of an f32, truncated
        half = bytearray(len(block) // 2)
        half[0::2], half[1::2] = block[2::4], block[3::4]
        block = bytes(half)
    return Values(block, seed + 1)


def write_safetensors(path, tensors, sparse=False):
    """tensors: [(name, dtype, shape, Values)]. sparse: the header, then a hole of the right length."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, _ in tensors:
        size = nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        if sparse:
            out.truncate(out.tell() + end)
        else:
            for _, dtype, shape, values in tensors:
                values.write(out, nbytes(dtype, shape))


def nbytes(dtype, shape):
    count = DTYPE_SIZE[dtype]
    for n in shape:
        count *= n
    return count


class Llama:
    """Shapes of Llama-3.2-1B, or of a wider and deeper one."""

    def __init__(self, layers, width, scale):
        self.width = width
        self.hidden, self.mlp, self.kv = 2048 * width, 8192 * width, 512 * width
        self.layers = layers
        if scale != 1:  # as many layers as bring the whole to `scale` times the 1B base
            target = scale * Llama(16, 1, 1).total()
            self.layers = 0
            fixed = self.total()
            self.layers = 1
            self.layers = round((target - fixed) / (self.total() - fixed))

    def linears(self):
        """(module path, output width, input width) of every linear layer; the head is tied."""
        h, m, kv = self.hidden, self.mlp, self.kv
        for i in range(self.layers):
            for name, o, n in [("self_attn.q_proj", h, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h),
                               ("self_attn.o_proj", h, h), ("mlp.gate_proj", m, h), ("mlp.up_proj", m, h),
                               ("mlp.down_proj", h, m)]:
                yield f"model.layers.{i}.{name}", o, n

    def tensors(self):
        yield "model.embed_tokens.weight", [VOCAB, self.hidden]
        for name, o, n in self.linears():
            yield name + ".weight", [o, n]
            if name.endswith("down_proj"):  # the last of its layer
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    yield f"{name[:-len('mlp.down_proj')]}{norm}.weight", [self.hidden]
        yield "model.norm.weight", [self.hidden]

    def total(self):
        return sum(nbytes("BF16", shape) for _, shape in self.tensors())

    def config(self):
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.mlp, "num_hidden_layers": self.layers,
            "num_attention_heads": 32 * self.width, "num_key_value_heads": 8 * self.width, "head_dim": 64,
            "vocab_size": VOCAB, "tie_word_embeddings": True, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
        }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def base(args):
    model, values, total = Llama(args.layers, args.width, args.scale), weights(args.seed), 0
    shards = [[] for _ in range(SHARDS)]
    for name, shape in model.tensors():
        shards[min(SHARDS - 1, total * SHARDS // model.total())].append((name, "BF16", shape, values))
        total += nbytes("BF16", shape)
    args.out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        write_safetensors(args.out / file, tensors, args.sparse)
        weight_map |= {name: file for name, *_ in tensors}
    write_json(args.out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(args.out / "config.json", model.config())
    # Only there so that a merge has a file to carry over; it is no usable tokenizer.
    write_json(args.out / "tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {"<unk>": 0}, "merges": []}})
    return f"{len(weight_map)} tensors, {model.layers} layers, {total:,} bytes"


def adapter(args):
    model, dtype, total = Llama(args.layers, args.width, args.scale), args.dtype, 0
    b = uniform(args.seed + 1000, 0.005, dtype)
    a_by_width, tensors = {}, []
    for name, o, n in model.linears():
        if n not in a_by_width:
            a_by_width[n] = uniform(args.seed + n, n ** -0.5, dtype)
        key = f"base_model.model.{name}.lora_"
        tensors += [(key + "A.weight", dtype, [args.rank, n], a_by_width[n]), (key + "B.weight", dtype, [o, args.rank], b)]
        total += nbytes(dtype, [args.rank, n + o])
    args.out.mkdir(parents=True, exist_ok=True)
    write_safetensors(args.out / "adapter_model.safetensors", tensors)
    write_json(args.out / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": args.rank, "lora_alpha": 2 * args.rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    })
    return f"{len(tensors)} tensors, {total:,} bytes"


def many(args):
    """Adapter-like names and equal sizes: what is measured is the reading of the header."""
    values = weights(args.seed)
    side = 16 * max(1, round((args.bytes / args.tensors / 2) ** 0.5 / 16))
    tensors = []
    for i in range(args.tensors):
        module = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")[i // 2 % 4]
        name = f"base_model.model.model.layers.{i // 8}.{module}.lora_{'AB'[i % 2]}.weight"
        tensors.append((name, "BF16", [side, side], values))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(args.out, tensors, args.sparse)
    return f"{len(tensors)} tensors of {side}x{side}, {args.tensors * side * side * 2:,} bytes"


def flux(args):
    """19 double and 38 single blocks of FLUX.1-dev, as `save_lora_weights` names them."""
    hidden, mlp, dtype = 3072, 12288, "BF16"
    attention = [f"attn.{name}" for name in ("to_q", "to_k", "to_v")]
    both = attention + [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")]
    layers = []
    for i in range(19):
        layers += [(f"transformer_blocks.{i}.{name}", hidden, hidden) for name in both]
        for ff in ("ff", "ff_context"):
            layers += [(f"transformer_blocks.{i}.{ff}.net.0.proj", mlp, hidden),
                       (f"transformer_blocks.{i}.{ff}.net.2", hidden, mlp)]
    for i in range(38):
        layers += [(f"single_transformer_blocks.{i}.{name}", hidden, hidden) for name in attention]
        layers += [(f"single_transformer_blocks.{i}.proj_mlp", mlp, hidden),
                   (f"single_transformer_blocks.{i}.proj_out", hidden, hidden + mlp)]
    values, tensors = uniform(args.seed, 0.02, dtype), []
    for name, o, n in layers:
        tensors += [(f"transformer.{name}.lora_A.weight", dtype, [args.rank, n], values),
                    (f"transformer.{name}.lora_B.weight", dtype, [o, args.rank], values)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(args.out, tensors, args.sparse)
    return f"{len(tensors)} tensors, {sum(nbytes(dtype, shape) for _, dtype, shape, _ in tensors):,} bytes"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="what", required=True)
    for what, make in (("base", base), ("adapter", adapter), ("many", many), ("flux", flux)):
        s = sub.add_parser(what)
        s.set_defaults(make=make)
        s.add_argument("out", type=Path)
        s.add_argument("--seed", type=int, default=1)
        if what in ("base", "adapter"):
            s.add_argument("--layers", type=int, default=16)
            s.add_argument("--width", type=int, default=1, help="hidden, MLP and heads times this")
            s.add_argument("--scale", type=float, default=1, help="layers so that the base is this many times the 1B one")
        if what != "adapter":
            s.add_argument("--sparse", action="store_true", help="headers and holes: full length, no data on disk")
        else:
            s.add_argument("--rank", type=int, default=16)
            s.add_argument("--dtype", choices=DTYPE_SIZE, default="F32")
        if what == "many":
            s.add_argument("--tensors", type=int, default=5000)
            s.add_argument("--bytes", type=int, default=10**9)
        if what == "flux":
            s.add_argument("--rank", type=int, default=64)
    args = p.parse_args()
    print(f"{args.out.name}: {args.make(args)}")


if __name__ == "__main__":
    main()
