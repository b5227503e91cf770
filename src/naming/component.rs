//! Names of adapters for pipelines: which part a prefix names, and paths whose dots became underscores.
//!
//! Flattening cannot be undone (`to_q` and `proj_in` have underscores of their own), so the names of the
//! base are flattened instead and looked up. Sources: `kohya-ss/sd-scripts`, `networks/lora.py` (prefixes);
//! `huggingface/diffusers`, `loaders/` (components); the layout of the single files of Stable Diffusion.

use std::collections::{BTreeSet, HashMap};

/// Prefixes of flattened names, and what stands before the module's own path in a base: nothing where
/// the base is that part alone, or its place in a single file.
const PREFIXES: &[(&str, &[&str])] = &[
    ("lora_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("lora_prior_unet_", DENOISER),
    ("lycoris_", DENOISER),
    ("lora_te_", &["", "cond_stage_model.transformer."]),
    ("lora_te1_", &["", "conditioner.embedders.0.transformer."]),
    ("lora_te2_", &[""]),
    ("lora_te3_", &[""]),
    ("lora_prior_te_", &[""]),
];

const DENOISER: &[&str] = &["", "model.diffusion_model."];

/// Names of parts of a pipeline before a dotted path.
pub const COMPONENTS: &[&str] = &[
    "unet.",
    "transformer.",
    "prior.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
];

/// CLIP text encoders have it or not: transformers 5 writes `CLIPTextModel` without.
const OPTIONAL: &str = "text_model.";

/// The paths that a module may have in a base that is the part it names.
pub(super) fn spellings(path: &str) -> impl Iterator<Item = String> {
    let component = COMPONENTS
        .iter()
        .find(|component| path.starts_with(**component));
    let rest = component.map(|component| &path[component.len()..]);
    let text = component.is_some_and(|component| component.starts_with("text_encoder"));
    let other = rest
        .filter(|_| text)
        .map(|rest| match rest.strip_prefix(OPTIONAL) {
            Some(bare) => bare.to_owned(),
            None => format!("{OPTIONAL}{rest}"),
        });
    rest.map(str::to_owned).into_iter().chain(other)
}

/// The modules of a base by their flattened names.
#[derive(Debug)]
pub(super) struct Flattened {
    /// Names of weights.
    names: HashMap<String, Vec<String>>,
}

impl Flattened {
    pub(super) fn new<'a>(names: impl IntoIterator<Item = &'a String>) -> Self {
        let mut flattened = HashMap::<String, Vec<String>>::new();
        for name in names {
            if let Some(owner) = name.strip_suffix(".weight") {
                flattened.entry(flat(owner)).or_default().push(name.clone());
            }
        }
        Flattened { names: flattened }
    }

    /// Every weight that a flattened path can mean.
    pub(super) fn find(&self, path: &str) -> BTreeSet<&str> {
        let mut found = BTreeSet::new();
        for (prefix, roots) in PREFIXES {
            let Some(rest) = path.strip_prefix(prefix).filter(|rest| !rest.is_empty()) else {
                continue;
            };
            let mut spellings = vec![rest.to_owned()];
            if prefix.contains("_te") {
                let optional = flat(OPTIONAL);
                spellings.push(match rest.strip_prefix(&optional) {
                    Some(bare) => bare.to_owned(),
                    None => format!("{optional}{rest}"),
                });
            }
            for root in *roots {
                for rest in &spellings {
                    let names = self.names.get(&(flat(root) + rest)).into_iter().flatten();
                    // A dot of the root is a dot of the name.
                    found.extend(
                        names
                            .map(String::as_str)
                            .filter(|name| name.starts_with(root)),
                    );
                }
            }
        }
        found
    }
}

fn flat(path: &str) -> String {
    path.replace('.', "_")
}

#[cfg(test)]
mod tests {
    use super::super::{Place, Resolution, Resolver, Rows};

    fn exact(tensor: &str) -> Resolution {
        Resolution::Exact(Place {
            tensor: tensor.into(),
            rows: Rows::All,
        })
    }

    #[test]
    fn flattened_names_are_those_of_the_base_flattened() {
        let base = Resolver::new([
            "down_blocks.0.attentions.0.proj_in.weight",
            "down_blocks.0.attentions.0.proj_in.bias",
        ]);
        let found = base.resolve_flattened("lora_unet_down_blocks_0_attentions_0_proj_in");
        assert_eq!(found, exact("down_blocks.0.attentions.0.proj_in.weight"));
        let found = base.resolve_flattened("lycoris_down_blocks_0_attentions_0_proj_in");
        assert_eq!(found, exact("down_blocks.0.attentions.0.proj_in.weight"));
        for path in [
            "lora_te_down_blocks_0_attentions_0_proj_out",
            "down_blocks_0_attentions_0_proj_in",
            "lora_unet_",
        ] {
            assert_eq!(base.resolve_flattened(path), Resolution::Unresolved);
        }
    }

    #[test]
    fn two_names_that_flatten_alike_are_ambiguous() {
        let base = Resolver::new(["blocks.1.0.q.weight", "blocks.1_0.q.weight"]);
        assert_eq!(
            base.resolve_flattened("lora_unet_blocks_1_0_q"),
            Resolution::Ambiguous(vec![
                "blocks.1.0.q.weight".into(),
                "blocks.1_0.q.weight".into()
            ])
        );
    }

    #[test]
    fn the_parts_of_a_single_file_are_told_apart() {
        let (unet, text) = (
            "model.diffusion_model.input_blocks.1.1.proj_in.weight",
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        );
        let base = Resolver::new([unet, text]);
        let find = |path: &str| base.resolve_flattened(path);
        assert_eq!(find("lora_unet_input_blocks_1_1_proj_in"), exact(unet));
        let path = "text_model_encoder_layers_0_mlp_fc1";
        assert_eq!(find(&format!("lora_te_{path}")), exact(text));
        assert_eq!(find(&format!("lora_te1_{path}")), Resolution::Unresolved);
        assert_eq!(find(&format!("lora_unet_{path}")), Resolution::Unresolved);
    }

    #[test]
    fn the_name_of_the_part_is_taken_off_a_dotted_path() {
        let base = Resolver::new(["transformer_blocks.0.q.weight", "encoder.layers.0.q.weight"]);
        let find = |path: &str| base.resolve_in_component(path);
        for path in [
            "transformer.transformer_blocks.0.q",
            "transformer_blocks.0.q",
        ] {
            assert_eq!(find(path), exact("transformer_blocks.0.q.weight"));
        }
        let path = "text_encoder.text_model.encoder.layers.0.q";
        assert_eq!(find(path), exact("encoder.layers.0.q.weight"));
        assert_eq!(
            find("unet.text_model.encoder.layers.0.q"),
            Resolution::Unresolved
        );
    }
}
