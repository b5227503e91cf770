//! Dotted names with the tails of LoRA in any of their spellings: ComfyUI's own, ai-toolkit, OMI.
//!
//! Sources: `comfyanonymous/ComfyUI`, `comfy/lora.py`, `comfy/weight_adapter/` (names and tails);
//! `ostris/ai-toolkit`, `toolkit/network_mixins.py`; `Nerogar/OneTrainer`,
//! `modules/util/convert/lora/` (OMI: a fused layer is trained in parts, which are numbered).

use super::draft::{Draft, Named, Writer, Written};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary, diffusers, kohya};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::naming::families::{self, Layout, Side};
use crate::naming::path::{number, without_wrappers};
use crate::naming::{Spelling, component};

/// One of the formats.
pub(super) struct Dotted {
    id: &'static str,
    name: &'static str,
    recognises: fn(&Found) -> bool,
    parse: fn(&str) -> Option<(String, Piece)>,
    written: Option<Tails>,
}

/// What a format writes behind a path.
#[derive(Clone, Copy)]
enum Tails {
    /// Those of kohya.
    Kohya,
    /// Those of PEFT, without an alpha; and the metadata that say which tool it was.
    Peft { software: &'static str },
}

/// The names of the original model behind `diffusion_model.`, those of text encoders behind
/// `text_encoders.`.
pub(super) static COMFYUI: Dotted = Dotted {
    id: "comfyui",
    name: "ComfyUI (original model names)",
    recognises: |found| {
        found.names().any(|name| {
            let prefixes = ["diffusion_model.", "text_encoders."];
            prefixes.iter().any(|prefix| name.starts_with(prefix)) && parse(name).is_some()
        })
    },
    parse,
    written: Some(Tails::Kohya),
};

/// The same names, or those of diffusers, as the metadata `software` says.
pub(super) static AI_TOOLKIT: Dotted = Dotted {
    id: "ai-toolkit",
    name: "ai-toolkit",
    recognises: |found| {
        // It writes files of kohya's spelling as well.
        let is_dotted = |name| component::split(name, false).component.is_some();
        let software = found.metadata("software").unwrap_or_default();
        software.contains("ai-toolkit")
            && found
                .names()
                .any(|name| is_dotted(name) && parse(name).is_some())
    },
    parse,
    written: Some(Tails::Peft {
        software: r#"{"name": "ai-toolkit"}"#,
    }),
};

/// OMI's names: the original model's, with the parts of fused layers numbered.
pub(super) static OMI: Dotted = Dotted {
    id: "omi",
    name: "OMI",
    recognises: |found| {
        found.names().any(|name| {
            OMI_STARTS.iter().any(|start| name.starts_with(start)) && parse(name).is_some()
        })
    },
    parse: |name| parse(name).map(|(path, piece)| (of_parts(path), piece)),
    written: None, // the parts of fused layers are numbered
};

/// How paths start that no other format has.
const OMI_STARTS: &[&str] = &[
    "clip_l.",
    "clip_g.",
    "t5.",
    "transformer.double_blocks.",
    "transformer.single_blocks.",
    "transformer.joint_blocks.",
    "unet.input_blocks.",
    "unet.middle_block.",
    "unet.output_blocks.",
];

impl Format for Dotted {
    fn id(&self) -> &'static str {
        self.id
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn recognises(&self, found: &Found) -> bool {
        (self.recognises)(found)
    }

    fn writer(&self) -> Option<&dyn Writer> {
        self.written.map(|_| self as &dyn Writer)
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            match (self.parse)(&tensor.name) {
                Some((path, piece)) => pieces.add(path, piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let facts = facts(self.name, self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

impl Writer for Dotted {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        Some(Layout::Original)
    }

    /// ComfyUI reads kohya's tails behind its own names; ai-toolkit writes those of PEFT and has no alpha.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "adapter.safetensors",
            metadata: vec![("format".to_owned(), "pt".to_owned())],
            ..Written::default()
        };
        for named in &draft.modules {
            if !draft.names_part(named) {
                written.lose_unnamed(named);
                continue;
            }
            let owner = format!("{}{}", prefix(named), named.path);
            let key = |tail: &str| format!("{owner}.{tail}");
            if let Some(Tails::Kohya) = self.written {
                kohya::suffixed(draft, named, &mut written, key);
            } else if let Some(mut factors) = written.two_factors(named) {
                let by = factors.scale.value;
                written.fold(draft, named, &mut factors, by);
                written.put(draft, key("lora_A.weight"), &factors.down);
                written.put(draft, key("lora_B.weight"), &factors.up);
            }
        }
        if let Some(Tails::Peft { software }) = self.written {
            let software = software.to_owned();
            written.metadata.push(("software".to_owned(), software));
        }
        written.lose_rest(draft);
        Ok(written)
    }
}

/// What stands before a path: the denoiser where nothing else is named.
fn prefix(named: &Named) -> &'static str {
    let text = named.component.filter(|component| component.is_text);
    let Some(component) = text else {
        return "diffusion_model.";
    };
    let is_t5 = named.path.starts_with("encoder.block.");
    let all = component.dotted.iter();
    match all
        .copied()
        .find(|prefix| prefix.starts_with("text_encoders."))
    {
        _ if is_t5 => "text_encoders.t5xxl.transformer.",
        Some(prefix) => prefix,
        None => "text_encoders.clip_l.transformer.",
    }
}

/// Tails that neither diffusers nor kohya has.
const TAILS: &[(&str, Piece)] = &[
    (".magnitude", Piece::DoraScale),
    (".lora_A", Piece::DOWN),
    (".lora_B", Piece::UP),
];

/// The module and the piece of it that a key names.
fn parse(name: &str) -> Option<(String, Piece)> {
    diffusers::parse(name).or_else(|| {
        let ends = |(tail, piece): &(&str, Piece)| Some((name.strip_suffix(tail)?, *piece));
        let (path, piece) = TAILS.iter().find_map(ends).or_else(|| of_kohya(name))?;
        (!path.is_empty()).then(|| (without_wrappers(path), piece))
    })
}

/// Tails of kohya and LyCORIS, which are one or two segments.
fn of_kohya(name: &str) -> Option<(&str, Piece)> {
    let one = name.rfind('.')?;
    let two = name[..one].rfind('.');
    let cut = |at: usize| {
        let (path, tail) = (&name[..at], &name[at + 1..]);
        // Alone it may be any layer's own.
        let piece = kohya::tail(tail).filter(|_| tail != "weight")?;
        Some((path, piece))
    };
    two.and_then(cut).or_else(|| cut(one))
}

/// The hub's layer that a numbered part of a fused layer is; other paths as they are, but for FLUX's
/// `img_in.proj`, which is `img_in`.
fn of_parts(path: String) -> String {
    let parts = component::split(&path, false);
    let part = parts.path.rsplit_once('.').and_then(|(fused, digits)| {
        let number = number(digits)?;
        let found = families::find(fused, false);
        let fused = found.iter().filter(|m| m.side == Side::Other);
        fused.map(|m| m.siblings()).find_map(|parts| {
            let part = parts.get(number).filter(|_| parts.len() > 1)?;
            Some(part.name(Side::Hub))
        })
    });
    match (part, parts.path) {
        (Some(part), _) => format!("{}{part}", parts.prefix),
        (None, "img_in.proj") => format!("{}img_in", parts.prefix),
        (None, _) => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_are_taken_off_in_every_spelling() {
        for tail in [
            "lora_A.weight",
            "lora_down.weight",
            "lora_B.bias",
            "lora_mid.weight",
            "alpha",
            "magnitude",
            "dora_scale",
            "diff",
            "diff_b",
            "w_norm",
            "set_weight",
            "reshape_weight",
            "lokr_w1",
            "a1.weight",
        ] {
            let found = parse(&format!("diffusion_model.blocks.0.q.{tail}"));
            let path = found.map(|(path, _)| path);
            assert_eq!(
                path.as_deref(),
                Some("diffusion_model.blocks.0.q"),
                "{tail}"
            );
        }
        assert_eq!(parse("diffusion_model.blocks.0.q.weight"), None);
        assert_eq!(parse(".alpha"), None);
    }

    #[test]
    fn numbered_parts_are_layers_of_the_hub() {
        for (path, expected) in [
            (
                "double_blocks.3.img_attn.qkv.1",
                "transformer_blocks.3.attn.to_k",
            ),
            (
                "single_blocks.3.linear1.3",
                "single_transformer_blocks.3.proj_mlp",
            ),
            ("double_blocks.3.img_mlp.0", "double_blocks.3.img_mlp.0"),
            ("single_blocks.3.linear1.4", "single_blocks.3.linear1.4"),
            ("img_in.proj", "img_in"),
        ] {
            let found = of_parts(format!("transformer.{path}"));
            assert_eq!(found, format!("transformer.{expected}"));
        }
    }
}
