//! An adapter times a number: where its format keeps a scale, no bit of a factor changes.

use super::convert::{self, Plan};
use crate::adapter::{Adapter, Module, ReplacementKind, Scale};
use crate::error::{Error, Reason, Result};
use crate::formats::Loss;
use crate::notice::{Notice, NoticeKind};
use crate::pattern::Choice;
use crate::tensor::typed;

/// What to scale, how it is written, and by what.
#[derive(Clone, Debug)]
pub struct Options {
    /// The adapter and its output. Without a format it is the adapter's own; `only` and `skip` choose what is scaled,
    /// and everything else is written as it is.
    pub conversion: convert::Options,
    /// The change.
    pub by: By,
}

/// The change of a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum By {
    /// Everything that is added is multiplied by it.
    Factor(f64),
    /// The numerator of every scale becomes this, so that what is added changes by this over the old one.
    Alpha(f64),
}

/// Reads, scales, names and checks; writes nothing.
///
/// # Errors
/// [`Reason::BadOption`] for a number that is zero or not finite, [`Reason::NotScaled`] with all modules whose method
/// cannot say it, and those of [`convert::plan`].
pub fn plan(options: &Options) -> Result<Plan> {
    let (By::Factor(number) | By::Alpha(number)) = options.by;
    if number == 0.0 || !number.is_finite() {
        return Err(Error::new(Reason::BadOption {
            text: number.to_string(),
            problem: "it is a number other than 0".to_owned(),
        }));
    }
    let wanted = &options.conversion;
    let choice = Choice::new(&wanted.only, &wanted.skip)?;
    let conversion = convert::in_own_format(wanted)?;
    convert::planned(&conversion, |adapter| scaled(adapter, options.by, &choice))
}

/// Scales what is chosen, and tells where values were multiplied.
fn scaled(adapter: &mut Adapter, by: By, choice: &Choice) -> Result<Vec<Loss>> {
    let (mut multiplied, mut cannot) = (Vec::new(), Vec::new());
    let mut changed = 0;
    for module in &mut adapter.modules {
        if !choice.keeps(&module.path)? {
            continue;
        }
        changed += 1;
        match times(module, by)? {
            Ok(new) => {
                multiplied.extend(rounded(module, &new).then(|| Loss {
                    item: module.path.clone(),
                    text: "its values are multiplied and rounded once".to_owned(),
                }));
                *module = new;
            }
            Err(why) => cannot.push(format!("{}: {why}", module.path)),
        }
    }
    if !cannot.is_empty() {
        let count = cannot.len();
        return Err(Error::new(Reason::NotScaled { count })
            .with_cases(cannot)
            .with_hint(
                "--skip leaves out what a pattern finds; `merge --strength` scales every method",
            ));
    }
    if changed == 0 {
        return Err(Error::new(Reason::NothingSelected));
    }
    let whole = adapter.replacements.iter();
    let whole = whole.filter(|replacement| replacement.kind != ReplacementKind::BaseLayer);
    let names = whole.map(|replacement| &replacement.name);
    let names: Vec<String> = names
        .chain(adapter.tokens.iter().map(|tokens| &tokens.path))
        .cloned()
        .collect();
    adapter.notices.extend(names.into_iter().map(|name| {
        let text = "it replaces values of the base, which are not scaled";
        Notice::new(NoticeKind::StrengthIgnored, text).on(name)
    }));
    Ok(multiplied)
}

/// The module times what is asked for, its parameters in their own types; or why not.
fn times(module: &Module, by: By) -> Result<Result<Module, String>> {
    let factor = match by {
        By::Factor(factor) => factor,
        By::Alpha(alpha) => match module.scale.alpha.filter(|old| *old != 0.0) {
            Some(old) => alpha / old,
            None => return Ok(Err("its files state no alpha to change".to_owned())),
        },
    };
    let Some(mut new) = module.method.sum(&[(module, factor)])? else {
        return Ok(Err(format!("{} has no place for it", module.method.name())));
    };
    if let (By::Alpha(alpha), Some(old), Some(rank)) = (by, module.scale.alpha, module.scale.rank) {
        // The sign is in the factors.
        new.scale = Scale::of(alpha.abs().copysign(old), rank, module.scale.root);
    }
    for (role, tensor) in &mut new.parameters {
        if let Some(old) = module.get(*role) {
            *tensor = typed(tensor, Some(old.float()?));
        }
    }
    Ok(Ok(new))
}

/// Whether values rather than the scale were multiplied.
fn rounded(old: &Module, new: &Module) -> bool {
    let values = |module: &Module| module.scale.value.abs();
    old.scale.rank.is_none() && values(old) == values(new)
}
