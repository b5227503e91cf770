//! Input and output embeddings that share one tensor.
//!
//! A file holds the shared tensor once. When an adapter changes the two sides differently, the only
//! right answer is to write both and to say in the configuration that they are no longer tied; when
//! both change alike, the result stays tied. (PEFT adds every delta to the shared tensor.)

use super::plan::{Opened, PlannedTensor};
use crate::adapter::{Adapter, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Edit;
use crate::error::{Error, Reason, Result};
use crate::json::Value;
use crate::naming::path::leaf;
use crate::notice::{Notice, NoticeKind};

/// The two names of a shared tensor.
pub(super) struct Ties {
    pub(super) embedding: String,
    pub(super) head: String,
    /// The files do not hold the head: it was added to the plan.
    added: bool,
}

impl Ties {
    /// Finds shared embeddings that an adapter may pull apart, and gives both sides a place in the plan.
    ///
    /// # Errors
    /// [`Reason::MethodOnTarget`] if one adapter pulls apart what another one keeps together.
    pub(super) fn find(
        base: &Checkpoint,
        adapters: &[Opened],
        tensors: &mut Vec<PlannedTensor>,
    ) -> Result<Option<Self>> {
        if !base.ties_embeddings() {
            return Ok(None);
        }
        let Some(embedding) = base.input_embedding() else {
            return Ok(None);
        };
        let head = match base.output_embedding() {
            Some(head) => head.name.clone(),
            None => base
                .dropped_output_embedding()
                .unwrap_or_else(|| head_name(base, &embedding.name))
                .to_owned(),
        };
        let sides = [owner(&embedding.name), owner(&head)].map(leaf);
        let touches = |adapter: &Adapter| {
            let modules = adapter.modules.iter().map(|module| module.path.as_str());
            let replaced = adapter
                .replacements
                .iter()
                .map(|replacement| owner(&replacement.name));
            let tokens = adapter.tokens.iter().map(|tokens| tokens.path.as_str());
            modules
                .chain(replaced)
                .chain(tokens)
                .any(|path| sides.contains(&leaf(path)))
        };
        let touching = || {
            let adapters = adapters.iter().map(|opened| &opened.adapter);
            adapters.filter(|adapter| touches(adapter))
        };
        if touching().all(|adapter| adapter.keeps_ties) {
            return Ok(None);
        }
        if touching().any(|adapter| adapter.keeps_ties) {
            let reason = Reason::MethodOnTarget {
                method: "an adapter that keeps tied embeddings together",
                what: "the same embeddings as one that pulls them apart",
            };
            return Err(Error::new(reason).on(&*embedding.name));
        }
        let added = match base.output_embedding() {
            // Both are stored: transformers ties them only if they are equal.
            Some(stored) => {
                let same = stored.shape == embedding.shape
                    && matches!((stored.bytes(), embedding.bytes()), (Ok(a), Ok(b)) if a == b);
                if !same {
                    return Ok(None);
                }
                false
            }
            None => {
                let at = tensors
                    .iter()
                    .position(|tensor| tensor.name == embedding.name);
                let Some(at) = at else {
                    return Ok(None);
                };
                let twin = PlannedTensor::of(embedding, head.clone(), tensors[at].shard);
                tensors.insert(at + 1, twin);
                true
            }
        };
        Ok(Some(Ties {
            embedding: embedding.name.clone(),
            head,
            added,
        }))
    }

    /// A copy of the weight below an adapter is a copy of the shared weight, so both sides start from it.
    pub(super) fn share(&self, tensors: &mut [PlannedTensor]) {
        let find = |name: &str| tensors.iter().position(|tensor| tensor.name == name);
        let (Some(embedding), Some(head)) = (find(&self.embedding), find(&self.head)) else {
            return;
        };
        for (from, to) in [(embedding, head), (head, embedding)] {
            if tensors[from].replaced_below && tensors[to].replaced_by.is_none() {
                let from = tensors[from].clone();
                tensors[to].source = from.source;
                tensors[to].shape = from.shape;
                tensors[to].replaced_by = from.replaced_by;
                return;
            }
        }
    }
}

/// Decides whether the two sides are still one tensor.
pub(super) fn settle(
    ties: Ties,
    adapters: &[Opened],
    tensors: &mut Vec<PlannedTensor>,
    notices: &mut Vec<Notice>,
    edits: &mut Vec<Edit>,
) -> Result<()> {
    let find = |tensors: &[PlannedTensor], name: &str| {
        tensors.iter().position(|tensor| tensor.name == name)
    };
    let (Some(embedding), Some(head)) = (find(tensors, &ties.embedding), find(tensors, &ties.head))
    else {
        return Ok(());
    };
    if same(&tensors[embedding], &tensors[head], adapters)? {
        if ties.added {
            tensors.remove(head);
        }
        return Ok(());
    }
    edits.push(Edit {
        field: "tie_word_embeddings",
        value: "false".to_owned(),
        insert: true,
    });
    let text = format!(
        "it shared its tensor with `{}`; the adapter{} changes the two differently, so both are written and tie_word_embeddings becomes false",
        ties.embedding,
        if adapters.len() == 1 { "" } else { "s" }
    );
    notices.push(Notice::new(NoticeKind::Untied, text).on(ties.head));
    Ok(())
}

fn same(a: &PlannedTensor, b: &PlannedTensor, adapters: &[Opened]) -> Result<bool> {
    let rows = |tensor: &PlannedTensor| -> Vec<(usize, String, u64, usize)> {
        let row = |(row, (tensor, from)): (&usize, &(crate::tensor::Tensor, usize))| {
            (*row, tensor.name.clone(), tensor.offset, *from)
        };
        tensor.rows.iter().map(row).collect()
    };
    if rows(a) != rows(b) || a.shape != b.shape || a.modules.len() != b.modules.len() {
        return Ok(false);
    }
    for (a, b) in a.modules.iter().zip(&b.modules) {
        let adapter = &adapters[a.adapter].adapter;
        let alike = a.adapter == b.adapter
            && a.strength == b.strength
            && adapter.tied
            && repeats(&adapter.modules[a.module], &adapter.modules[b.module])?;
        if !alike {
            return Ok(false);
        }
    }
    let one_place = a.source.offset == b.source.offset
        && std::sync::Arc::ptr_eq(&a.source.input, &b.source.input);
    Ok(one_place || a.source.equals(&b.source)?)
}

/// Whether `head` adds what `embedding` adds, seen from the other side.
fn repeats(embedding: &Module, head: &Module) -> Result<bool> {
    let alike = embedding.scale == head.scale && embedding.method.name() == head.method.name();
    Ok(alike && embedding.method.is_transpose(embedding, head)?)
}

/// Refuses to change the input embedding of a GGUF file that has no output embedding.
///
/// llama.cpp reads both from the one tensor (`TENSOR_DUPLICATED` in `src/llama-model.cpp`), and the
/// adapter was trained on the one side alone. Encoders have no output.
pub(super) fn refuse_shared(
    base: &Checkpoint,
    adapters: &[Opened],
    tensors: &[PlannedTensor],
) -> Result<()> {
    let shared = tensors
        .iter()
        .find(|tensor| tensor.name == "token_embd.weight");
    let Some(shared) = shared.filter(|_| base.tensor("output.weight").is_none()) else {
        return Ok(());
    };
    let is_encoder = base.shards.iter().any(|shard| {
        let mut said = shard.file.directory.metadata.iter();
        said.any(|(key, value)| {
            key == "general.architecture" && (value.contains("bert") || value.contains("encoder"))
        })
    });
    let parts = |planned: &super::plan::PlannedModule| adapters[planned.adapter].adapter.keeps_ties;
    let changes = shared.replaced_by.is_some()
        || !shared.rows.is_empty()
        || !shared.modules.iter().all(parts);
    if changes && !is_encoder {
        return Err(shared.source.error(Reason::SharedEmbedding));
    }
    Ok(())
}

fn owner(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(owner, _)| owner)
}

/// The name of an output embedding that a checkpoint does not hold (`_tied_weights_keys` of each model).
fn head_name(base: &Checkpoint, embedding: &str) -> &'static str {
    let model = base
        .configured("model_type")
        .and_then(Value::as_str)
        .unwrap_or("");
    if embedding.ends_with("embed_in.weight") {
        "embed_out.weight"
    } else if model == "whisper" {
        "proj_out.weight"
    } else {
        "lm_head.weight"
    }
}
