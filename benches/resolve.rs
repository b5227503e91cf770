//! How long it takes to find a place for every module of a large adapter: names only, one thread.
//!
//!     cargo bench --bench resolve
//!
//! The law: 2,500 flattened names against a base of as many tensors in less than 50 ms, with everything that a
//! resolver makes when it is asked first.

use std::time::{Duration, Instant};

use loratool::naming::{Resolution, Resolver, Spelling};

const MODULES: usize = 2_500;
const ROUNDS: usize = 5;

/// Names of one kind of layer, as an adapter and as a base have them.
struct Case {
    what: &'static str,
    spelling: Spelling,
    module: &'static str,
    tensor: &'static str,
}

const CASES: &[Case] = &[
    Case {
        what: "flattened, a base with the same names",
        spelling: Spelling::Flattened,
        module: "lora_unet_down_blocks_1_attentions_0_transformer_blocks_*_attn1_to_out_0",
        tensor: "down_blocks.1.attentions.0.transformer_blocks.*.attn1.to_out.0.weight",
    },
    Case {
        what: "flattened, a base in another layout",
        spelling: Spelling::Flattened,
        module: "lora_unet_transformer_blocks_*_attn_to_out_0",
        tensor: "model.diffusion_model.double_blocks.*.img_attn.proj.weight",
    },
    Case {
        what: "dotted, a base with the same names",
        spelling: Spelling::Dotted,
        module: "model.layers.*.self_attn.o_proj",
        tensor: "model.layers.*.self_attn.o_proj.weight",
    },
    Case {
        what: "dotted, a base with another prefix",
        spelling: Spelling::Dotted,
        module: "language_model.model.layers.*.self_attn.o_proj",
        tensor: "model.language_model.layers.*.self_attn.o_proj.weight",
    },
    Case {
        what: "dotted, a base of llama.cpp",
        spelling: Spelling::Dotted,
        module: "model.layers.*.self_attn.o_proj",
        tensor: "blk.*.attn_output.weight",
    },
];

fn main() {
    for case in CASES {
        let numbered = |name: &str| -> Vec<String> {
            let name = |number: usize| name.replace('*', &number.to_string());
            (0..MODULES).map(name).collect()
        };
        let (modules, tensors) = (numbered(case.module), numbered(case.tensor));
        let round = |_| -> Duration {
            let tensors = tensors.clone();
            let start = Instant::now();
            let base = Resolver::new(tensors).of_architecture(Some("qwen2".to_owned()));
            for module in &modules {
                let found = base.resolve(module, case.spelling);
                let found = matches!(found, Resolution::Exact(_) | Resolution::Renamed(_));
                assert!(found, "{module}");
            }
            start.elapsed()
        };
        let mut times: Vec<Duration> = (0..ROUNDS).map(round).collect();
        times.sort();
        let (middle, first) = (times[ROUNDS / 2], times[0]);
        println!("{:<42} {middle:>10.2?} (at best {first:.2?})", case.what);
    }
}
