//! How PEFT spells each method: one row per tuner, and the only list of them.
//!
//! Sources: `src/peft/tuners/<name>/` of PEFT 0.21.2.

use super::config::Settings;
use crate::adapter::{Layer, Method, Role};
use crate::error::Result;
use crate::methods::{dora, ia3, lora};
use crate::tensor::Tensor;

/// A `peft_type`, or one variant of it.
#[derive(Debug)]
pub(super) struct Tuner {
    /// The value of `peft_type`.
    pub(super) name: &'static str,
    /// The variant: whether `use_dora` is set.
    pub(super) dora: bool,
    /// The mathematics.
    pub(super) method: &'static dyn Method,
    /// Whether the delta is scaled by `lora_alpha` / `r`.
    pub(super) scaled: bool,
    /// Its tensors.
    pub(super) tensors: &'static [&'static [Spelled]],
}

/// A tensor: the segment behind the module path, what may follow it, and what the tensor is.
#[derive(Debug)]
pub(super) struct Spelled {
    pub(super) token: &'static str,
    pub(super) ends: &'static [&'static str],
    pub(super) layer: Layer,
    pub(super) reads: Reads,
}

/// What a tensor is to its method.
#[derive(Debug)]
pub(super) enum Reads {
    /// Always this.
    As(Role),
    /// This, if the configuration says so; otherwise the key is unknown.
    If(fn(&Settings) -> bool, Role),
    /// What configuration, path and shape tell.
    By(fn(&Settings, &str, &Tensor) -> Result<Role>),
}

/// Every tuner that can be read.
pub(super) static TUNERS: &[Tuner] = &[
    Tuner {
        name: "LORA",
        dora: false,
        method: &lora::LORA,
        scaled: true,
        tensors: &[LOW_RANK],
    },
    Tuner {
        name: "LORA",
        dora: true,
        method: &dora::DORA,
        scaled: true,
        tensors: &[LOW_RANK, MAGNITUDE],
    },
    Tuner {
        name: "IA3",
        dora: false,
        method: &ia3::IA3,
        scaled: false,
        tensors: &[FACTORS],
    },
];

const LOW_RANK: &[Spelled] = &[
    Spelled {
        token: "lora_A",
        ends: &["weight"],
        layer: Layer::Dense,
        reads: Reads::As(lora::DOWN),
    },
    Spelled {
        token: "lora_B",
        ends: &["weight"],
        layer: Layer::Dense,
        reads: Reads::As(lora::UP),
    },
    Spelled {
        token: "lora_B",
        ends: &["bias"],
        layer: Layer::Dense,
        reads: Reads::If(|settings| settings.lora_bias, lora::BIAS),
    },
    // A parameter of its own, without the name of one.
    Spelled {
        token: "lora_embedding_A",
        ends: &[""],
        layer: Layer::Embedding,
        reads: Reads::As(lora::DOWN),
    },
    Spelled {
        token: "lora_embedding_B",
        ends: &[""],
        layer: Layer::Embedding,
        reads: Reads::As(lora::UP),
    },
];

const MAGNITUDE: &[Spelled] = &[Spelled {
    token: "lora_magnitude_vector",
    // Old files and raw state dicts have `.weight`.
    ends: &["", "weight"],
    layer: Layer::Dense,
    reads: Reads::As(dora::MAGNITUDE),
}];

const FACTORS: &[Spelled] = &[Spelled {
    token: "ia3_l",
    ends: &[""],
    layer: Layer::Dense,
    reads: Reads::By(side_of_ia3),
}];

/// For matrices the stored shape alone decides, as in PEFT's own forward pass.
fn side_of_ia3(settings: &Settings, path: &str, tensor: &Tensor) -> Result<Role> {
    Ok(match tensor.shape.as_slice() {
        [1, inputs] if *inputs != 1 => ia3::INPUT_SCALE,
        [outputs, 1] if *outputs != 1 => ia3::OUTPUT_SCALE,
        _ if settings.is_feedforward(path)? => ia3::INPUT_SCALE,
        _ => ia3::OUTPUT_SCALE,
    })
}

impl Tuner {
    /// What a tensor with this token and end is, if the tuner has it.
    pub(super) fn spelled(&self, token: &str, end: &str) -> Option<&'static Spelled> {
        let all = self.tensors.iter().copied().flatten();
        all.into_iter()
            .find(|spelled| spelled.token == token && spelled.ends.contains(&end))
    }
}
