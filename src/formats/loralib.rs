//! loralib: `query.lora_A` and `query.lora_B` beside whole biases and heads, without a configuration.
//!
//! Source: `microsoft/LoRA`, `loralib/layers.py` and `utils.py` (`lora_state_dict`). A is r × in, B is out × r,
//! and α is a number of the training script alone. `MergedLinear` keeps which parts of a fused layer it adapts
//! in the script too. A model saved in evaluation mode has the product in its weight already.

use super::draft::{Draft, Writer, Written, common, transposed};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Layer, Replacement, ReplacementKind};
use crate::containers::torch;
use crate::error::{Error, Reason, Result};
use crate::methods::lora;
use crate::naming::families::Layout;
use crate::naming::{Spelling, path};

/// The format.
pub(super) struct Loralib;

impl Format for Loralib {
    fn id(&self) -> &'static str {
        "loralib"
    }

    fn name(&self) -> &'static str {
        "loralib"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        let ends = |end: &str| found.names().any(|name| name.ends_with(end));
        ends(".lora_A") && ends(".lora_B")
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::Dotted);
        let (mut merged, mut whole) = (Vec::new(), Vec::new());
        for tensor in &found.file.directory.tensors {
            let Some((owner, parameter)) = tensor.name.rsplit_once('.') else {
                pieces.unknown(tensor);
                continue;
            };
            let other = |suffix: &str| found.file.tensor(&format!("{owner}.{suffix}"));
            let role = match parameter {
                "lora_A" => lora::DOWN,
                "lora_B" => lora::UP,
                "weight" if other("lora_A").is_some() => {
                    whole.push(tensor.name.clone());
                    continue;
                }
                _ => {
                    let kind = match parameter {
                        "bias" => ReplacementKind::Bias,
                        _ => ReplacementKind::Module,
                    };
                    pieces.replace(Replacement {
                        name: path::without_wrappers(&tensor.name),
                        tensor: tensor.clone(),
                        kind,
                    });
                    continue;
                }
            };
            if role == lora::DOWN
                && let Some(up) = other("lora_B")
                && let (rows, rank) = (tensor.dimension(0), up.dimension(1))
                && rank > 0
                && rows > rank
                && rows.is_multiple_of(rank)
            {
                merged.push(format!("{owner}: {} parts", rows / rank));
            }
            pieces.add(path::without_wrappers(owner), Piece::Factor(role), tensor);
        }
        if !whole.is_empty() {
            let problem = "it holds the base's weights below its factors, and may have the product in them already (loralib merges in evaluation mode)".to_owned();
            return Err(Error::new(Reason::Stored { problem })
                .with_cases(whole)
                .with_hint(
                    "save the factors alone, with `loralib.lora_state_dict` in training mode",
                ));
        }
        if !merged.is_empty() {
            let problem = "some layers are a MergedLinear of several parts, and the file does not say which parts of the layer these are (`enable_lora`)".to_owned();
            return Err(Error::new(Reason::Stored { problem }).with_cases(merged));
        }
        let alpha = options.alpha()?;
        pieces.finish(found, facts("loralib", self.summary(found)), |path| {
            Ok(Told {
                alpha: Some(alpha),
                // Its `Embedding` has the factors of the transposed weight.
                embedding: path::is_embedding(path),
                ..Told::default()
            })
        })
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, &[(".lora_A", 0)])
    }
}

impl Writer for Loralib {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    /// What `lora_state_dict` keeps. There is no place for α: it is one number for all modules, which the report
    /// states; the rest of each scale is multiplied into `lora_B`.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "lora.pt",
            archive: Some(torch::archive),
            ..Written::default()
        };
        let mut modules = Vec::new();
        for named in &draft.modules {
            let Some(factors) = written.low_rank(named, false) else {
                continue;
            };
            if factors.down.shape.len() != 2 || factors.bias.is_some() {
                let text =
                    "LoRA on a convolution, which loralib factors otherwise, or a trained bias";
                written.lose(&*named.module.path, text);
                continue;
            }
            modules.push((named, factors));
        }
        let alphas = modules.iter().map(|(_, factors)| factors.alpha());
        let alpha = common(alphas).unwrap_or(1.0);
        written.alpha = Some(alpha);
        for (named, mut factors) in modules {
            let by = factors.scale.value / (alpha / factors.rank() as f64);
            written.fold(draft, named, &mut factors, by);
            let turned = named.module.layer != Layer::Embedding && path::is_embedding(&named.path);
            let (down, up) = match turned {
                true => (transposed(&factors.up), transposed(&factors.down)),
                false => (factors.down, factors.up),
            };
            written.put(draft, format!("{}.lora_A", named.path), &down);
            written.put(draft, format!("{}.lora_B", named.path), &up);
        }
        for replacement in &draft.adapter.replacements {
            let owner = replacement.name.strip_suffix(".weight");
            let adapted = |path: &str| draft.modules.iter().any(|named| named.path == path);
            match replacement.kind {
                // Beside factors it would be taken for a model that was saved whole.
                ReplacementKind::BaseLayer => {
                    written.lose(&*replacement.name, "a whole weight below factors");
                }
                _ if owner.is_some_and(adapted) => {
                    written.lose(&*replacement.name, "a whole weight below factors");
                }
                _ => written.put(draft, replacement.name.clone(), &replacement.tensor),
            }
        }
        written.lose_unless_whole(draft);
        Ok(written)
    }
}
