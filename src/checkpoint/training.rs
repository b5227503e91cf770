//! What the torch file of a training holds besides weights of their own: a dictionary around them, the
//! state of the optimizer, and several names for one storage.
//!
//! Sources: `huggingface/safetensors`, `bindings/python/py_src/safetensors/torch.py`
//! (`_remove_duplicate_names`), `huggingface/transformers`, `modeling_utils.py`
//! (`remove_tied_weights_from_state_dict`): of the names of one tensor those that loading ties again
//! are dropped, and of the rest the first in the order of the alphabet is kept.

use std::collections::HashSet;
use std::sync::Arc;

use super::source::is_output_embedding;
use crate::containers::{Directory, TensorFile};
use crate::notice::{Notice, NoticeKind};
use crate::tensor::Tensor;

/// The dictionary that holds the weights in a checkpoint of Lightning and of latent diffusion.
const WRAPPER: &str = "state_dict.";

/// Most names that a notice lists.
const LISTED: usize = 50;

/// Takes the dictionary of weights out of what was saved with it.
pub(super) fn unwrap(file: &mut TensorFile, notices: &mut Vec<Notice>) {
    let tensors = &file.directory.tensors;
    let is_wrapped = tensors
        .iter()
        .any(|tensor| tensor.name.starts_with(WRAPPER));
    let mut left: Vec<String> = Vec::new();
    file.arrange(|directory| {
        if is_wrapped {
            let all = std::mem::take(&mut directory.tensors);
            for mut tensor in all {
                match tensor.name.strip_prefix(WRAPPER) {
                    Some(name) => {
                        tensor.name = name.to_owned();
                        directory.tensors.push(tensor);
                    }
                    None => left.push(tensor.name),
                }
            }
        }
        left.extend(directory.metadata.drain(..).map(|(name, _)| name));
    });
    if is_wrapped {
        let text = "the weights lie in the dictionary `state_dict`, whose name is taken off";
        notices.push(Notice::new(NoticeKind::BaseLayout, text).in_file(file.input.path()));
    }
    if !left.is_empty() {
        let text = format!("no weights, and not in the result: {}", listed(&left));
        notices.push(Notice::new(NoticeKind::NotWeights, text).in_file(file.input.path()));
    }
}

fn listed(names: &[String]) -> String {
    let shown = names[..names.len().min(LISTED)].join(", ");
    match names.len().checked_sub(LISTED) {
        Some(more @ 1..) => format!("{shown} and {more} more"),
        _ => shown,
    }
}

/// Keeps one name of each tensor that has several, and puts the tensors in the order in which
/// safetensors are written, so that every one is aligned. Returns the dropped names.
pub(super) fn unshare(
    file: &mut TensorFile,
    untied: bool,
    unindexed: &HashSet<String>,
    notices: &mut Vec<Notice>,
) -> Vec<String> {
    let mut dropped = Vec::new();
    file.arrange(|directory| {
        dropped = aliases(directory, untied, unindexed);
        let gone: HashSet<&str> = dropped.iter().map(|(name, _)| name.as_str()).collect();
        directory
            .tensors
            .retain(|tensor| !gone.contains(tensor.name.as_str()));
        directory
            .tensors
            .sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize()));
        // As both libraries write it; loaders of transformers ask for the first.
        directory.metadata = vec![("format".to_owned(), "pt".to_owned())];
        let names = dropped.iter().filter(|(name, _)| name != "format");
        directory.metadata.extend(names.cloned());
    });
    for (name, kept) in &dropped {
        let text = format!("it is the same tensor as `{kept}`, under which it is kept");
        let notice = Notice::new(NoticeKind::SharedTensor, text).on(&**name);
        notices.push(notice.in_file(file.input.path()));
    }
    dropped.into_iter().map(|(name, _)| name).collect()
}

/// Names to drop, each with the one that is kept.
fn aliases(
    directory: &Directory,
    untied: bool,
    unindexed: &HashSet<String>,
) -> Vec<(String, String)> {
    let place = |tensor: &Tensor| {
        let memory = tensor
            .memory
            .as_ref()
            .map(|memory| Arc::as_ptr(memory).addr());
        let dtype = tensor.dtype.to_string();
        (memory, tensor.offset, tensor.shape.clone(), dtype)
    };
    let mut places: Vec<_> = directory
        .tensors
        .iter()
        // Nothing is shared where there is nothing; an output embedding that is not tied is a copy.
        .filter(|tensor| tensor.length > 0 && !(untied && is_output_embedding(&tensor.name)))
        .map(|tensor| (place(tensor), tensor.name.as_str()))
        .collect();
    places.sort();
    let mut dropped = Vec::new();
    for group in places.chunk_by(|(a, _), (b, _)| a == b) {
        let names = || group.iter().map(|(_, name)| *name);
        let Some(kept) = names().min_by_key(|name| (unindexed.contains(*name), rank(name), *name))
        else {
            continue;
        };
        let others = names().filter(|name| *name != kept);
        dropped.extend(others.map(|name| (name.to_owned(), kept.to_owned())));
    }
    dropped.sort();
    dropped
}

/// Which of several names is kept: `shared` of T5 and BART before the embeddings that are tied to it,
/// and those before the output (`_tied_weights_keys` of the models).
fn rank(name: &str) -> usize {
    if name == "shared.weight" || name.ends_with(".shared.weight") {
        0
    } else if is_output_embedding(name) {
        2
    } else {
        1
    }
}
