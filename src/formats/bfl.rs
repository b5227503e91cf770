//! Black Forest Labs' control adapters for FLUX.1: the original names without a prefix.
//!
//! Sources: `black-forest-labs/flux`, `src/flux/modules/lora.py` (`lora_B` has a bias; the scale is 1);
//! `comfyanonymous/ComfyUI`, `comfy/lora_convert.py` (norms are replaced, `img_in` is widened). Readers know these
//! files by their norms.

use super::draft::{Draft, Writer, Written};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::methods::{lora, replaced};
use crate::naming::Spelling;
use crate::naming::families::Layout;

/// The format.
pub(super) struct Bfl;

const SUFFIXES: &[(&str, Piece)] = &[
    (".lora_A.weight", Piece::DOWN),
    (".lora_B.weight", Piece::UP),
    (".lora_B.bias", Piece::Factor(lora::BIAS)),
];

/// How norms of queries and keys end.
const NORM: &str = "_norm";
const KEY_NORM: &str = ".norm.key_norm.scale";

/// The layer that sees the control image beside the latents.
const WIDENED: &str = "img_in";

impl Format for Bfl {
    fn id(&self) -> &'static str {
        "bfl"
    }

    fn name(&self) -> &'static str {
        "BFL control LoRA"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        let any = |test: fn(&str) -> bool| found.names().any(test);
        any(|name| name.starts_with("double_blocks.") && name.contains(".lora_A."))
            && any(|name| name.ends_with(KEY_NORM))
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path.to_owned(), piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let factor = |suffix| found.file.tensor(&format!("{WIDENED}.{suffix}"));
        if let (Some(down), Some(up)) = (factor("lora_A.weight"), factor("lora_B.weight")) {
            let shape = vec![up.dimension(0), down.dimension(1)];
            pieces.pad(WIDENED.to_owned(), shape, up);
        }
        let facts = facts(self.name(), self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

impl Writer for Bfl {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        Some(Layout::Original)
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written::safetensors("adapter.safetensors");
        for named in &draft.modules {
            let item = &*named.module.path;
            if named.component.is_none_or(|component| component.is_text) {
                written.lose_unnamed(named);
                continue;
            }
            if let Some(value) = named.module.get(replaced::VALUE) {
                match named.path.ends_with(NORM) {
                    true => written.put(draft, format!("{}.scale", named.path), value),
                    false => written.lose(item, "a replaced weight that is no norm"),
                }
                continue;
            }
            let Some(mut factors) = written.low_rank(named, false) else {
                continue;
            };
            if factors.mid.is_some() {
                written.lose(item, "a Tucker core (`lora_mid`)");
                continue;
            }
            // `fold` has the bias as well.
            let by = factors.scale.value;
            written.fold(draft, named, &mut factors, by);
            let key = |tail: &str| format!("{}.{tail}", named.path);
            written.put(draft, key("lora_A.weight"), &factors.down);
            written.put(draft, key("lora_B.weight"), &factors.up);
            if let Some(bias) = &factors.bias {
                written.put(draft, key("lora_B.bias"), bias);
            }
            // That the weight is widened follows from the factors.
            let shape = [factors.up.dimension(0), factors.down.dimension(1)];
            let mut paddings = draft.adapter.paddings.iter();
            if named.path == WIDENED
                && paddings.any(|padding| padding.path == item && padding.shape == shape)
            {
                written.said.insert(item.to_owned());
            }
        }
        written.lose_rest(draft);
        if !written
            .tensors
            .iter()
            .any(|tensor| tensor.name.ends_with(KEY_NORM))
        {
            let text = "no norm of keys is replaced, by which such files are known";
            written.lose("double_blocks.*.img_attn.norm.key_norm", text);
        }
        Ok(written)
    }
}

fn parse(name: &str) -> Option<(&str, Piece)> {
    let cut = |(suffix, piece): &(&str, Piece)| Some((name.strip_suffix(suffix)?, *piece));
    let norm = || {
        let path = name.strip_suffix(".scale")?;
        path.ends_with(NORM).then_some((path, Piece::Value))
    };
    SUFFIXES.iter().find_map(cut).or_else(norm)
}
