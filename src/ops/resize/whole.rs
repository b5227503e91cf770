//! Modules that lie in the file as one: the parts of a fused layer share a factor, and still do in another rank.

use std::collections::HashMap;
use std::ops::Range;
use std::slice;
use std::sync::Arc;

use crate::adapter::{Adapter, Along, Module};
use crate::error::Result;

/// A module, or the fused one of several.
pub(super) struct Whole {
    pub(super) module: Module,
    /// Numbers of the modules in the adapter, and their outputs in it.
    parts: Vec<(usize, Range<usize>)>,
}

impl Whole {
    /// The modules of some numbers, those that share a factor as one.
    pub(super) fn all(adapter: &Adapter, chosen: &[usize]) -> Vec<Whole> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut known: HashMap<_, usize> = HashMap::new();
        for index in chosen {
            let group = match shared(&adapter.modules[*index]) {
                Some(key) => *known.entry(key).or_insert(groups.len()),
                None => groups.len(),
            };
            match groups.get_mut(group) {
                Some(group) => group.push(*index),
                None => groups.push(vec![*index]),
            }
        }
        let wholes = groups
            .iter()
            .flat_map(|group| match Whole::of(adapter, group) {
                Some(whole) => vec![whole],
                None => group
                    .iter()
                    .filter_map(|one| Whole::of(adapter, &[*one]))
                    .collect(),
            });
        wholes.collect()
    }

    /// The modules of some numbers as one, where their method can be on several parts of a layer.
    fn of(adapter: &Adapter, group: &[usize]) -> Option<Whole> {
        let module = |index: &usize| &adapter.modules[*index];
        let mut parts = Vec::new();
        let mut outputs = 0;
        for index in group {
            let height = module(index).method.extent(module(index)).outputs?;
            parts.push((*index, outputs..outputs + height));
            outputs += height;
        }
        let module = match group {
            [one] => module(one).clone(),
            [first, others @ ..] => {
                let first = module(first);
                let alike = |index: &usize| module(index).scale == first.scale;
                let fused = parts
                    .iter()
                    .map(|(index, rows)| (module(index), vec![rows.clone()]));
                let fused = first.method.fuse(&fused.collect::<Vec<_>>(), outputs);
                fused.ok().filter(|_| others.iter().all(alike))?
            }
            [] => return None,
        };
        Some(Whole { module, parts })
    }

    /// The paths of its modules behind the first.
    pub(super) fn others(&self, adapter: &Adapter) -> Vec<String> {
        let others = self.parts.iter().skip(1);
        others
            .map(|(index, _)| adapter.modules[*index].path.clone())
            .collect()
    }

    /// Puts what was made of it in the place of its modules.
    ///
    /// # Errors
    /// Those of [`Module::outputs`].
    pub(super) fn put(&self, made: &Module, adapter: &mut Adapter) -> Result<()> {
        for (index, rows) in &self.parts {
            let part = match self.parts.len() {
                1 => made.clone(),
                _ => made.outputs(slice::from_ref(rows))?,
            };
            let old = &mut adapter.modules[*index];
            *old = Module {
                path: old.path.clone(),
                spelling: old.spelling,
                ..part
            };
        }
        Ok(())
    }
}

/// The stored tensor that says the same of every output, by its file and place there.
fn shared(module: &Module) -> Option<(usize, u64, String)> {
    let roles = module.method.roles().iter();
    let mut roles = roles.filter(|known| known.along == Along::Others);
    let tensor = roles.find_map(|known| module.get(known.role))?;
    let is_stored = tensor.made.is_none();
    is_stored.then(|| {
        let file = Arc::as_ptr(&tensor.input) as usize;
        (file, tensor.offset, tensor.name.clone())
    })
}
