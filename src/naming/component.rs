//! Parts of a pipeline: how adapters name them in front of a path, and where bases keep them.
//!
//! Sources: `kohya-ss/sd-scripts`, `networks/lora.py`, and `Nerogar/OneTrainer`,
//! `modules/util/convert_lora_util.py` (prefixes); `huggingface/diffusers`, `loaders/` (components);
//! `comfyanonymous/ComfyUI`, `comfy/lora.py`; the layouts of the single files of Stable Diffusion.

use std::collections::{BTreeSet, HashMap};

/// A part of a pipeline.
#[derive(Debug, PartialEq, Eq)]
pub struct Component {
    /// How reports call it.
    pub name: &'static str,
    /// What stands before a dotted path.
    pub dotted: &'static [&'static str],
    /// What stands before a flattened path.
    pub flattened: &'static [&'static str],
    /// What may stand before its paths in a base: nothing where the base is that part alone.
    pub roots: &'static [&'static str],
    /// Whether it is a text encoder.
    pub is_text: bool,
}

/// Every part. Which encoder is the second or the third differs between pipelines, so the roots of the
/// two overlap; the paths of CLIP and T5 have nothing in common.
pub static COMPONENTS: &[Component] = &[
    Component {
        name: "denoiser",
        dotted: &["unet.", "transformer.", "prior.", "diffusion_model."],
        flattened: &[
            "lora_unet_",
            "lora_unet__", // Wan-Fun
            "lora_transformer_",
            "lora_prior_unet_",
            "lycoris_",
            "oft_unet_",
        ],
        roots: &[
            "",
            "unet.",
            "transformer.",
            "prior.",
            "model.diffusion_model.",
            "diffusion_model.",
        ],
        is_text: false,
    },
    Component {
        name: "first text encoder",
        dotted: &[
            "text_encoder.",
            "clip_l.",
            "text_encoders.clip_l.transformer.",
            "lora_te1.",
        ],
        flattened: &["lora_te_", "lora_te1_", "lora_prior_te_"],
        roots: &[
            "",
            "text_encoder.",
            "cond_stage_model.transformer.",
            "cond_stage_model.model.",
            "conditioner.embedders.0.transformer.",
            "text_encoders.clip_l.transformer.",
        ],
        is_text: true,
    },
    Component {
        name: "second text encoder",
        dotted: &[
            "text_encoder_2.",
            "clip_g.",
            "text_encoders.clip_g.transformer.",
            "lora_te2.",
        ],
        flattened: &["lora_te2_"],
        roots: &[
            "",
            "text_encoder_2.",
            "conditioner.embedders.1.model.",
            "conditioner.embedders.0.model.",
            "text_encoders.clip_g.transformer.",
            "text_encoders.t5xxl.transformer.",
        ],
        is_text: true,
    },
    Component {
        name: "third text encoder",
        dotted: &["text_encoder_3.", "t5.", "text_encoders.t5xxl.transformer."],
        flattened: &["lora_te3_"],
        roots: &[
            "",
            "text_encoder_3.",
            "text_encoder_2.",
            "text_encoders.t5xxl.transformer.",
        ],
        is_text: true,
    },
];

/// CLIP text encoders have it or not: transformers 5 writes `CLIPTextModel` without.
const OPTIONAL: &str = "text_model.";

/// A path without the name of its part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPart<'a> {
    /// The part, where the path names one.
    pub component: Option<&'static Component>,
    /// What stood before the path.
    pub prefix: &'a str,
    /// The path within the part.
    pub path: &'a str,
}

/// Takes the name of the part off a path.
pub fn split(path: &str, flattened: bool) -> InPart<'_> {
    let prefixes = |component: &'static Component| match flattened {
        true => component.flattened,
        false => component.dotted,
    };
    let found = COMPONENTS.iter().find_map(|component| {
        let fits = |prefix: &&&str| path.len() > prefix.len() && path.starts_with(**prefix);
        let prefix = prefixes(component)
            .iter()
            .filter(fits)
            .max_by_key(|p| p.len())?;
        Some((component, prefix.len()))
    });
    let (prefix, rest) = path.split_at(found.map_or(0, |(_, length)| length));
    InPart {
        component: found.map(|(component, _)| component),
        prefix,
        path: rest,
    }
}

/// A path of a base as adapters name it, and whether it names its part: what single files of pipelines put before
/// the layers of a part (`model.diffusion_model.`) becomes the part's name.
pub fn of_base(path: &str) -> (String, bool) {
    let root = COMPONENTS.iter().flat_map(|component| {
        let roots = component.roots.iter().filter(|root| !root.is_empty());
        roots.map(move |root| (component, *root))
    });
    // Of two parts that share one, the first has it.
    let longest = root
        .filter(|(component, root)| path.starts_with(root) && !component.dotted.contains(root))
        .min_by_key(|(_, root)| std::cmp::Reverse(root.len()));
    match longest {
        Some((component, root)) => {
            let name = match component.is_text {
                true => component.dotted[0],
                false => "diffusion_model.",
            };
            (format!("{name}{}", &path[root.len()..]), true)
        }
        None => (path.to_owned(), false),
    }
}

/// A part by what stands before its dotted paths, without the dot, and with it.
pub fn named(name: &str) -> Option<(&'static Component, &'static str)> {
    let is_it = |prefix: &&&'static str| prefix.strip_suffix('.') == Some(name);
    COMPONENTS.iter().find_map(|component| {
        let prefix = component.dotted.iter().find(is_it)?;
        Some((component, *prefix))
    })
}

impl<'a> InPart<'a> {
    /// A path that names no part.
    pub fn bare(path: &'a str) -> Self {
        InPart {
            component: None,
            prefix: "",
            path,
        }
    }

    /// The path, and its other spelling in a text encoder.
    pub fn spellings(self, flattened: bool) -> Vec<String> {
        let mut all = vec![self.path.to_owned()];
        if self.component.is_none_or(|component| component.is_text) {
            let optional = match flattened {
                true => flat(OPTIONAL),
                false => OPTIONAL.to_owned(),
            };
            all.push(match self.path.strip_prefix(&optional) {
                Some(bare) => bare.to_owned(),
                None => format!("{optional}{}", self.path),
            });
        }
        all
    }

    /// Where a base may keep the part.
    pub fn roots(self) -> BTreeSet<&'static str> {
        let all = COMPONENTS.iter().filter(|component| match self.component {
            Some(own) => *component == own,
            None => true,
        });
        all.flat_map(|component| component.roots).copied().collect()
    }
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

    /// Every weight that a flattened path can mean; one without a prefix means none.
    pub(super) fn find(&self, path: InPart<'_>, roots: &[&'static str]) -> BTreeSet<&str> {
        let mut found = BTreeSet::new();
        if path.component.is_none() {
            return found;
        }
        for root in roots {
            for rest in path.spellings(true) {
                let names = self.names.get(&(flat(root) + &rest)).into_iter().flatten();
                // A dot of the root is a dot of the name.
                let names = names.map(String::as_str);
                found.extend(names.filter(|name| name.starts_with(*root)));
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
    use super::super::{Place, Resolution, Resolver, Spelling};

    fn exact(tensor: &str) -> Resolution {
        Resolution::Exact(vec![Place::whole(tensor)])
    }

    #[test]
    fn flattened_names_are_those_of_the_base_flattened() {
        let base = Resolver::new([
            "down_blocks.0.attentions.0.proj_in.weight",
            "down_blocks.0.attentions.0.proj_in.bias",
        ]);
        let find = |path: &str| base.resolve(path, Spelling::Flattened);
        let found = find("lora_unet_down_blocks_0_attentions_0_proj_in");
        assert_eq!(found, exact("down_blocks.0.attentions.0.proj_in.weight"));
        for prefix in ["lycoris_", "lora_unet__"] {
            let found = find(&format!("{prefix}down_blocks_0_attentions_0_proj_in"));
            assert_eq!(found, exact("down_blocks.0.attentions.0.proj_in.weight"));
        }
        for path in [
            "lora_te_down_blocks_0_attentions_0_proj_out",
            "down_blocks_0_attentions_0_proj_in",
            "lora_unet_",
        ] {
            assert_eq!(find(path), Resolution::Unresolved);
        }
    }

    #[test]
    fn two_names_that_flatten_alike_are_ambiguous() {
        let base = Resolver::new(["blocks.1.0.q.weight", "blocks.1_0.q.weight"]);
        assert_eq!(
            base.resolve("lora_unet_blocks_1_0_q", Spelling::Flattened),
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
        let find = |path: &str| base.resolve(path, Spelling::Flattened);
        assert_eq!(find("lora_unet_input_blocks_1_1_proj_in"), exact(unet));
        let path = "text_model_encoder_layers_0_mlp_fc1";
        assert_eq!(find(&format!("lora_te_{path}")), exact(text));
        assert_eq!(find(&format!("lora_te3_{path}")), Resolution::Unresolved);
        assert_eq!(find(&format!("lora_unet_{path}")), Resolution::Unresolved);
    }

    #[test]
    fn the_name_of_the_part_is_taken_off_a_dotted_path() {
        let base = Resolver::new(["transformer_blocks.0.q.weight", "encoder.layers.0.q.weight"]);
        let find = |path: &str| base.resolve(path, Spelling::InComponent);
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
