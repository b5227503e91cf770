//! XLabs' adapters for FLUX.1: `double_blocks.0.processor.qkv_lora1.down.weight`.
//!
//! Source: `XLabs-AI/x-flux`, `src/flux/modules/layers.py`. Of a double block the first processor is the
//! image's, the second the text's. In single blocks `qkv_lora` is added to query, key and value alone,
//! which `linear1` holds together with the MLP, and `proj_lora` to the output of `linear2`. No alpha.

use std::ops::Range;

use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Module};
use crate::error::{Reason, Result};
use crate::naming::Spelling;

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
