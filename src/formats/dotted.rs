//! Dotted names with the tails of LoRA in any of their spellings: ComfyUI's own, ai-toolkit, OMI, OneTrainer's
//! original names.
//!
//! Sources: `comfyanonymous/ComfyUI`, `comfy/lora.py`, `comfy/lora_convert.py`, `comfy/weight_adapter/` (names and
//! tails); `ostris/ai-toolkit` 27a03a91, `toolkit/lora_special.py`, `toolkit/network_mixins.py` and
//! `convert_lora_weights_before_save` of its models; `invoke-ai/InvokeAI`,
//! `invokeai/backend/model_manager/omi/vendor/convert/lora/` (OMI: a fused layer is trained in parts, which are
//! numbered); `Nerogar/OneTrainer` 23df3832, `modules/util/convert_lora_util.py`.

use super::draft::{Draft, Loss, Named, Writer, Written, scaled, sizes};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary, diffusers, kohya};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::methods::{lora, replaced};
use crate::naming::component::Component;
use crate::naming::families::{self, Layout, Side};
use crate::naming::path::{number, without_wrappers};
use crate::naming::{Attention, Rows, Spelling, component};

/// One of the formats.
pub(super) struct Dotted {
    id: &'static str,
    name: &'static str,
    recognises: fn(&Found) -> bool,
    parse: fn(&str) -> Option<(String, Piece)>,
    /// The names of layers that it writes.
    layout: fn(Option<&str>) -> Option<Layout>,
    write: fn(&Draft<'_>, &Named, &mut Written),
    /// What its metadata say besides the format.
    metadata: &'static [(&'static str, &'static str)],
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
    layout: |_| Some(Layout::Original),
    write: comfyui,
    metadata: &[],
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
    layout: |family| {
        ORIGINAL_OF_AI_TOOLKIT
            .contains(&family?)
            .then_some(Layout::Original)
    },
    write: ai_toolkit,
    metadata: &[("software", r#"{"name": "ai-toolkit"}"#)],
};

/// Families whose models ai-toolkit trains or writes under their original names; all others have those of diffusers.
const ORIGINAL_OF_AI_TOOLKIT: &[&str] = &["flux2", "wan", "anima"];

/// Families of which it writes `diffusion_model.` before names; before all others `transformer.`.
const PREFIXED_FOR_COMFYUI: &[&str] = &["flux2", "wan", "anima", "qwen-image", "z-image"];

/// OMI's names: the original model's, with the parts of fused layers numbered.
pub(super) static OMI: Dotted = Dotted {
    id: "omi",
    name: "OMI",
    recognises: |found| {
        found
            .names()
            .any(|name| parse(name).is_some_and(|(path, _)| is_of_omi(&path)))
    },
    parse: |name| parse(name).map(|(path, piece)| (of_parts(path), piece)),
    layout: |_| None,
    write: omi,
    metadata: &[],
};

/// The original names of a denoiser without anything before them.
pub(super) static ORIGINAL: Dotted = Dotted {
    id: "onetrainer-original",
    name: "OneTrainer (original names)",
    recognises: |found| {
        found.names().any(|name| {
            let path = parse(name)
                .filter(|_| ![".lora_A", ".lora_B"].iter().any(|end| name.ends_with(end)))
                .map(|parsed| parsed.0);
            path.is_some_and(|path| is_original(&path))
        })
    },
    parse,
    layout: |_| Some(Layout::Original),
    write: original,
    metadata: &[],
};

/// Text encoders in OMI.
const ENCODERS_OF_OMI: &[&str] = &["clip_l.", "clip_g.", "t5."];

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
        Some(self)
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
    fn layout(&self, family: Option<&str>) -> Option<Layout> {
        (self.layout)(family)
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written::safetensors("adapter.safetensors");
        for named in &draft.modules {
            (self.write)(draft, named, &mut written);
        }
        let more = self.metadata.iter();
        let more = more.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        written.metadata.extend(more);
        written.lose_rest(draft);
        Ok(written)
    }
}

/// Kohya's tails behind its own names, and those that only ComfyUI has.
fn comfyui(draft: &Draft<'_>, named: &Named, written: &mut Written) {
    let Some(component) = named.component else {
        return written.lose_unnamed(named);
    };
    let owner = format!("{}{}", of_comfyui(component, &named.path), named.path);
    let key = |tail: &str| format!("{owner}.{tail}");
    let module = &named.module;
    if let Some(value) = module.get(replaced::VALUE) {
        return written.put(draft, key("set_weight"), value);
    }
    let mut paddings = draft.adapter.paddings.iter();
    if let Some(padding) = paddings.find(|padding| padding.path == module.path)
        // Several modules of one layer say it once.
        && written.said.insert(padding.path.clone())
    {
        let shape = sizes(&padding.tensor, &padding.shape);
        written.put_as_is(key("reshape_weight"), &shape);
    }
    let Some(bias) = module.get(lora::BIAS) else {
        return kohya::suffixed(draft, named, written, key);
    };
    // The scale of factors is not that of differences.
    let mut rest = named.clone();
    rest.module
        .parameters
        .retain(|(role, _)| *role != lora::BIAS);
    let before = written.tensors.len();
    kohya::suffixed(draft, &rest, written, key);
    if written.tensors.len() == before {
        return; // the factors are a loss, and told
    }
    let by = module.scale.value;
    if by != 1.0 {
        written.folded.push(Loss {
            item: module.path.clone(),
            text: format!("the scale {by} is multiplied into the difference of the bias"),
        });
    }
    written.put(draft, key("diff_b"), &scaled(bias, by, draft.dtype));
}

/// Norms whose weight is called `scale` in the original FLUX, and was in ComfyUI.
const NORMS: &[&str] = &[".query_norm", ".key_norm"];

/// What stands before a path: the denoiser or a text encoder.
fn of_comfyui(component: &Component, path: &str) -> &'static str {
    let theirs = |prefix: &&&str| prefix.starts_with("text_encoders.");
    match component.dotted.iter().find(theirs) {
        _ if !component.is_text => "diffusion_model.",
        _ if path.starts_with("encoder.block.") => "text_encoders.t5xxl.transformer.",
        Some(prefix) => prefix,
        None => "text_encoders.clip_l.transformer.",
    }
}

/// Kohya's names for UNets; for others PEFT's tails without an alpha, behind `transformer.` or, where it has ComfyUI
/// in mind, `diffusion_model.`.
fn ai_toolkit(draft: &Draft<'_>, named: &Named, written: &mut Written) {
    let Some(component) = named.component else {
        return written.lose_unnamed(named);
    };
    if draft.denoiser == Some("unet.") {
        return kohya::module(draft, named, written);
    }
    let prefix = match (component.is_text, draft.family) {
        (true, _) if component.flattened.contains(&"lora_te1_") => "lora_te1.",
        (true, _) => "lora_te2.",
        (false, Some(family)) if PREFIXED_FOR_COMFYUI.contains(&family) => "diffusion_model.",
        (false, _) => "transformer.",
    };
    let owner = format!("{prefix}{}", named.path);
    let Some(mut factors) = written.two_factors(named) else {
        return;
    };
    let by = factors.scale.value;
    written.fold(draft, named, &mut factors, by);
    written.put(draft, format!("{owner}.lora_A.weight"), &factors.down);
    written.put(draft, format!("{owner}.lora_B.weight"), &factors.up);
}

/// Parts of fused layers by their number; everything else under its original name, with kohya's tails.
fn omi(draft: &Draft<'_>, named: &Named, written: &mut Written) {
    let Some(component) = named.component else {
        return written.lose_unnamed(named);
    };
    let mut named = named.clone();
    let prefix = match component.dotted {
        _ if !component.is_text => {
            let found = families::find(&named.path, false);
            let of_family = |found: &&families::Match| {
                found.side == Side::Hub && Some(found.family.name) == draft.family
            };
            let Some(found) = found.iter().find(of_family) else {
                let text = "no original name is known for it";
                return written.lose(&*named.module.path, text);
            };
            let parts = found.siblings();
            named.path = match parts.iter().position(|part| part.row.hub == found.row.hub) {
                Some(number) if parts.len() > 1 => {
                    format!("{}.{number}", found.name(Side::Other))
                }
                _ => found.name(Side::Other),
            };
            if named.path == FIRST {
                named.path = FIRST_OF_OMI.to_owned();
            }
            if found.row.rows == Rows::Swapped {
                let outputs = named.module.method.extent(&named.module).outputs;
                let rows =
                    outputs.and_then(|all| Rows::Swapped.ranges(all, 0, Attention::default()));
                match named.module.outputs(&rows.unwrap_or_default()) {
                    Ok(swapped) => named.module = swapped,
                    Err(error) => return written.lose(&*named.module.path, error.to_string()),
                }
            }
            draft.denoiser.unwrap_or("transformer.")
        }
        _ if named.path.starts_with("encoder.block.") => "t5.",
        all => all
            .iter()
            .find(|prefix| ENCODERS_OF_OMI.contains(prefix))
            .unwrap_or(&"clip_l."),
    };
    let owner = format!("{prefix}{}", named.path);
    kohya::suffixed(draft, &named, written, |tail| format!("{owner}.{tail}"));
}

/// Whether a path is a layer of a denoiser under its original name.
fn is_original(path: &str) -> bool {
    is_on(path, Side::Other)
}

fn is_on(path: &str, side: Side) -> bool {
    let found = families::find(path, false);
    let mut found = found.iter();
    found.any(|found| found.side == side && found.family.denoiser().is_some())
}

/// Whether only OMI has a path: an original name, perhaps with the number of a part, behind diffusers' name of the
/// denoiser; or an encoder by its own name.
fn is_of_omi(path: &str) -> bool {
    let parts = component::split(path, false);
    if ENCODERS_OF_OMI.contains(&parts.prefix) {
        return true;
    }
    let numbered = parts.path.rsplit_once('.');
    let fused = numbered.and_then(|(fused, digits)| number(digits).map(|_| fused));
    ["unet.", "transformer."].contains(&parts.prefix)
        && std::iter::once(parts.path)
            .chain(fused)
            .any(|path| is_on(path, Side::Other) && !is_on(path, Side::Hub))
}

/// The tails of PEFT beside an alpha. Files of these names hold the denoiser alone, and nothing else tells them.
fn original(draft: &Draft<'_>, named: &Named, written: &mut Written) {
    if named.component.is_none_or(|component| component.is_text) {
        return written.lose_unnamed(named);
    }
    if !is_original(&named.path) {
        return written.lose(&*named.module.path, "no original name is known for it");
    }
    let key = |tail: &str| {
        let tail = match tail {
            "lora_down.weight" => "lora_A.weight",
            "lora_up.weight" => "lora_B.weight",
            tail => tail,
        };
        format!("{}.{tail}", named.path)
    };
    kohya::suffixed(draft, named, written, key);
}

/// FLUX's first layer, and what OMI calls it.
const FIRST: &str = "img_in";
const FIRST_OF_OMI: &str = "img_in.proj";

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
        let is_norm = |path: &&str| NORMS.iter().any(|norm| path.ends_with(norm));
        let path = path.strip_suffix(".scale").filter(is_norm).unwrap_or(path);
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
        (None, FIRST_OF_OMI) => format!("{}{FIRST}", parts.prefix),
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
        let norm = "diffusion_model.single_blocks.0.norm.key_norm";
        for tail in ["set_weight", "scale.set_weight"] {
            let found = parse(&format!("{norm}.{tail}"));
            assert_eq!(found, Some((norm.to_owned(), Piece::Value)), "{tail}");
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
