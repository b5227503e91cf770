//! Adapters of llama.cpp: `blk.0.attn_q.weight.lora_a` and `.lora_b` in a GGUF file.
//!
//! Sources: `ggml-org/llama.cpp`, `src/llama-adapter.cpp` (`llama_adapter_lora_init_impl`), `src/llama-adapter.h`
//! (`get_scale`) and `convert_lora_to_gguf.py`. The scale is α over the rank of the tensor itself, and 1 where α
//! is zero or missing. `lora_a` of the token embedding is stored transposed. Names and the order of rows are
//! those of the weights in GGUF.

use super::draft::{Draft, Writer, Written, common, transposed};
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Layer, Scale};
use crate::containers::Entry;
use crate::containers::gguf::{self, Value};
use crate::error::{Error, Reason, Result};
use crate::methods::lora;
use crate::naming::Spelling;
use crate::naming::families::Layout;
use crate::tensor::Tensor;

/// The format.
pub(super) struct Gguf;

const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const EMBEDDING: &str = "token_embd";

impl Format for Gguf {
    fn id(&self) -> &'static str {
        "gguf"
    }

    fn name(&self) -> &'static str {
        "GGUF adapter (llama.cpp)"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        let ends = |end: &str| found.names().any(|name| name.ends_with(end));
        found.metadata("general.type") == Some("adapter")
            || ends(".weight.lora_a") && ends(".weight.lora_b")
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        found.file.refuse_blocks()?;
        let alpha = alpha(found)?;
        let mut pieces = Pieces::new(Spelling::Dotted);
        let (mut norms, mut experts) = (Vec::new(), Vec::new());
        for tensor in &found.file.directory.tensors {
            let name = tensor.name.as_str();
            let pair = name.strip_suffix(".lora_a").map(|path| (path, lora::DOWN));
            let pair = pair.or_else(|| Some((name.strip_suffix(".lora_b")?, lora::UP)));
            let pair = pair.and_then(|(path, role)| Some((path.strip_suffix(".weight")?, role)));
            match pair {
                Some(_) if tensor.shape.len() > 2 => experts.push(name.to_owned()),
                Some((EMBEDDING, lora::DOWN)) => {
                    if tensor.shape.len() != 2 {
                        let problem = format!("two axes were expected, not {:?}", tensor.shape);
                        return Err(tensor.error(Reason::FactorShape { problem }));
                    }
                    tensor.float()?;
                    let down = transposed(tensor);
                    pieces.add(EMBEDDING.to_owned(), Piece::Factor(lora::DOWN), &down);
                }
                Some((path, role)) => pieces.add(path.to_owned(), Piece::Factor(role), tensor),
                None if name.ends_with("_norm.weight") => norms.push(name.to_owned()),
                None => pieces.unknown(tensor),
            }
        }
        if !experts.is_empty() {
            let reason = Reason::MethodOnTarget {
                method: "LoRA of GGUF",
                what: "a mixture of experts (factors of three axes)",
            };
            return Err(Error::new(reason).with_cases(experts));
        }
        if !norms.is_empty() {
            let problem = "it brings trained norms, which llama.cpp ignores and which GGUF stores differently for some models: neither leaving them out nor applying them is right";
            let problem = problem.to_owned();
            return Err(Error::new(Reason::Stored { problem })
                .with_cases(norms)
                .with_hint("merge the adapter that this file was converted from"));
        }
        let facts = facts("llama.cpp", self.summary(found));
        let mut adapter = pieces.finish(found, facts, |path| {
            Ok(Told {
                scale: (alpha == 0.0).then_some(Scale::ONE),
                alpha: Some(alpha),
                embedding: path == EMBEDDING,
                ..Told::default()
            })
        })?;
        adapter.layout = Some(Layout::Gguf);
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        // By `lora_b`: that of the token embedding is not transposed.
        summarise(found, &[(".lora_b", 1)])
    }
}

impl Writer for Gguf {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        Some(Layout::Gguf)
    }

    /// One α for all tensors, which llama.cpp divides by the rank of each; the rest of each scale is
    /// multiplied into `lora_b`. Its own converter reads `lora_alpha` alone.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let Some(architecture) = draft.family else {
            return Err(Error::new(Reason::ArchitectureUnknown));
        };
        let mut written = Written {
            name: "adapter.gguf",
            ..Written::default()
        };
        let mut modules = Vec::new();
        for named in &draft.modules {
            let Some(factors) = written.low_rank(named, false) else {
                continue;
            };
            if factors.mid.is_some() || factors.bias.is_some() || factors.down.shape.len() != 2 {
                written.lose(
                    &*named.module.path,
                    "anything but two factors of a linear layer",
                );
                continue;
            }
            if named.module.layer == Layer::Embedding && named.path != EMBEDDING {
                let text = "LoRA on an embedding other than that of the tokens";
                written.lose(&*named.module.path, text);
                continue;
            }
            modules.push((named, factors));
        }
        // Zero is none for llama.cpp, and the scale then 1.
        let alphas = modules
            .iter()
            .map(|(_, factors)| f64::from(factors.alpha() as f32));
        let alpha = common(alphas).unwrap_or(1.0);
        for (named, mut factors) in modules {
            // The scale that is left after α over the rank of the tensor.
            let stated = alpha / factors.rank() as f64;
            let by = factors.scale.value / stated;
            written.fold(draft, named, &mut factors, by);
            let key = |end: &str| format!("{}.weight.{end}", named.path);
            let down = match named.path.as_str() {
                EMBEDDING => transposed(&factors.down),
                _ => factors.down.clone(),
            };
            written.put(draft, key("lora_a"), &down);
            written.put(draft, key("lora_b"), &factors.up);
        }
        written.lose_rest(draft);
        let metadata = vec![
            ("general.type".to_owned(), Value::Text("adapter".to_owned())),
            (
                "general.architecture".to_owned(),
                Value::Text(architecture.to_owned()),
            ),
            ("adapter.type".to_owned(), Value::Text("lora".to_owned())),
            (ALPHA.to_owned(), Value::F32(alpha as f32)),
        ];
        written.header = Some(Box::new(move |tensors: &[Tensor]| {
            let entries: Vec<Entry<'_>> = tensors
                .iter()
                .map(|tensor| Entry {
                    name: &tensor.name,
                    dtype: tensor.dtype,
                    shape: &tensor.shape,
                    blocks: None,
                })
                .collect();
            gguf::header(&metadata, &entries)
        }));
        Ok(written)
    }
}

/// α, zero where there is none.
fn alpha(found: &Found) -> Result<f64> {
    if let Some(value) = found.metadata(INVOCATION) {
        return Err(Error::new(Reason::ConfigField {
            field: INVOCATION.to_owned(),
            value: value.to_owned(),
            why: "an activated LoRA works only after its invocation tokens and cannot be merged",
        }));
    }
    if let Some(name) = found
        .metadata("adapter.type")
        .filter(|name| *name != "lora")
    {
        let name = format!("`{name}` (adapter.type)");
        return Err(Error::new(Reason::Method { name }));
    }
    let Some(text) = found.metadata(ALPHA) else {
        return Ok(0.0);
    };
    let expected = "a number";
    // It is stored as f32, whose shortest text is not its value.
    let alpha: f32 = text
        .parse()
        .map_err(|_| Error::new(Reason::FieldType { expected }).on(ALPHA))?;
    match alpha.is_finite() {
        true => Ok(f64::from(alpha)),
        false => {
            let value = alpha.to_string();
            Err(Error::new(Reason::AlphaNotFinite { value }).on(ALPHA))
        }
    }
}
