//! cloneofsimo: factors by number, `unet:0:up`, or a bare list of them; read and written by a table of the layers.
//!
//! Source: `cloneofsimo/lora` d84074b3, `lora_diffusion/lora.py` (`save_safeloras_with_embeds`, `parse_safeloras`,
//! `save_lora_weight`, `_find_modules_v2`). The number of a pair is that of the layer among those that the script
//! walked through, depth first through the modules of the diffusers of its time, below parents of the classes that the
//! metadata list. The file does not say which layers these are. No α: the scale is 1.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::draft::{Draft, Named, Writer, Written};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::textual_inversion;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::naming::families::Layout;
use crate::naming::{Spelling, component};

/// The layers that numbers mean: paths behind the name of their part, each part numbered from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order(Vec<String>);

/// Stable Diffusion 1 and 2 in the diffusers of 2023 and transformers, with the classes that are looked below by
/// default: `CrossAttention`, `Attention`, `GEGLU`, and `CLIPAttention`.
const SD1: &str = "sd1";

/// Most layers of a table, and most bytes of its file.
const LAYERS_LIMIT: usize = 100_000;
const BYTES_LIMIT: u64 = 16 << 20;

impl Order {
    /// The table of a name (`sd1`), or of a file with a path on each line.
    ///
    /// # Errors
    /// What reading the file gives, [`Reason::NotUtf8`], [`Reason::BadOption`] for lines that are no path behind the name of a part, and
    /// [`Reason::TooMany`].
    pub fn read(text: &str) -> Result<Self> {
        if text == SD1 {
            return Ok(Order(sd1()));
        }
        let path = Path::new(text);
        let bytes = Input::open(path)?.read_all(BYTES_LIMIT)?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::new(Reason::NotUtf8 { at }).in_file(path)
        })?;
        Self::parse(&text).map_err(|e| e.in_file(path))
    }

    fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let layers: Vec<String> = lines.map(str::to_owned).collect();
        if layers.len() > LAYERS_LIMIT {
            let (what, limit) = ("layers of a table", LAYERS_LIMIT);
            return Err(Error::new(Reason::TooMany { what, limit }));
        }
        match layers.iter().find(|layer| part(layer).is_empty()) {
            None => Ok(Order(layers)),
            Some(layer) => Err(Error::new(Reason::BadOption {
                text: layer.clone(),
                problem: "not a path behind the name of its part, such as `unet.`".to_owned(),
            })),
        }
    }

    /// The layers of one part.
    fn of<'a>(&'a self, name: &str) -> Vec<&'a str> {
        let layers = self.0.iter().map(String::as_str);
        layers.filter(|layer| part(layer) == name).collect()
    }
}

/// The name of the part in front of a path, without its dot; nothing where there is none.
fn part(layer: &str) -> &str {
    let parts = component::split(layer, false);
    parts.prefix.trim_end_matches('.')
}

/// The path in a text encoder, whose first name transformers 5 leaves out.
fn bare(path: &str) -> &str {
    path.strip_prefix("text_model.").unwrap_or(path)
}

/// In the order in which `UNet2DConditionModel` of diffusers 0.9 to 0.14 makes its modules (the middle block after
/// those behind it, and in each block the two attentions around the first layer of the MLP), and `CLIPAttention`.
fn sd1() -> Vec<String> {
    let (down, up) = (0..3, 1..4);
    let down =
        down.flat_map(|block| (0..2).map(move |n| format!("down_blocks.{block}.attentions.{n}")));
    let up = up.flat_map(|block| (0..3).map(move |n| format!("up_blocks.{block}.attentions.{n}")));
    let middle = std::iter::once("mid_block.attentions.0".to_owned());
    let mut layers = Vec::new();
    for attention in down.chain(up).chain(middle) {
        for layer in [
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn1.to_out.0",
            "ff.net.0.proj",
            "attn2.to_q",
            "attn2.to_k",
            "attn2.to_v",
            "attn2.to_out.0",
        ] {
            layers.push(format!("unet.{attention}.transformer_blocks.0.{layer}"));
        }
    }
    for number in 0..12 {
        for layer in ["k_proj", "v_proj", "q_proj", "out_proj"] {
            let owner = "text_encoder.text_model.encoder.layers";
            layers.push(format!("{owner}.{number}.self_attn.{layer}"));
        }
    }
    layers
}

/// The classes that the layers of a part are looked for below, as the metadata list them.
///
/// The script takes a pair for every layer that it finds, so no class may be named that the table leaves out.
fn classes(part: &str, order: &Order) -> &'static str {
    let gated = |layer: &&str| layer.ends_with(".ff.net.0.proj");
    match part.starts_with("text_encoder") {
        true => r#"["CLIPAttention"]"#,
        false if order.of(part).iter().any(gated) => r#"["CrossAttention", "Attention", "GEGLU"]"#,
        false => r#"["CrossAttention", "Attention"]"#,
    }
}

/// `unet:0:up`, with classes and ranks in the metadata.
pub(super) struct Numbered;

impl Format for Numbered {
    fn id(&self) -> &'static str {
        "simo"
    }

    fn name(&self) -> &'static str {
        "cloneofsimo"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        found
            .names()
            .any(|name| name.contains(':') && (name.ends_with(":up") || name.ends_with(":down")))
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let order = options.order()?;
        let mut numbered = Vec::new();
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            let parsed = parse(&tensor.name);
            match parsed {
                Some((part, number, piece)) => numbered.push((part, number, piece, tensor)),
                None if textual_inversion::is_vectors(&tensor.name) => {
                    pieces.aside(tensor, VECTORS)
                }
                None => pieces.unknown(tensor),
            }
        }
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for (part, number, ..) in &numbered {
            let count = counts.entry(part).or_default();
            *count = (*count).max(number.saturating_add(1));
        }
        for (part, count) in counts {
            let layers = order.of(part);
            check(part, count, layers.len())?;
            for (_, number, piece, tensor) in numbered.iter().filter(|one| one.0 == part) {
                pieces.add(layers[*number].to_owned(), *piece, tensor);
            }
        }
        let facts = facts(self.name(), self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        let mut summary = summarise(found, &[(":down", 0)]);
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for name in found.names().filter(|name| name.ends_with(":down")) {
            if let Some((component, _)) = name.split_once(':') {
                *counts.entry(component).or_default() += 1;
            }
        }
        for (component, count) in counts {
            let below = found.metadata(component);
            let below = below.map_or(String::new(), |classes| format!(", below {classes}"));
            let text = format!("{count} layers by number{below}");
            summary.facts.insert(component.to_owned(), text);
        }
        summary.facts.extend(textual_inversion::vectors(found));
        summary
    }
}

/// A bare list of factors, up and down in turn, as `.pt` files hold them.
pub(super) struct Listed;

impl Format for Listed {
    fn id(&self) -> &'static str {
        "simo-list"
    }

    fn name(&self) -> &'static str {
        "cloneofsimo (list without module names)"
    }

    fn recognises(&self, found: &Found) -> bool {
        let tensors = &found.file.directory.tensors;
        let pairs = tensors.len() / 2;
        let matrix = |number: usize| {
            let tensor = found.file.tensor(&number.to_string())?;
            (tensor.shape.len() >= 2).then_some(tensor)
        };
        pairs > 0
            && tensors.len() == 2 * pairs
            && (0..pairs).all(|pair| match (matrix(2 * pair), matrix(2 * pair + 1)) {
                (Some(up), Some(down)) => up.dimension(1) == down.dimension(0),
                _ => false,
            })
    }

    /// The one part of the table that has as many layers.
    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let order = options.order()?;
        let pairs = found.file.directory.tensors.len() / 2;
        let parts: BTreeMap<&str, usize> =
            order.0.iter().fold(BTreeMap::new(), |mut all, layer| {
                *all.entry(part(layer)).or_default() += 1;
                all
            });
        let mut fitting = parts.iter().filter(|(_, count)| **count == pairs);
        let (Some((part, _)), None) = (fitting.next(), fitting.next()) else {
            return Err(check("the list", pairs, order.0.len())
                .err()
                .unwrap_or_else(|| {
                    let problem = format!("several parts of the table have {pairs} layers");
                    Error::new(Reason::FieldValue { problem })
                }));
        };
        let layers = order.of(part);
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            let number = tensor.name.parse::<usize>().ok();
            match number.and_then(|number| Some((number, layers.get(number / 2)?))) {
                Some((number, layer)) => {
                    let piece = match number % 2 {
                        0 => Piece::UP,
                        _ => Piece::DOWN,
                    };
                    pieces.add((*layer).to_owned(), piece, tensor);
                }
                None => pieces.unknown(tensor),
            }
        }
        let facts = facts(self.name(), self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        // The odd ones are "down".
        let odd = ["1", "3", "5", "7", "9"].map(|digit| (digit, 0));
        let mut summary = summarise(found, &odd);
        summary.methods.insert("LoRA".to_owned());
        summary
    }
}

/// Whether a part has the layers that the table gives it.
fn check(part: &str, found: usize, wanted: usize) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    let problem = format!("{part} has {found} layers, the table of --order {wanted}");
    Err(Error::new(Reason::FieldValue { problem }))
}

/// What the metadata say of a token (`EMBED_FLAG`).
const EMBEDDING: &str = "<embed>";

/// What `<s1>` is beside factors.
const VECTORS: &str = "vectors of a new token, which are not merged";

/// `unet:0:up`.
fn parse(name: &str) -> Option<(&str, usize, Piece)> {
    let mut pieces = name.split(':');
    let (part, number, side) = (pieces.next()?, pieces.next()?, pieces.next()?);
    let piece = match side {
        "up" => Piece::UP,
        "down" => Piece::DOWN,
        _ => return None,
    };
    let number = crate::naming::path::number(number)?;
    (pieces.next().is_none() && !part.is_empty()).then_some((part, number, piece))
}

impl Writer for Numbered {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    /// All layers of a part or none: the script that loads them takes pair after pair.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let order = draft.order.ok_or_else(|| Error::new(Reason::OrderNeeded))?;
        let mut written = Written {
            name: "lora_weight.safetensors",
            ..Written::default()
        };
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let mut numbers: HashMap<(&str, &str), usize> = HashMap::new();
        for layer in &order.0 {
            let name = part(layer);
            let number = counts.entry(name).or_default();
            let path = bare(&layer[name.len() + 1..]);
            numbers.entry((name, path)).or_insert(*number);
            *number += 1;
        }
        let mut parts: BTreeMap<&str, Vec<(usize, &Named)>> = BTreeMap::new();
        for named in &draft.modules {
            let names = named
                .component
                .map_or(&[][..], |component| component.dotted);
            let place = names.iter().find_map(|prefix| {
                let name = prefix.trim_end_matches('.');
                Some((name, *numbers.get(&(name, bare(&named.path)))?))
            });
            match place {
                Some((part, number)) => parts.entry(part).or_default().push((number, named)),
                None => written.lose(&*named.module.path, "the table of --order does not have it"),
            }
        }
        for (part, mut layers) in parts {
            let all = counts[part];
            if layers.len() != all {
                let text = format!(
                    "{} of {all} layers of the table have factors, and all must",
                    layers.len()
                );
                written.lose(part, text);
                continue;
            }
            layers.sort_by_key(|(number, _)| *number);
            written
                .metadata
                .push((part.to_owned(), classes(part, order).to_owned()));
            for (number, named) in layers {
                let Some(mut factors) = written.two_factors(named) else {
                    continue;
                };
                let by = factors.scale.value;
                written.fold(draft, named, &mut factors, by);
                written.put(draft, format!("{part}:{number}:up"), &factors.up);
                written.put(draft, format!("{part}:{number}:down"), &factors.down);
                let rank = factors.rank().to_string();
                written
                    .metadata
                    .push((format!("{part}:{number}:rank"), rank));
            }
        }
        let tokens = draft.adapter.unused.iter();
        for tensor in tokens.filter(|tensor| tensor.name.starts_with('<')) {
            let name = tensor.name.clone();
            written.metadata.push((name.clone(), EMBEDDING.to_owned()));
            written.put(draft, name.clone(), tensor);
            written.said.insert(name);
        }
        written.lose_rest(draft);
        Ok(written)
    }
}
