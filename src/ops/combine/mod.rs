//! Several adapters become one: `plan`, then `run` or `measure`.
//!
//! Definitions and their sources: `docs/combining.md`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::convert;
use super::device::{self, DeviceReport, LARGE};
use super::merge::{Control, Opened, Selection, look, open_adapters};
use super::outgoing::{Base, Outgoing, expected_shape, format, writable};
use super::workers::workers;
use crate::checkpoint::sink::Destination;
use crate::error::{Error, Reason, Result};
use crate::formats::Format;
use crate::linalg::dense::{ALGEBRAS, Algebra};
use crate::linalg::device::Choice;
use crate::mapped::Input;
use crate::notice::{Notice, NoticeKind};
use crate::tensor::Float;

mod compat;
mod consensus;
mod join;
mod layer;
mod recipes;
mod refuse;
mod report;
mod sparsify;
mod whole;
mod work;

use compat::Peer;
use join::{Joined, Layer};
use layer::Way;
use recipes::Tuning;
use work::Work;

pub use compat::PEERS;
pub use recipes::{Knobs, Majority, RECIPES};
pub use report::{Combined, Fit, ModuleReport, Report};

/// What to combine, how, and what to accept.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The adapters with their strengths, in order.
    pub adapters: Vec<Selection>,
    /// How the result is written. Without a format it is that of the first adapter; without a type factors are in f32
    /// and everything else in its own; the adapter is not looked at.
    pub conversion: convert::Options,
    /// The name of a way; the usual one if absent.
    pub how: Option<String>,
    /// The tool whose numbers are to be reproduced.
    pub compat: Option<String>,
    /// How ranks are chosen; nothing is approximated if absent.
    pub ranks: Option<Ranks>,
    /// Numbers that ways take.
    pub knobs: Knobs,
    /// Averages whole tensors that differ, by strength.
    pub average_full: bool,
    /// Combines adapters that have no layer in common.
    pub allow_unrelated: bool,
    /// Worker threads; one per core if absent.
    pub threads: Option<usize>,
    /// A device for the products of decompositions; the processor if absent. What is proved is the same, but not every
    /// bit.
    pub device: Option<Choice>,
}

/// How ranks are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ranks {
    /// At most this.
    Fixed(usize),
    /// The smallest that keeps this share of the squared norm.
    Energy(f64),
    /// The best that a file of so many bytes holds.
    Budget(u64),
}

/// A combination that can be run.
pub struct Plan {
    options: Options,
    opened: Vec<Opened>,
    base: Option<Base>,
    target: &'static dyn Format,
    way: Way,
    tuning: Tuning,
    joined: Joined,
    peer_rank: usize,
    notices: Vec<Notice>,
}

/// Opens and joins the adapters, and checks everything that can be told without arithmetic.
///
/// # Errors
/// Options that mean nothing; adapters that are not of one model; layers that cannot be combined in this way, whole
/// tensors that differ, names that are not unambiguous: all listed; an output that cannot be written.
pub fn plan(options: &Options) -> Result<Plan> {
    let (way, peer) = way(options)?;
    let (takes, name) = match way {
        Way::Recipe(recipe) => (recipe.takes, recipe.name),
        Way::Peer(row) => (row.takes, row.name),
    };
    let tuning = Tuning::of(&options.knobs, takes, name)?;
    fits(options, way)?;
    let mut opened = open_adapters(&options.adapters, &options.conversion.read)?;
    let way = match (way, peer) {
        (Way::Peer(_), Some(peer)) if peer.one_is_usual && opened.len() == 1 => {
            Way::Peer(&peer.rows[0])
        }
        _ => way,
    };
    let target = target(options, &opened[0])?;
    let scanned = look(&opened, false).map_err(diverged)?;
    let base = options
        .conversion
        .base
        .as_deref()
        .map(Base::open)
        .transpose()?;
    let joined = join::joined(options, &mut opened, target, base.as_ref())?;
    refuse(&joined, way, tuning.lambda, options.ranks.is_some())?;
    let mut notices = joined.rest.notices.clone();
    notices.extend(scanned);
    let mut peer_rank = 0;
    if let (Way::Peer(row), Some(peer)) = (way, peer) {
        peer_rank = match options.ranks {
            Some(Ranks::Fixed(rank)) => rank,
            _ => (peer.rank)(row, &joined.layers),
        };
        let known = row
            .wrong
            .iter()
            .copied()
            .chain((peer.wrong)(&joined.layers));
        notices.extend(known.map(|text| Notice::new(NoticeKind::KnownWrong, text)));
    }
    let plan = Plan {
        options: options.clone(),
        opened,
        base,
        target,
        way,
        tuning,
        joined,
        peer_rank,
        notices,
    };
    plan.destination(&Control::default())?;
    Ok(plan)
}

/// Says of values that are not finite what to do.
fn diverged(error: Error) -> Error {
    match error.reason() {
        Reason::FactorNotFinite { .. } => {
            error.with_hint("training diverged; leave this adapter out")
        }
        _ => error,
    }
}

/// The way that is asked for.
fn way(options: &Options) -> Result<(Way, Option<&'static Peer>)> {
    let how = options.how.as_deref();
    let Some(peer) = &options.compat else {
        let recipe = recipes::named(how.unwrap_or(recipes::RECIPES[0].name))?;
        return Ok((Way::Recipe(recipe), None));
    };
    let (peer, row) = compat::named(peer, how)?;
    if options.knobs.lambda.is_some() {
        let (text, problem) = ("--lambda".to_owned(), format!("{} takes none", peer.name));
        return Err(Error::new(Reason::BadOption { text, problem }));
    }
    Ok((Way::Peer(row), Some(peer)))
}

/// Refuses ranks that mean nothing, ways that need one and have none, and other numbers of adapters.
fn fits(options: &Options, way: Way) -> Result<()> {
    let bad = |text: String, problem: &str| {
        let problem = problem.to_owned();
        Err(Error::new(Reason::BadOption { text, problem }))
    };
    match options.ranks {
        Some(Ranks::Fixed(0)) => return bad("--rank 0".to_owned(), "a rank is at least 1"),
        Some(Ranks::Energy(share)) if !(share > 0.0 && share <= 1.0) => {
            let problem = "a share of the energy is more than 0 and at most 1";
            return bad(format!("--energy {share}"), problem);
        }
        _ => {}
    }
    let given = options.adapters.len();
    match (way, options.ranks) {
        (Way::Recipe(recipe), _) if recipe.adapters.is_some_and(|count| count != given) => {
            let problem = format!("it is made for two adapters, not for {given}");
            bad(recipe.name.to_owned(), &problem)
        }
        (Way::Recipe(recipe), None) if recipe.on_changes.is_some() => bad(
            recipe.name.to_owned(),
            "its result has any rank: --rank, --energy or --budget say which is kept",
        ),
        (Way::Peer(row), Some(_)) if !row.takes_rank => {
            bad(row.name.to_owned(), "this way of that tool takes no rank")
        }
        (Way::Peer(row), Some(Ranks::Energy(_) | Ranks::Budget(_))) => {
            bad(row.name.to_owned(), "that tool takes --rank alone")
        }
        _ => Ok(()),
    }
}

/// The format of the result.
fn target(options: &Options, first: &Opened) -> Result<&'static dyn Format> {
    if !options.conversion.to.is_empty() {
        return format(&options.conversion.to);
    }
    writable(first.format, &first.found.path)
}

/// Refuses layers that cannot be combined in a way, all listed.
fn refuse(joined: &Joined, way: Way, lambda: f64, ranked: bool) -> Result<()> {
    let mut cases = Vec::new();
    if let Way::Peer(row) = way {
        cases = (row.refused)(&joined.layers)?;
    }
    for layer in &joined.layers {
        if let Some(why) = refuse::refused(layer, way, lambda, ranked)? {
            cases.push(format!("{}: {why}", layer.name()));
        }
    }
    if cases.is_empty() {
        return Ok(());
    }
    let count = cases.len();
    Err(Error::new(Reason::NotCombined { count })
        .with_cases(cases)
        .with_hint("--skip leaves out what a pattern finds; `merge` takes any adapters one after the other"))
}

impl Plan {
    /// What is odd about the adapters.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    fn inputs(&self) -> impl Iterator<Item = &Arc<Input>> {
        let base = self.base.iter().flat_map(|base| base.checkpoint.inputs());
        self.opened
            .iter()
            .flat_map(|own| own.found.inputs())
            .chain(base)
    }

    /// Whether the decomposition of a layer gains by a device: only changes that are formed have large products.
    fn gains(&self, layer: &Layer) -> bool {
        let is_formed = matches!(self.way, Way::Recipe(recipe) if recipe.on_changes.is_some());
        let geometries = (layer.parts.iter()).filter_map(|part| part.module.geometry());
        let mut elements = geometries.map(|on| on.rows.saturating_mul(on.columns));
        is_formed && elements.any(|elements| elements >= LARGE)
    }

    /// What decomposes a layer, and whether it is a device.
    fn algebra(&self, layer: &Layer) -> (&dyn Algebra, bool) {
        let choice = self.options.device.as_ref();
        device::algebra(choice, ALGEBRAS[0], self.gains(layer))
    }

    /// Where layers are decomposed, if that was to be chosen.
    fn device(&self) -> Option<DeviceReport> {
        let choice = self.options.device.as_ref()?;
        let gains = self.joined.layers.iter().any(|layer| self.gains(layer));
        let why = match self.way {
            Way::Recipe(recipe) if recipe.on_changes.is_some() => {
                "no layer is large enough to gain by it"
            }
            _ => "this way has no products that gain by it",
        };
        Some(DeviceReport::of(choice, gains.then_some(()).ok_or(why)))
    }

    /// The files and folders that are read.
    fn places(&self) -> Vec<&Path> {
        let folders = self.opened.iter().map(|own| &own.found.path);
        let folders = folders.filter(|path| path.is_dir());
        let files = self.inputs().map(|input| input.path());
        files.chain(folders.map(PathBuf::as_path)).collect()
    }

    /// Where the output goes, as far as the format tells it without an adapter.
    fn destination(&self, control: &Control<'_>) -> Result<Destination> {
        let conversion = &self.options.conversion;
        Destination::check(
            &conversion.output,
            expected_shape(self.target, &conversion.output),
            conversion.force,
            self.places(),
            control.faults.clone(),
        )
    }

    /// The type of factors.
    fn dtype(&self) -> Float {
        self.options.conversion.dtype.unwrap_or(Float::F32)
    }

    /// Combines and reports; the output is not touched.
    ///
    /// # Errors
    /// Changes that are not finite, factors that do not fit their type, losses that are not allowed.
    pub fn measure(&self, control: &Control<'_>) -> Result<Report> {
        let (_, mut report) = self.worked(control)?;
        report.dry_run = true;
        Ok(report)
    }

    /// Combines and writes the output, complete or not at all.
    ///
    /// # Errors
    /// As [`Plan::measure`], and those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        let start = Instant::now();
        let (outgoing, mut report) = self.worked(control)?;
        let conversion = &self.options.conversion;
        let output = (conversion.output.as_path(), conversion.force);
        outgoing.publish_to(output, self.places(), self.inputs(), control)?;
        report.seconds = start.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Does the work on threads of its own.
    fn worked(&self, control: &Control<'_>) -> Result<(Outgoing, Report)> {
        let destination = self.destination(control)?;
        let folder = destination.target().parent().unwrap_or(Path::new("."));
        workers(self.options.threads)?.install(|| Work::new(self, control).run(folder))
    }
}
