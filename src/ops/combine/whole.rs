//! What adapters bring besides modules: whole tensors, rows of embeddings, widened weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::adapter::{Adapter, Padding, Replacement, ReplacementKind, TokenRows};
use crate::error::{Error, Reason, Result};
use crate::notice::{Notice, NoticeKind};
use crate::ops::merge::Opened;
use crate::pattern::Choice;
use crate::tensor::{Tensor, narrowed};

/// What became of it.
#[derive(Default)]
pub(super) struct Whole {
    pub(super) replacements: Vec<Replacement>,
    pub(super) tokens: Vec<TokenRows>,
    pub(super) paddings: Vec<Padding>,
    /// Names of tensors of which the average was taken.
    pub(super) averaged: Vec<String>,
    pub(super) notices: Vec<Notice>,
    conflicts: Vec<String>,
    /// Whether some conflict would be settled by an average.
    averages: bool,
}

/// Takes what is equal, and the average of what is not, where that is asked for.
///
/// # Errors
/// [`Reason::NotTogether`] with everything that differs.
pub(super) fn together(opened: &[Opened], choice: &Choice, average: bool) -> Result<Whole> {
    let mut whole = Whole::default();
    whole.replacements(opened, choice, average)?;
    whole.tokens(opened, choice, average)?;
    whole.paddings(opened, choice)?;
    whole.models(opened);
    for own in opened {
        whole
            .notices
            .extend(own.adapter.unused.iter().map(|tensor| {
                let text = "state without a part in the weights, which is left out";
                let notice = Notice::new(NoticeKind::Unused, text).on(&*tensor.name);
                notice.in_file(&own.found.path)
            }));
    }
    if whole.conflicts.is_empty() {
        return Ok(whole);
    }
    let count = whole.conflicts.len();
    let error = Error::new(Reason::NotTogether { count }).with_cases(whole.conflicts);
    Err(match whole.averages {
        true => error.with_hint(
            "--average-full averages them by strength; --skip leaves out what a pattern finds",
        ),
        false => error.with_hint("--skip leaves out what a pattern finds"),
    })
}

/// What two adapters may say differently of a model, and whether they do.
type Difference = (&'static str, fn(&Adapter, &Adapter) -> bool);

/// A tensor of one adapter with its strength.
type Owned<'a> = (usize, &'a Tensor, f64);

impl Whole {
    fn conflict(&mut self, name: &str, text: &str) {
        self.conflicts.push(format!("{name}: {text}"));
    }

    fn strength_ignored(&mut self, name: &str, strength: f64) {
        if strength != 1.0 {
            let text = format!(
                "it replaces values of the base, to which the strength {strength} does not apply"
            );
            self.notices
                .push(Notice::new(NoticeKind::StrengthIgnored, text).on(name));
        }
    }

    fn replacements(&mut self, opened: &[Opened], choice: &Choice, average: bool) -> Result<()> {
        let mut names: IndexMap<(&str, bool), Vec<(usize, &Replacement)>> = IndexMap::new();
        for (index, own) in opened.iter().enumerate() {
            for replacement in &own.adapter.replacements {
                if choice.keeps(&replacement.name)? {
                    let below = replacement.kind == ReplacementKind::BaseLayer;
                    let known = names.entry((&replacement.name, below)).or_default();
                    known.push((index, replacement));
                }
            }
        }
        for ((name, below), all) in names {
            let mut owned: Vec<Owned<'_>> = Vec::new();
            for (index, replacement) in &all {
                let strength = opened[*index].strength_of(name)?;
                owned.push((*index, &replacement.tensor, strength));
            }
            let first = all[0].1;
            let mut same = true;
            for (_, tensor, _) in &owned[1..] {
                same &= first.tensor.equals(tensor)?;
            }
            if same {
                if !below {
                    let other = owned.iter().map(|own| own.2).find(|own| *own != 1.0);
                    self.strength_ignored(name, other.unwrap_or(1.0));
                }
                self.replacements.push(first.clone());
            } else if let Some(tensor) = self.averaged(opened, name, &owned, average)? {
                self.averaged.push(name.to_owned());
                self.replacements.push(Replacement {
                    tensor,
                    ..first.clone()
                });
            }
        }
        Ok(())
    }

    /// Σ strength · value ÷ Σ strength in the type of the first; or a conflict.
    fn averaged(
        &mut self,
        opened: &[Opened],
        name: &str,
        owned: &[Owned<'_>],
        average: bool,
    ) -> Result<Option<Tensor>> {
        let (_, first, _) = owned[0];
        if owned
            .iter()
            .any(|(_, tensor, _)| tensor.shape != first.shape)
        {
            self.conflict(name, "its shapes differ");
            return Ok(None);
        }
        if !average {
            let paths = owned
                .iter()
                .map(|(index, ..)| opened[*index].found.path.display().to_string());
            let paths: Vec<String> = paths.collect();
            self.averages = true;
            self.conflict(name, &format!("different in {}", paths.join(" and ")));
            return Ok(None);
        }
        let total: f64 = owned.iter().map(|(.., strength)| strength).sum();
        if total == 0.0 || !total.is_finite() {
            self.conflict(name, "its strengths add up to zero");
            return Ok(None);
        }
        let (source, float) = (first.clone(), first.float()?);
        let parts = owned
            .iter()
            .map(|(_, tensor, strength)| ((*tensor).clone(), strength / total));
        let parts: Vec<(Tensor, f64)> = parts.collect();
        let made = move || {
            let mut sums = vec![0.0; source.elements()];
            for (tensor, weight) in &parts {
                for (sum, value) in sums.iter_mut().zip(tensor.to_f64()?) {
                    *sum = weight.mul_add(value, *sum);
                }
            }
            narrowed(float, &sums).map_err(|e| e.in_file(source.input.path()).on(&*source.name))
        };
        Ok(Some(first.derived(
            first.dtype,
            first.shape.clone(),
            Arc::new(made),
        )))
    }

    fn tokens(&mut self, opened: &[Opened], choice: &Choice, average: bool) -> Result<()> {
        let mut paths: IndexMap<&str, Vec<(usize, &TokenRows)>> = IndexMap::new();
        for (index, own) in opened.iter().enumerate() {
            for tokens in &own.adapter.tokens {
                if choice.keeps(&tokens.path)? {
                    paths.entry(&tokens.path).or_default().push((index, tokens));
                }
            }
        }
        for (path, all) in paths {
            let width = all[0].1.rows.dimension(1);
            if all.iter().any(|(_, own)| own.rows.dimension(1) != width) {
                self.conflict(path, "its rows have different lengths");
                continue;
            }
            let mut rows: BTreeMap<usize, Vec<(Vec<f64>, f64)>> = BTreeMap::new();
            for (index, own) in &all {
                let strength = opened[*index].strength_of(path)?;
                self.strength_ignored(path, strength);
                let values = own.rows.to_f64()?;
                let lines = values.chunks_exact(width.max(1));
                for (row, line) in own.indices.iter().zip(lines) {
                    rows.entry(*row)
                        .or_default()
                        .push((line.to_vec(), strength));
                }
            }
            let mut values = Vec::new();
            for (row, lines) in &rows {
                let (first, _) = &lines[0];
                let total: f64 = lines.iter().map(|(_, strength)| strength).sum();
                if lines.iter().all(|(line, _)| line == first) {
                    values.extend_from_slice(first);
                } else if average && total != 0.0 {
                    let mean = |column: usize| {
                        let parts = lines.iter().map(|(line, by)| by / total * line[column]);
                        parts.sum::<f64>()
                    };
                    values.extend((0..width).map(mean));
                    self.averaged.push(format!("{path} row {row}"));
                } else {
                    self.averages |= total != 0.0;
                    self.conflict(path, &format!("row {row} is different"));
                }
            }
            if values.len() < rows.len() * width {
                continue;
            }
            let like = &all[0].1.rows;
            let bytes = narrowed(like.float()?, &values).map_err(|e| e.on(path))?;
            self.tokens.push(TokenRows {
                path: path.to_owned(),
                indices: rows.keys().copied().collect(),
                rows: like.holding(like.dtype, vec![rows.len(), width], bytes),
            });
        }
        Ok(())
    }

    fn paddings(&mut self, opened: &[Opened], choice: &Choice) -> Result<()> {
        for padding in opened.iter().flat_map(|own| &own.adapter.paddings) {
            if !choice.keeps(&padding.path)? {
                continue;
            }
            let known = self.paddings.iter().find(|own| own.path == padding.path);
            match known.map(|own| own.shape == padding.shape) {
                None => self.paddings.push(padding.clone()),
                Some(true) => {}
                Some(false) => self.conflict(&padding.path, "widened to different shapes"),
            }
        }
        Ok(())
    }

    /// What adapters say of the model as a whole.
    fn models(&mut self, opened: &[Opened]) {
        let first = &opened[0].adapter;
        for own in &opened[1..] {
            let differs: [Difference; 3] = [
                ("repeats layers otherwise", |a, b| {
                    a.replication != b.replication
                }),
                (
                    "shares one adapter between the embeddings, or does not",
                    |a, b| a.tied != b.tied,
                ),
                ("keeps embeddings shared, or does not", |a, b| {
                    a.keeps_ties != b.keeps_ties
                }),
            ];
            for (text, differ) in differs {
                if differ(first, &own.adapter) {
                    let name = own.found.path.display().to_string();
                    self.conflict(&name, &format!("{text} than the first"));
                }
            }
        }
    }
}
