//! Without an undo file: the inverse of each step, last first, and one rounding.

use super::report::{AdapterReport, BoundReport, Report};
use super::{Options, Taken};
use crate::adapter::Module;
use crate::error::{Error, Reason, Result};
use crate::notice::{Notice, NoticeKind};
use crate::ops::merge::{self, Control, Opened, Selection};

/// A subtraction that can be run.
pub(super) struct Plan {
    options: Options,
    plan: merge::Plan,
}

pub(super) fn plan(options: &Options) -> Result<Plan> {
    let selection = |own: &Taken| Selection {
        path: own.path.clone(),
        strength: own.strength.unwrap_or(1.0),
        strength_for: own.strength_for.clone(),
    };
    let wanted = merge::Options {
        base: options.merged.clone(),
        adapters: options.adapters.iter().rev().map(selection).collect(),
        output: options.output.clone(),
        dtype: options.dtype,
        force: options.force,
        threads: options.threads,
        read: options.read.clone(),
        kernel: options.kernel.clone(),
        ..merge::Options::default()
    };
    let mut opened = merge::open_adapters(&wanted.adapters, &wanted.read)?;
    let mut kept = Vec::new();
    for opened in &mut opened {
        invert(opened, &mut kept)?;
    }
    if !kept.is_empty() && !options.allow_kept {
        let count = kept.len();
        return Err(Error::new(Reason::NoInverse { count })
            .in_file(&options.merged)
            .with_cases(kept)
            .with_hint(
                "merge with --undo, or --allow-kept leaves them as they are in the result",
            ));
    }
    let mut plan = merge::plan_inverse(&wanted, opened)?;
    plan.notice(
        kept.iter()
            .map(|case| {
                let (item, text) = case.split_once(": ").unwrap_or((case, ""));
                let text = format!("{text}; it stays as it is in the result");
                Notice::new(NoticeKind::NotTakenOut, text).on(item)
            })
            .collect(),
    );
    Ok(Plan {
        options: options.clone(),
        plan,
    })
}

/// Puts the inverse of each module in its place, and lists what has none.
fn invert(opened: &mut Opened, kept: &mut Vec<String>) -> Result<()> {
    let mut modules: Vec<(Module, f64)> = Vec::new();
    for module in std::mem::take(&mut opened.adapter.modules) {
        let strength = opened.strength_of(&module.path)?;
        match module.method.inverse(&module, strength)? {
            Some(inverse) => modules.push(inverse),
            None if strength == 0.0 => {}
            None => kept.push(format!(
                "{}: {} has no inverse",
                module.path,
                module.method.name()
            )),
        }
    }
    let adapter = &mut opened.adapter;
    let replaced = adapter.replacements.drain(..);
    kept.extend(replaced.map(|own| format!("{}: the whole tensor was replaced", own.name)));
    let tokens = adapter.tokens.drain(..);
    kept.extend(tokens.map(|own| format!("{}: rows of it were replaced", own.path)));
    let paddings = adapter.paddings.drain(..);
    kept.extend(paddings.map(|own| format!("{}: it was widened with zeros", own.path)));
    if !adapter.replication.is_empty() {
        adapter.replication.clear();
        kept.push("layers: some were repeated".to_owned());
    }
    let strengths;
    (adapter.modules, strengths) = modules.into_iter().unzip();
    opened.of_modules = Some(strengths);
    Ok(())
}

impl Plan {
    pub(super) fn report(&self) -> Report {
        self.told(self.plan.report(), Vec::new())
    }

    pub(super) fn run(&self, control: &Control<'_>) -> Result<Report> {
        let (report, bounds) = self.plan.run_inverse(control)?;
        let bounds = bounds.into_iter().map(|(tensor, bound)| BoundReport {
            tensor,
            most: bound.most,
            differing: bound.differing / (bound.elements as f64).max(1.0),
            impossible: bound.impossible,
        });
        Ok(self.told(report, bounds.collect()))
    }

    fn told(&self, mut report: merge::Report, bounds: Vec<BoundReport>) -> Report {
        let changed = self
            .plan
            .tensors()
            .filter(|tensor| !tensor.is_copy())
            .count();
        let adapter = |own: &Taken| AdapterReport {
            path: own.path.to_string_lossy().into_owned(),
            strength: own.strength.unwrap_or(1.0),
        };
        let impossible = bounds.iter().filter(|bound| bound.impossible > 0);
        let notice = |bound: &BoundReport| {
            let text = format!(
                "{} elements are none that any base becomes by this merge: it was another adapter, strength or type",
                bound.impossible
            );
            Notice::new(NoticeKind::NotThisMerge, text).on(&*bound.tensor)
        };
        report.notices.extend(impossible.map(notice));
        Report {
            schema: 1,
            dry_run: report.dry_run,
            merged: report.base,
            output: report.output,
            exact: false,
            adapters: self.options.adapters.iter().map(adapter).collect(),
            tensors: changed,
            copied_tensors: self.plan.tensors().count() - changed,
            files: report.files,
            copied: report.copied,
            bounds,
            disk: report.disk,
            threads: report.threads,
            kernel: report.kernel,
            seconds: report.seconds,
            notices: report.notices,
        }
    }
}
