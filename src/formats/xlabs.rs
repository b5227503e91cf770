//! XLabs' adapters for FLUX.1: `double_blocks.0.processor.qkv_lora1.down.weight`.
//!
//! Sources: `XLabs-AI/x-flux`, `src/flux/modules/layers.py`, and `src/flux/xflux_pipeline.py`
//! (`update_model_with_lora`: one rank for all, and processors that are complete). Of a double block the first processor is the
//! image's, the second the text's. In single blocks `qkv_lora` is added to query, key and value alone,
//! which `linear1` holds together with the MLP, and `proj_lora` to the output of `linear2`. No alpha.

use std::collections::BTreeSet;
use std::ops::Range;

use super::draft::{Draft, Loss, Named, Writer, Written};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Module};
use crate::error::{Reason, Result};
use crate::naming::Spelling;
use crate::naming::families::Layout;
use crate::naming::path::leaf;
use crate::notice::{Notice, NoticeKind};

/// The format.
pub(super) struct XLabs;

/// The processor's layers, and the model's that they are added to.
const LAYERS: &[(&str, &str)] = &[
    ("qkv_lora1", "img_attn.qkv"),
    ("qkv_lora2", "txt_attn.qkv"),
    ("proj_lora1", "img_attn.proj"),
    ("proj_lora2", "txt_attn.proj"),
    ("qkv_lora", TOGETHER),
    ("proj_lora", "linear2"),
];

/// Query, key and value of a single block, until they are taken apart.
const TOGETHER: &str = "qkv";

const SUFFIXES: &[(&str, Piece)] = &[(".down.weight", Piece::DOWN), (".up.weight", Piece::UP)];

impl Format for XLabs {
    fn id(&self) -> &'static str {
        "xlabs"
    }

    fn name(&self) -> &'static str {
        "XLabs FLUX"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        found.names().any(|name| parse(name).is_some())
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path, piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let facts = facts(self.name(), self.summary(found));
        let mut adapter = pieces.finish(found, facts, |_| Ok(Told::default()))?;
        let mut modules = Vec::with_capacity(adapter.modules.len());
        for module in adapter.modules {
            match module.path.starts_with("single_blocks.") && module.path.ends_with(TOGETHER) {
                true => modules.extend(apart(&module)?),
                false => modules.push(module),
            }
        }
        adapter.modules = modules;
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

/// The layers of diffusers in one of the processor's, in the order of their rows.
const OF_DIFFUSERS: &[(&str, &str, &[&str])] = &[
    (
        "transformer_blocks.",
        "qkv_lora1",
        &["attn.to_q", "attn.to_k", "attn.to_v"],
    ),
    (
        "transformer_blocks.",
        "qkv_lora2",
        &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
    ("transformer_blocks.", "proj_lora1", &["attn.to_out.0"]),
    ("transformer_blocks.", "proj_lora2", &["attn.to_add_out"]),
    (
        "single_transformer_blocks.",
        "qkv_lora",
        &["attn.to_q", "attn.to_k", "attn.to_v"],
    ),
    ("single_transformer_blocks.", "proj_lora", &["proj_out"]),
];

impl Writer for XLabs {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written::safetensors("adapter.safetensors");
        // The processor's layers in their order, with the parts that are there.
        let mut owners: Vec<(String, Vec<(Place, &Named)>)> = Vec::new();
        for named in &draft.modules {
            let of_flux = draft.family.is_none_or(|family| family == "flux1")
                && named.component.is_some_and(|component| !component.is_text);
            let Some((owner, place)) = place(&named.path).filter(|_| of_flux) else {
                let text = "no layer of XLabs' processors";
                written.lose(&*named.module.path, text);
                continue;
            };
            if written.two_factors(named).is_none() {
                continue;
            }
            match owners.iter_mut().find(|(known, _)| *known == owner) {
                Some((_, parts)) => parts.push((place, named)),
                None => owners.push((owner, vec![(place, named)])),
            }
        }
        let mut ranks = BTreeSet::new();
        let mut processors: Vec<(&str, usize)> = Vec::new();
        for (owner, parts) in &mut owners {
            // The bytes do not depend on the order of the modules.
            parts.sort_by_key(|(place, _)| place.part);
            let height = |named: &Named| named.module.method.extent(&named.module).outputs;
            let (Place { of, .. }, first) = parts[0];
            let rows = height(first).unwrap_or(0);
            if parts.iter().any(|(_, named)| height(named) != Some(rows)) {
                let problem = "query, key and value have different numbers of outputs".to_owned();
                return Err(first.module.error(Reason::FactorShape { problem }));
            }
            let lies = |place: &Place| std::iter::once(place.part * rows..(place.part + 1) * rows);
            let mut fused = first.clone();
            if of > 1 {
                // What parts multiply by zero was put there when they were taken from a whole.
                let mut used: Vec<(Module, Vec<Range<usize>>)> = Vec::new();
                for (place, named) in parts.iter() {
                    let module = named.module.method.without_zeros(named.module.clone())?;
                    used.extend(module.map(|module| (module, lies(place).collect())));
                }
                if used.is_empty() {
                    used.push((first.module.clone(), lies(&parts[0].0).collect()));
                }
                let together: Vec<(&Module, Vec<Range<usize>>)> = used
                    .iter()
                    .map(|(module, rows)| (module, rows.clone()))
                    .collect();
                let modules = used.iter().map(|(module, _)| module);
                written.folded.extend(Loss::of_scales(owner, modules));
                fused.module = first.module.method.fuse(&together, of * rows)?;
            }
            let Some(mut factors) = written.two_factors(&fused) else {
                continue;
            };
            let by = factors.scale.value;
            written.fold(draft, &fused, &mut factors, by);
            written.put(draft, format!("{owner}.down.weight"), &factors.down);
            written.put(draft, format!("{owner}.up.weight"), &factors.up);
            ranks.insert(factors.rank());
            let processor = owner.strip_suffix(leaf(owner)).unwrap_or(owner);
            match processors.iter_mut().find(|(known, _)| *known == processor) {
                Some((_, layers)) => *layers += 1,
                None => processors.push((processor, 1)),
            }
        }
        let full = |(name, layers): &(&str, usize)| match name.starts_with("single_") {
            true => *layers == 2,
            false => *layers == 4,
        };
        if ranks.len() > 1 || !processors.iter().all(full) {
            let text = "x-flux loads files of one rank and with all layers of each block that they have; diffusers \
                        and ComfyUI load this one";
            let notice = Notice::new(NoticeKind::LoadedByFew, text);
            written.notices.push(notice);
        }
        written.lose_rest(draft);
        Ok(written)
    }
}

/// One of the layers of diffusers that a layer of a processor is.
#[derive(Clone, Copy)]
struct Place {
    part: usize,
    of: usize,
}

/// The processor's layer that a layer of diffusers is in, and where.
fn place(path: &str) -> Option<(String, Place)> {
    OF_DIFFUSERS.iter().find_map(|(block, layer, parts)| {
        let (number, rest) = path.strip_prefix(block)?.split_once('.')?;
        let part = parts.iter().position(|part| *part == rest)?;
        let block = match block.strip_prefix("single_") {
            Some(_) => "single_blocks",
            None => "double_blocks",
        };
        let of = parts.len();
        let owner = format!("{block}.{number}.processor.{layer}");
        Some((owner, Place { part, of }))
    })
}

fn parse(name: &str) -> Option<(String, Piece)> {
    let cut = |(suffix, piece): &(&str, Piece)| Some((name.strip_suffix(suffix)?, *piece));
    let (path, piece) = SUFFIXES.iter().find_map(cut)?;
    let (block, layer) = path.split_once(".processor.")?;
    let (_, layer) = LAYERS.iter().find(|(theirs, _)| *theirs == layer)?;
    Some((format!("{block}.{layer}"), piece))
}

/// Query, key and value under the names that diffusers has for them: the original model has no name
/// for less than `linear1`.
fn apart(module: &Module) -> Result<Vec<Module>> {
    let outputs = module.method.extent(module).outputs.unwrap_or(0);
    if !outputs.is_multiple_of(3) {
        let problem = format!("{outputs} outputs cannot be query, key and value");
        return Err(module.error(Reason::FactorShape { problem }));
    }
    let (height, block) = (outputs / 3, module.path.trim_end_matches(TOGETHER));
    let part = |(index, name): (usize, &str)| {
        let rows: Range<usize> = index * height..(index + 1) * height;
        let mut part = module.outputs(std::slice::from_ref(&rows))?;
        part.path = format!("{block}attn.{name}").replacen("single_", "single_transformer_", 1);
        Ok(part)
    };
    let names = ["to_q", "to_k", "to_v"];
    names.into_iter().enumerate().map(part).collect()
}
