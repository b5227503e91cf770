//! kohya: `lora_unet_down_blocks_0_….lora_down.weight`, and LyCORIS, which spells its methods alike.
//!
//! Sources: `kohya-ss/sd-scripts`, `networks/lora.py`; `KohakuBlueleaf/LyCORIS`, `lycoris/modules/` and
//! `lycoris/utils/__init__.py`. The first dot ends the module; alpha is a tensor of one element, and a
//! module without it is scaled by 1.

use super::draft::{Draft, Named, Writer, Written, number, reshaped, typed};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Layer, Method};
use crate::error::Result;
use crate::methods::{full, lora};
use crate::naming::families::{self, Family, Layout};
use crate::naming::{Spelling, component};
use crate::tensor::Tensor;

/// The format.
pub(super) struct Kohya;

/// What follows the module, in full.
const SUFFIXES: &[(&str, Piece)] = &[
    ("lora_down.weight", Piece::Factor(lora::DOWN)),
    ("lora_up.weight", Piece::Factor(lora::UP)),
    ("lora_mid.weight", Piece::Factor(lora::MID)),
    ("alpha", Piece::Alpha),
    ("dora_scale", Piece::DoraScale),
    ("diff", Piece::Whole(full::DIFFERENCE)),
    ("diff_b", Piece::Whole(full::BIAS_DIFFERENCE)),
    ("w_norm", Piece::Whole(full::DIFFERENCE)),
    ("b_norm", Piece::Whole(full::BIAS_DIFFERENCE)),
    ("set_weight", Piece::Value),
    ("reshape_weight", Piece::Shape),
];

/// How the tensors of methods that are not read start.
const OTHERS: &[(&str, &str)] = &[
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("rescale", "OFT"),
    ("a1.", "GLoRA"),
    ("a2.", "GLoRA"),
    ("b1.", "GLoRA"),
    ("b2.", "GLoRA"),
    ("bm.", "GLoRA"),
    ("on_input", "IA3"),
    ("weight", "IA3"),
    ("lambda_layer", "T-LoRA"),
    ("q_layer.", "T-LoRA"),
    ("p_layer.", "T-LoRA"),
    ("bias_", "sparse bias"),
];

impl Format for Kohya {
    fn id(&self) -> &'static str {
        "kohya"
    }

    fn name(&self) -> &'static str {
        "kohya"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        found.names().any(is_prefixed)
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::Flattened);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path.to_owned(), piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let tool = found.metadata("ss_network_module").unwrap_or("kohya");
        let facts = facts(tool, self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

impl Writer for Kohya {
    /// sd-scripts trains SD1 and SD2 under the names of diffusers, everything else under its own.
    fn layout(&self, family: Option<&str>) -> Option<Layout> {
        (family != Some("sd1")).then_some(Layout::Original)
    }

    fn keeps_flattened(&self) -> bool {
        true
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "adapter.safetensors",
            ..Written::default()
        };
        for named in &draft.modules {
            module(draft, named, &mut written);
        }
        written.lose_rest(draft);
        written.metadata = metadata(draft, &written);
        written.hashes = true;
        Ok(written)
    }
}

/// A module under its flattened name.
pub(super) fn module(draft: &Draft<'_>, named: &Named, written: &mut Written) {
    let Some(prefix) = prefix(draft, named) else {
        return written.lose_unnamed(named);
    };
    let owner = format!("{prefix}{}", named.path.replace('.', "_"));
    suffixed(draft, named, written, |end| format!("{owner}.{end}"));
}

/// What stands before the flattened path.
fn prefix<'a>(draft: &Draft<'a>, named: &'a Named) -> Option<&'a str> {
    if let Some(prefix) = draft.prefix {
        return Some(prefix);
    }
    // A name that was flattened already.
    if named.prefix.ends_with('_') {
        return Some(&named.prefix);
    }
    let component = named.component?;
    let single = || {
        let second = |other: &Named| {
            let part = other.component.map(|part| part.flattened);
            part.is_some_and(|names| names.contains(&"lora_te2_"))
        };
        draft.family.is_none_or(|family| family == "sd1") && !draft.modules.iter().any(second)
    };
    Some(match component.flattened {
        ["lora_te_", ..] if single() => "lora_te_",
        ["lora_te_", ..] => "lora_te1_",
        [first, ..] => first,
        [] => return None,
    })
}

/// The tensors of a module under kohya's suffixes, which ComfyUI has as well.
pub(super) fn suffixed(
    draft: &Draft<'_>,
    named: &Named,
    written: &mut Written,
    key: impl Fn(&str) -> String,
) {
    let module = &named.module;
    if module.layer == Layer::Embedding {
        return written.lose(&*module.path, "LoRA on an embedding");
    }
    if module.method.name() == full::FULL.name() {
        let is_norm = module
            .get(full::DIFFERENCE)
            .is_some_and(|difference| difference.shape.len() == 1);
        for (role, whole, of_norm) in [
            (full::DIFFERENCE, "diff", "w_norm"),
            (full::BIAS_DIFFERENCE, "diff_b", "b_norm"),
        ] {
            if let Some(tensor) = module.get(role) {
                written.put(draft, key(if is_norm { of_norm } else { whole }), tensor);
            }
        }
        return;
    }
    let Some(factors) = written.low_rank(named, true) else {
        return;
    };
    if factors.bias.is_some() {
        // A bias has no suffix of its own beside factors; its difference is `diff_b`.
        return written.lose(&*module.path, "a trained bias (`lora_B.bias`)");
    }
    written.put(draft, key("lora_down.weight"), &factors.down);
    if let Some(mid) = &factors.mid {
        written.put(draft, key("lora_mid.weight"), mid);
    }
    written.put(draft, key("lora_up.weight"), &factors.up);
    let like = typed(&factors.up, draft.dtype);
    written.put_as_is(key("alpha"), &number(&like, factors.alpha()));
    // The axis that is not 1 tells which norms they are.
    let axes = factors.down.shape.len().max(2);
    let shaped = |norms: &Tensor, axis: usize| {
        let mut shape = vec![1; axes];
        shape[axis] = norms.elements();
        reshaped(norms, shape)
    };
    if let Some(norms) = &factors.magnitude {
        written.put(draft, key("dora_scale"), &shaped(norms, 0));
    }
    if let Some(norms) = &factors.input_magnitude {
        written.put(draft, key("dora_scale"), &shaped(norms, 1));
    }
}

/// What it states about a network, which a conversion changes.
const OF_NETWORK: &[&str] = &[
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
];

/// What sd-scripts states about a network; what the source states of its training and in Stability's ModelSpec stays
/// (`kohya-ss/sd-scripts`, `train_network.py`, `library/sai_model_spec.py`), but for hashes.
fn metadata(draft: &Draft<'_>, written: &Written) -> Vec<(String, String)> {
    let ranks = written
        .tensors
        .iter()
        .filter(|tensor| tensor.name.ends_with(".lora_down.weight"))
        .map(|tensor| tensor.dimension(0));
    let ranks: std::collections::BTreeSet<usize> = ranks.collect();
    let dimension = match ranks.iter().collect::<Vec<_>>().as_slice() {
        [only] => only.to_string(),
        _ => "Dynamic".to_owned(),
    };
    let mut metadata = vec![("format".to_owned(), "pt".to_owned())];
    metadata.push(("ss_network_dim".to_owned(), dimension));
    let denoiser = draft
        .family
        .and_then(Family::named)
        .and_then(Family::denoiser);
    // Some tools state a wrong base.
    let right = |text: &str| draft.family.is_none() || families::stated(text) == draft.family;
    let kept = draft.metadata.iter().filter(|(key, value)| match &**key {
        "ss_base_model_version" => right(value),
        "modelspec.architecture" => right(value),
        "modelspec.hash_sha256" => false,
        key if OF_NETWORK.contains(&key) => false,
        key => key.starts_with("ss_") || key.starts_with("modelspec."),
    });
    let kept: Vec<(String, String)> = kept.cloned().collect();
    if let Some(base) = denoiser.and_then(|own| own.stated_by_sd_scripts)
        && !kept.iter().any(|(key, _)| key == "ss_base_model_version")
    {
        metadata.push(("ss_base_model_version".to_owned(), base.to_owned()));
    }
    let module = denoiser.map_or("networks.lora", |own| own.network_of_sd_scripts);
    metadata.push(("ss_network_module".to_owned(), module.to_owned()));
    metadata.extend(kept);
    metadata.sort();
    metadata
}

fn is_prefixed(name: &str) -> bool {
    component::split(name, true).component.is_some()
}

fn parse(name: &str) -> Option<(&str, Piece)> {
    let (path, suffix) = name.split_once('.').filter(|(path, _)| is_prefixed(path))?;
    Some((path, tail(suffix)?))
}

/// What stands behind a module.
pub(super) fn tail(suffix: &str) -> Option<Piece> {
    let whole = SUFFIXES.iter().find(|(known, _)| *known == suffix);
    whole.map(|(_, piece)| *piece).or_else(|| {
        let other = OTHERS.iter().find(|(start, _)| suffix.starts_with(start));
        other.map(|(_, method)| Piece::Other(method))
    })
}
