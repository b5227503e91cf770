//! One block of rows: read, evaluated, and what else is wanted of it, by one thread.

use std::cell::RefCell;
use std::ops::Range;

use super::source::Source;
use crate::adapter::bound::{self, Bound, measure};
use crate::adapter::candidates::Chains;
use crate::adapter::evaluate::{Elements, Means, Recipe, Scratch, Sums};
use crate::adapter::preimage::{Merge, is_told_apart};
use crate::error::Result;
use crate::linalg::Kernel;
use crate::ops::undo;

/// What a thread keeps between blocks.
#[derive(Default)]
struct Memory {
    bytes: Vec<u8>,
    scratch: Scratch,
    undo: undo::Memory,
    bounds: bound::Memory,
}

thread_local! {
    static SCRATCH: RefCell<Memory> = RefCell::default();
}

/// How the blocks of one tensor are evaluated.
pub(super) struct Block<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) source: &'a Source<'a>,
    pub(super) kernel: &'a Kernel,
    pub(super) writes_undo: bool,
    pub(super) measures: bool,
}

/// What came of a block.
pub(super) struct Done {
    pub(super) sums: Sums,
    /// What restores its rows of the base.
    pub(super) payload: Vec<u8>,
    pub(super) bound: Bound,
}

impl Block<'_> {
    /// Evaluates some rows, for which a device may have given candidates. `base` takes the rows of the base, where it has
    /// room.
    pub(super) fn evaluate(
        &self,
        rows: Range<usize>,
        candidates: Option<&[Option<Chains>]>,
        base: &mut [u8],
        result: &mut [u8],
    ) -> Result<Done> {
        let Block {
            recipe,
            source,
            kernel,
            writes_undo,
            measures,
        } = *self;
        let columns = recipe.columns;
        let (from, to) = (source.float, recipe.to);
        SCRATCH.with_borrow_mut(|memory| {
            let Memory {
                bytes,
                scratch,
                undo,
                bounds,
            } = memory;
            let runs = source.runs(rows.clone());
            let terms = match writes_undo && is_told_apart(from, to) && runs.len() == 1 {
                true => recipe.terms(rows.clone(), kernel)?,
                false => None,
            };
            let is_whole = !base.is_empty() && source.tensor.rows.is_empty();
            if !base.is_empty() {
                source
                    .tensor
                    .source
                    .read(rows.start * columns * from.size(), base)?;
            }
            let (mut sums, mut bound) = (Sums::default(), Bound::default());
            let mut rest = &mut *result;
            for (rows, float) in runs {
                let result = rest.split_off_mut(..rows.len() * columns * to.size());
                let result = result.expect("the runs are the rows of the block");
                if !is_whole {
                    source.read(rows.clone(), float, columns, bytes)?;
                }
                let bytes = if is_whole { &*base } else { &**bytes };
                let elements = Elements { float, bytes };
                let means = match (&terms, candidates) {
                    (Some(terms), _) => Means::Terms(terms),
                    (None, Some(chains)) => Means::Candidates(chains),
                    (None, None) => Means::Updates,
                };
                let own = rows.clone();
                sums.add(&recipe.evaluate(own, elements, means, result, scratch, kernel)?);
                if measures {
                    let memory = (&mut *scratch, &mut *bounds);
                    bound.add(&measure(recipe, rows, elements, result, memory, kernel)?);
                }
            }
            let payload = match (writes_undo, &terms) {
                (false, _) => Vec::new(),
                (true, None) => undo::raw(base),
                (true, Some(terms)) => {
                    let merge = Merge {
                        from,
                        to,
                        terms,
                        kernel,
                    };
                    undo::encode(&merge, base, result, undo)
                }
            };
            Ok(Done {
                sums,
                payload,
                bound,
            })
        })
    }
}
