//! The work of an extraction: layer by layer, in memory bounded by a layer.

use std::path::Path;
use std::time::Instant;

use super::super::budget::{Attempts, Candidate, spent, within};
use super::super::spool::Spool;
use super::measure::{Measured, measured, spectrum};
use super::pairs::{Pair, Way};
use super::report::{FittedReport, Proved, Report, Total, WholeReport};
use super::{Plan, Ranks, whole};
use crate::adapter::{Adapter, Module};
use crate::error::{Error, Reason, Result};
use crate::formats::Loss;
use crate::json::Value;
use crate::linalg::random::seed_of;
use crate::linalg::truncated::{Rank, Settings};
use crate::notice::{Notice, NoticeKind};
use crate::ops::merge::{Control, attention, layout};
use crate::ops::outgoing::{Outgoing, Wish, write};
use crate::tensor::Float;

/// Bytes of a header for each tensor, beside its name.
const ENTRY: usize = 105;

/// Bytes of whatever else a file begins with.
const START: u64 = 256;

/// Most times that ranks are chosen anew because a format takes more than its factors.
const ATTEMPTS: usize = 4;

/// Layers, and what became of the rest.
#[derive(Default)]
struct Sorted {
    fitted: Vec<usize>,
    whole: Vec<usize>,
    identical: usize,
    left_out: Vec<Loss>,
}

/// The work, with what is asked of it.
pub(super) struct Search<'a> {
    plan: &'a Plan,
    control: &'a Control<'a>,
    start: Instant,
    check: Box<dyn Fn() -> Result<()> + Sync + 'a>,
    /// Bytes that were looked at, and all of them.
    done: u64,
    total: u64,
}

impl<'a> Search<'a> {
    pub(super) fn new(plan: &'a Plan, control: &'a Control<'a>) -> Self {
        let passes = if matches!(plan.options.ranks, Ranks::Budget(_)) {
            2
        } else {
            1
        };
        let bytes = plan
            .pairs
            .iter()
            .map(|pair| pair.base.length + pair.tuned.length);
        Search {
            plan,
            control,
            start: Instant::now(),
            check: Box::new(|| control.check()),
            done: 0,
            total: passes * bytes.sum::<u64>(),
        }
    }

    /// Fits everything and lets the format say it.
    pub(super) fn run(mut self, folder: &Path) -> Result<(Outgoing, Report)> {
        if let Ranks::Budget(budget) = self.plan.options.ranks {
            return self.within(budget, folder);
        }
        let mut sorted = Sorted::default();
        let mut spool = Spool::new(folder)?;
        let mut found = Vec::new();
        for index in 0..self.plan.pairs.len() {
            if self.sort(index, &mut sorted)? {
                let rank = self.rank(&self.plan.pairs[index])?;
                found.push(self.fit(index, rank, &mut spool)?);
            }
            self.advance(index);
        }
        self.written(&sorted, found)
    }

    /// Spectra first, then factors of the ranks that a file of so many bytes holds.
    fn within(mut self, budget: u64, folder: &Path) -> Result<(Outgoing, Report)> {
        let plan = self.plan;
        let mut sorted = Sorted::default();
        let mut candidates = Vec::new();
        for index in 0..plan.pairs.len() {
            if self.sort(index, &mut sorted)? {
                candidates.push(self.candidate(index, budget)?);
            }
            self.advance(index);
        }
        let room = self.room(&sorted, budget);
        let left_out = std::mem::take(&mut sorted.left_out);
        let attempts = Attempts {
            most: ATTEMPTS,
            enough: budget / 50,
        };
        let best = within(budget, room, &attempts, |room| {
            let ranks = spent(&candidates, room / plan.options.dtype.size() as u64);
            sorted.left_out.clone_from(&left_out);
            let mut spool = Spool::new(folder)?;
            let mut found = Vec::new();
            self.done = self.total / 2;
            for (index, rank) in sorted.fitted.iter().zip(&ranks) {
                if *rank > 0 {
                    found.push(self.fit(*index, Rank::Fixed(*rank), &mut spool)?);
                } else {
                    let item = plan.pairs[*index].base.name.clone();
                    let text = "the size leaves no rank for it".to_owned();
                    sorted.left_out.push(Loss { item, text });
                }
                self.advance(*index);
            }
            let (outgoing, report) = self.written(&sorted, found)?;
            let bytes = report.bytes;
            Ok(((outgoing, report), bytes))
        })?;
        best.ok_or_else(|| {
            let text = budget.to_string();
            let problem =
                "the format needs more than this for the rest of the difference".to_owned();
            Error::new(Reason::BadOption { text, problem })
        })
    }

    fn advance(&mut self, index: usize) {
        let pair = &self.plan.pairs[index];
        self.done += pair.base.length + pair.tuned.length;
        self.control.progress(self.done.min(self.total), self.total);
    }

    /// Whether a module is to be fitted to a tensor; notes what becomes of it otherwise.
    fn sort(&self, index: usize, sorted: &mut Sorted) -> Result<bool> {
        (self.check)()?;
        let pairs = &self.plan.pairs;
        for next in pairs.iter().skip(index + 1).take(2) {
            for tensor in [&next.base, &next.tuned] {
                if tensor.lies_in_file() {
                    tensor.input.will_need(tensor.offset, tensor.length);
                }
            }
        }
        let pair = &pairs[index];
        let float = Float::of(pair.base.dtype).is_some();
        if !float || !pair.grown && pair.base.equals(&pair.tuned)? {
            sorted.identical += 1;
            return Ok(false);
        }
        match pair.way {
            Way::Fitted => sorted.fitted.push(index),
            Way::Whole => sorted.whole.push(index),
            Way::LeftOut => {
                let item = pair.base.name.clone();
                let text = format!("{} was left out, as asked", pair.what.name());
                sorted.left_out.push(Loss { item, text });
            }
        }
        Ok(pair.way == Way::Fitted)
    }

    fn settings(&self, pair: &Pair, rank: Rank, tolerance: Option<f64>) -> Settings<'_> {
        let options = &self.plan.options;
        Settings {
            algebra: self.plan.algebra(pair),
            rank,
            tolerance,
            exact: options.exact,
            // The same for a layer, whatever else is extracted.
            seed: seed_of(options.seed, &pair.base.name),
            memory: super::MEMORY,
            check: &*self.check,
        }
    }

    fn rank(&self, pair: &Pair) -> Result<Rank> {
        let (options, plan) = (&self.plan.options, self.plan);
        for (pattern, rank) in &plan.rank_for {
            if pattern.matches(&pair.path)? {
                return Ok(Rank::Fixed(*rank));
            }
        }
        let most = options.max_rank;
        Ok(match options.ranks {
            Ranks::Fixed(rank) => Rank::Fixed(rank),
            Ranks::Energy(share) => Rank::Energy { share, most },
            Ranks::Ratio(ratio) => Rank::Ratio { ratio, most },
            Ranks::Budget(_) => Rank::Fixed(most),
        })
    }

    /// The spectrum of a layer, as far as ranks may go.
    fn candidate(&self, index: usize, budget: u64) -> Result<Candidate> {
        let pair = &self.plan.pairs[index];
        let on = pair.geometry();
        let cost = on.rows + on.columns;
        let size = self.plan.options.dtype.size() as u64;
        let affordable = usize::try_from(budget / size / cost.max(1) as u64).unwrap_or(usize::MAX);
        let most = self
            .rank(pair)?
            .most(on.rows.min(on.columns))
            .min(affordable);
        if most == 0 {
            return Ok(Candidate {
                squares: Vec::new(),
                cost,
            });
        }
        let settings = self.settings(pair, Rank::Fixed(most), None);
        let spectrum = spectrum(pair, self.plan.method, settings)?;
        let squares = spectrum
            .iter()
            .take(most)
            .map(|value| value * value)
            .collect();
        Ok(Candidate { squares, cost })
    }

    /// What a budget leaves for factors.
    fn room(&self, sorted: &Sorted, budget: u64) -> u64 {
        let pairs = &self.plan.pairs;
        let names = sorted
            .fitted
            .iter()
            .map(|index| 2 * (ENTRY + pairs[*index].path.len()));
        let whole = sorted
            .whole
            .iter()
            .map(|index| ENTRY + pairs[*index].path.len() + pairs[*index].tuned.length as usize);
        budget.saturating_sub(START + names.chain(whole).sum::<usize>() as u64)
    }

    /// Fits a module and puts its factors away.
    fn fit(&self, index: usize, rank: Rank, spool: &mut Spool) -> Result<(Module, Fit)> {
        let (plan, options) = (self.plan, &self.plan.options);
        let pair = &plan.pairs[index];
        let settings = self.settings(pair, rank, options.tolerance);
        let Measured {
            mut module,
            report,
            base_square,
        } = measured(pair, plan.method, settings, (options.alpha, options.dtype))?;
        for (_, tensor) in &mut module.parameters {
            *tensor = spool.keep(tensor)?;
        }
        let difference_bytes = pair.tuned.length;
        Ok((
            module,
            Fit {
                report,
                base_square,
                difference_bytes,
            },
        ))
    }

    /// Lets the format say what was found; with it, which tensors are values and which differences.
    fn said(&self, modules: Vec<Module>, chosen: &[&Pair]) -> Result<(Outgoing, Vec<WholeReport>)> {
        let (plan, options) = (self.plan, &self.plan.options);
        let checkpoint = &plan.base.checkpoint;
        let mut adapter = Adapter {
            modules,
            attention: attention(checkpoint),
            layout: layout(checkpoint),
            replacements: chosen.iter().map(|pair| whole::value(pair)).collect(),
            ..Adapter::default()
        };
        adapter.facts.base = checkpoint
            .configured("_name_or_path")
            .and_then(Value::as_str)
            .map(str::to_owned);
        let wish = Wish {
            family: options.family.as_deref(),
            component: options.component.as_deref(),
            prefix: options.prefix.as_deref(),
            names: options.names,
            ..Wish::default()
        };
        let say = |adapter: &Adapter| write(adapter, &[], plan.target, Some(&plan.base), wish);
        let (mut written, _) = say(&adapter)?;
        // What the format cannot take as a value it may take as a difference.
        let lost = |name: &str| written.losses.iter().any(|loss| loss.item == name);
        let (other, same): (Vec<&Pair>, Vec<&Pair>) =
            chosen.iter().partition(|pair| lost(&pair.name()));
        if !other.is_empty() {
            adapter.replacements = same.iter().map(|pair| whole::value(pair)).collect();
            let differences = whole::differences(&other, options.dtype)?;
            adapter.modules.extend(differences);
            (written, _) = say(&adapter)?;
        }
        let told = |pair: &&Pair, form| WholeReport {
            name: pair.name(),
            what: pair.what,
            form,
        };
        let values = same.iter().map(|pair| told(pair, "value"));
        let whole = values.chain(other.iter().map(|pair| told(pair, "difference")));
        let outgoing = Outgoing::new(
            written,
            plan.target,
            (&options.tuned, &options.output),
            options.prefix.as_deref(),
            options.allow_losses,
        )
        .map_err(|e| match e.reason() {
            Reason::NothingSelected => {
                e.with_hint("the two sides do not differ in what --only and --skip leave")
            }
            Reason::Losses { .. } if !chosen.is_empty() => e.with_hint(
                "--norms skip, --biases skip and --embeddings skip leave them out, --allow-losses whatever the format \
                 cannot say; some formats of image models have differences of whole tensors",
            ),
            _ => e,
        })?;
        Ok((outgoing, whole.collect()))
    }

    /// Lets the format say what was found, and reports.
    fn written(&self, sorted: &Sorted, found: Vec<(Module, Fit)>) -> Result<(Outgoing, Report)> {
        let (plan, options) = (self.plan, &self.plan.options);
        let (modules, fits): (Vec<Module>, Vec<Fit>) = found.into_iter().unzip();
        let chosen = sorted.whole.iter().map(|index| &plan.pairs[*index]);
        let chosen: Vec<&Pair> = chosen.collect();
        let (outgoing, whole) = self.said(modules, &chosen)?;
        let mut notices = plan.notices.clone();
        let grown = chosen.iter().filter(|pair| pair.grown);
        notices.extend(grown.map(|pair| {
            let (new, old) = (pair.tuned.dimension(0), pair.base.dimension(0));
            let text = format!("it has {new} rows instead of {old}, and is taken whole");
            Notice::new(NoticeKind::RowsDiffer, text).on(&*pair.base.name)
        }));
        notices.extend(outgoing.written.notices.iter().cloned());
        let whole_bytes: u64 = chosen.iter().map(|pair| pair.tuned.length).sum();
        let report = Report {
            schema: 1,
            dry_run: false,
            base: options.base.to_string_lossy().into_owned(),
            tuned: options.tuned.to_string_lossy().into_owned(),
            output: options.output.to_string_lossy().into_owned(),
            method: plan.method.name().to_owned(),
            to: plan.target.id().to_owned(),
            dtype: options.dtype.dtype().to_string(),
            total: total(&fits),
            difference_bytes: whole_bytes
                + fits.iter().map(|fit| fit.difference_bytes).sum::<u64>(),
            modules: fits.into_iter().map(|fit| fit.report).collect(),
            whole,
            identical: sorted.identical,
            left_out: [&*plan.left_out, &sorted.left_out].concat(),
            losses: outgoing.written.losses.clone(),
            folded: outgoing.written.folded.clone(),
            alpha: outgoing.written.alpha,
            tensors: outgoing.written.tensors.len(),
            bytes: outgoing.bytes()?,
            seconds: self.start.elapsed().as_secs_f64(),
            device: plan.device(&sorted.fitted),
            notices,
        };
        Ok((outgoing, report))
    }
}

/// What is known of a fitted module.
struct Fit {
    report: FittedReport,
    /// ‖W‖²
    base_square: f64,
    difference_bytes: u64,
}

fn total(fits: &[Fit]) -> Total {
    let (mut base, mut change, mut left, mut outside, mut least) = (0.0, 0.0, 0.0, 0.0, 0.0);
    let mut total = Total::default();
    for Fit {
        report,
        base_square,
        ..
    } in fits
    {
        let square = report.norm * report.norm;
        let lost = square * (1.0 - report.energy).max(0.0);
        base += base_square;
        change += square;
        left += square * report.residual * report.residual;
        outside += lost;
        least += lost / (1.0 + report.excess.unwrap_or(0.0)).powi(2);
        total.not_proved += usize::from(report.proof == Proved::NotProved);
        total.not_reached += usize::from(!report.reached);
        let sides = report.shape.first().copied().unwrap_or(0)
            + report.shape.iter().skip(1).product::<usize>();
        total.parameters += (report.rank * sides) as u64;
    }
    let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    total.change = ratio(change, base).sqrt();
    total.energy = 1.0 - ratio(outside, change);
    total.residual = ratio(left, change).sqrt();
    if total.not_proved == 0 {
        total.excess = Some(if least > 0.0 {
            (outside / least).sqrt() - 1.0
        } else {
            0.0
        });
    }
    total
}
