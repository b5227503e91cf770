//! The grammar of PEFT's keys.

use super::unwrapped;

/// What PEFT puts in front; a second `model.` belongs to the model.
pub(super) const PREFIX: &str = "base_model.model.";

/// A key, taken apart.
#[derive(Debug, PartialEq)]
pub(super) struct Key {
    /// Module path in the model that was trained, without wrappers.
    pub(super) path: String,
    /// What the tensor is.
    pub(super) tail: Tail,
    /// The adapter's name, where the file kept it.
    pub(super) adapter_name: Option<String>,
    /// The tensor belongs to the layer below an adapter.
    pub(super) base_layer: bool,
    /// The output projection inside an adapted nn.MultiheadAttention.
    pub(super) output_projection: bool,
}

/// What the end of a key says.
#[derive(Debug, PartialEq)]
pub(super) enum Tail {
    /// A tensor of a tuner: its segment, and `weight`, `bias` or nothing behind it.
    Tuner {
        token: String,
        end: String,
    },
    Tokens,
    /// A whole parameter of the model, by its own name.
    Whole(String),
    /// The untouched copy that PEFT keeps beside a trained module; no part of the result.
    Original,
    /// State that only training needs (VeLoRA, MonteCLoRA).
    TrainingState,
    /// A tensor of a tuner that is not known here.
    Unknown,
}

impl Key {
    pub(super) fn parse(name: &str) -> Self {
        let path = name.strip_prefix(PREFIX).unwrap_or(name);
        let segments: Vec<&str> = path.split('.').collect();
        let from_end = |at: usize| segments.len() - at;
        match (0..segments.len()).find(|at| is_tuner(segments[*at], from_end(*at))) {
            Some(at) => Self::of_tuner(&segments, at),
            None => Self::of_model(&segments),
        }
    }

    /// `path . tuner tensor [. adapter name] [. weight | bias]`
    fn of_tuner(segments: &[&str], at: usize) -> Self {
        let (rest, parameter) = match segments[at + 1..].split_last() {
            Some((last @ (&"weight" | &"bias"), rest)) => (rest, Some(*last)),
            _ => (&segments[at + 1..], None),
        };
        let (rest, adapter_name) = match rest {
            [] => (rest, None),
            // `token_adapter.trainable_tokens_delta` is one tensor of two words.
            ["trainable_tokens_delta"] => (&[][..], None),
            ["trainable_tokens_delta", name] => (&[][..], Some((*name).to_owned())),
            [name] => (&[][..], Some((*name).to_owned())),
            _ => (rest, None),
        };
        let tail = match (segments[at], parameter, rest.is_empty()) {
            ("lora_velora_embed" | "lora_monteclora_sampler", ..) => Tail::TrainingState,
            (_, _, false) => Tail::Unknown,
            ("token_adapter" | "trainable_tokens_delta", None, _) => Tail::Tokens,
            (token, end, _) => Tail::Tuner {
                token: token.to_owned(),
                end: end.unwrap_or_default().to_owned(),
            },
        };
        let owner = &segments[..at];
        // `attn.base_layer.out_proj` is the second adapted layer of nn.MultiheadAttention.
        let output_projection = matches!(owner, [.., "base_layer", "out_proj"]);
        Key {
            path: module_path(owner),
            tail,
            adapter_name,
            base_layer: false,
            output_projection,
        }
    }

    /// `path . parameter`, perhaps through `base_layer`, `modules_to_save.<name>` or `original_module`.
    fn of_model(segments: &[&str]) -> Self {
        let (parameter, owner) = segments.split_last().expect("split yields a segment");
        let base_layer = owner.last() == Some(&"base_layer");
        let saved = owner
            .iter()
            .position(|segment| *segment == "modules_to_save");
        let adapter_name = saved
            .and_then(|at| owner.get(at + 1))
            .map(|name| (*name).to_owned());
        let tail = match owner.contains(&"original_module") {
            true => Tail::Original,
            false => Tail::Whole((*parameter).to_owned()),
        };
        let owner: Vec<&str> = match saved {
            // `classifier.modules_to_save.default.dense`: the module's own path goes on behind.
            Some(at) => owner[..at]
                .iter()
                .chain(owner.get(at + 2..).unwrap_or(&[]))
                .copied()
                .collect(),
            None => owner.to_vec(),
        };
        Key {
            path: module_path(&owner),
            tail,
            adapter_name,
            base_layer,
            output_projection: false,
        }
    }
}

fn module_path(segments: &[&str]) -> String {
    let segments: Vec<&str> = segments
        .iter()
        .copied()
        .filter(|segment| *segment != "base_layer")
        .collect();
    unwrapped(&segments.join("."))
}

/// Whether a segment is the name of a tuner's tensor rather than of a module.
fn is_tuner(segment: &str, from_end: usize) -> bool {
    const EXACT: &[&str] = &[
        "token_adapter",
        "trainable_tokens_delta",
        "miss_block",
        "bone_block",
        "prompt_embeddings",
    ];
    const PREFIXES: &[&str] = &[
        "hada_",
        "lokr_",
        "oft_",
        "boft_",
        "vera_",
        "pvera_",
        "vblora_",
        "adalora_",
        "randlora_",
        "shira_",
        "hra_",
        "road_",
        "fourierft_",
        "waveft_",
        "c3a_",
        "delora_",
        "gralora_",
        "glora_",
        "hira_",
        "poly_",
        "unilora_",
        "tinylora_",
        "frod_",
        "deft_",
        "psoft_",
        "osf_",
        "beft_",
        "adamss_",
        "peanut_",
        "lily_",
        "shadow_",
        "ln_tuning_",
        "adaption_",
    ];
    // Modules may be called `poly_encoder`; a tuner's tensor has at most two segments behind it.
    let prefixed = || from_end <= 3 && PREFIXES.iter().any(|prefix| segment.starts_with(prefix));
    ["lora_", "ia3_"]
        .iter()
        .any(|prefix| segment.starts_with(prefix))
        || EXACT.contains(&segment)
        || prefixed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str) -> (String, Tail) {
        let key = Key::parse(name);
        (key.path, key.tail)
    }

    fn tail(token: &str, end: &str) -> Tail {
        Tail::Tuner {
            token: token.into(),
            end: end.into(),
        }
    }

    #[test]
    fn only_the_first_prefix_is_peft_s_own() {
        let (path, found) =
            parsed("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
        assert_eq!(
            (path.as_str(), found),
            ("model.layers.0.self_attn.q_proj", tail("lora_A", "weight"))
        );
        let (path, _) = parsed("base_model.model.base_model.model.x.lora_B.weight");
        assert_eq!(path, "base_model.model.x");
    }

    #[test]
    fn an_adapter_name_left_in_the_key_is_taken_out() {
        for name in ["m.lora_A.default.weight", "m.lora_A.weight"] {
            assert_eq!(parsed(name), ("m".into(), tail("lora_A", "weight")));
        }
        assert_eq!(
            Key::parse("m.lora_B.mine.weight").adapter_name.as_deref(),
            Some("mine")
        );
        assert_eq!(
            parsed("m.lora_embedding_A.default"),
            ("m".into(), tail("lora_embedding_A", ""))
        );
        assert_eq!(
            parsed("m.lora_magnitude_vector.default.weight"),
            ("m".into(), tail("lora_magnitude_vector", "weight"))
        );
        assert_eq!(
            parsed("m.lora_magnitude_vector"),
            ("m".into(), tail("lora_magnitude_vector", ""))
        );
    }

    #[test]
    fn whole_tensors_keep_their_names() {
        assert_eq!(
            parsed("base_model.model.score.weight"),
            ("score".into(), Tail::Whole("weight".into()))
        );
        assert_eq!(
            parsed("base_model.model.classifier.modules_to_save.default.dense.bias"),
            ("classifier.dense".into(), Tail::Whole("bias".into()))
        );
        assert_eq!(parsed("m.original_module.weight").1, Tail::Original);
        let key = Key::parse("base_model.model.q.base_layer.bias");
        assert!(key.base_layer);
        assert_eq!(key.path, "q");
    }

    #[test]
    fn tensors_of_other_tuners_are_never_taken_for_whole_ones() {
        for name in [
            "m.lora_E",
            "m.lora_diag",
            "m.oft_R.weight",
            "m.lora_A.bias",
            "m.poly_lora_A",
        ] {
            assert!(matches!(parsed(name).1, Tail::Tuner { .. }), "{name}");
        }
        assert_eq!(parsed("m.lora_A.a.b.weight").1, Tail::Unknown);
        assert_eq!(
            parsed("poly_encoder.layers.0.proj.weight").1,
            Tail::Whole("weight".into())
        );
    }

    #[test]
    fn the_output_projection_of_multihead_attention_is_marked() {
        let key = Key::parse("base_model.model.attn.base_layer.out_proj.lora_A.weight");
        assert!(key.output_projection);
        assert_eq!(key.path, "attn.out_proj");
    }
}
