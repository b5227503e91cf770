//! An adapter from the difference of two checkpoints: `plan`, then `run` or `measure`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::device::{self, LARGE};
use super::merge::Control;
use super::outgoing::{Base, Outgoing, expected_shape, format};
use super::workers::workers;
use crate::adapter::Method;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::sink::Destination;
use crate::error::{Error, Reason, Result};
use crate::formats::{Format, Loss, customary};
use crate::linalg::dense::{self, Algebra};
use crate::linalg::device::Choice;
use crate::mapped::Input;
use crate::methods::METHODS;
use crate::notice::Notice;
use crate::pattern::Pattern;
use crate::tensor::Float;

mod measure;
mod pairs;
mod report;
mod search;
mod whole;

use pairs::Pair;
use search::Search;

pub use pairs::What;
pub use report::{FittedReport, Proved, Report, Total, WholeReport};

pub use super::device::DeviceReport;
pub use super::outgoing::Names;

/// What to extract from what, and what to accept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The checkpoint before.
    pub base: PathBuf,
    /// The checkpoint after.
    pub tuned: PathBuf,
    /// A folder; or a file, where the format is one file and the name ends as it does.
    pub output: PathBuf,
    /// How ranks are chosen.
    pub ranks: Ranks,
    /// The largest rank where it is chosen by the spectrum.
    pub max_rank: usize,
    /// Other ranks for layers whose path a regular expression finds; the first match counts.
    pub rank_for: Vec<(String, usize)>,
    /// The short name of the format; the one that is customary for the model if absent.
    pub to: Option<String>,
    /// The numerator of the scale; the rank if absent, so that the scale is 1.
    pub alpha: Option<f64>,
    /// Regular expressions (searched anywhere in a name): only these tensors.
    pub only: Vec<String>,
    /// Regular expressions: not these tensors.
    pub skip: Vec<String>,
    /// What becomes of embeddings.
    pub embeddings: Embeddings,
    /// What becomes of norms.
    pub norms: Whole,
    /// What becomes of biases.
    pub biases: Whole,
    /// The method to fit, by its name; the first that can be fitted if absent.
    pub method: Option<String>,
    /// Residuals are to be proved at most this share above the best; nothing is proved if absent.
    pub tolerance: Option<f64>,
    /// Computes all singular values.
    pub exact: bool,
    /// The type of the factors.
    pub dtype: Float,
    /// The seed of the random numbers.
    pub seed: u64,
    /// Worker threads; one per core if absent.
    pub threads: Option<usize>,
    /// One of [`crate::linalg::dense::ALGEBRAS`] by name; the first if absent.
    pub algebra: Option<String>,
    /// A device for the products of decompositions; the processor if absent. What is proved is the same, but not every
    /// bit.
    pub device: Option<Choice>,
    /// Leaves out tensors that have no difference, and says so.
    pub allow_unmatched: bool,
    /// Writes what the format can say and leaves out the rest.
    pub allow_losses: bool,
    /// Extracts although the two have nothing to do with each other.
    pub allow_unrelated: bool,
    /// Replaces an existing output.
    pub force: bool,
    /// The family of the model, where names alone do not tell it.
    pub family: Option<String>,
    /// The part of a pipeline that names are of which do not say it.
    pub component: Option<String>,
    /// What stands before flattened names.
    pub prefix: Option<String>,
    /// The names of layers, where the format has both.
    pub names: Option<Names>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            base: PathBuf::new(),
            tuned: PathBuf::new(),
            output: PathBuf::new(),
            ranks: Ranks::Fixed(32),
            max_rank: 256,
            rank_for: Vec::new(),
            to: None,
            alpha: None,
            only: Vec::new(),
            skip: Vec::new(),
            embeddings: Embeddings::Fitted,
            norms: Whole::Full,
            biases: Whole::Full,
            method: None,
            tolerance: Some(1e-3),
            exact: false,
            dtype: Float::F32,
            seed: 0,
            threads: None,
            algebra: None,
            device: None,
            allow_unmatched: false,
            allow_losses: false,
            allow_unrelated: false,
            force: false,
            family: None,
            component: None,
            prefix: None,
            names: None,
        }
    }
}

/// How ranks are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ranks {
    /// One for all.
    Fixed(usize),
    /// The smallest that keeps this share of ‖Δ‖².
    Energy(f64),
    /// As many as there are singular values above the largest divided by this.
    Ratio(f64),
    /// The best that a file of so many bytes holds.
    Budget(u64),
}

/// What becomes of embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Embeddings {
    /// The method is fitted to them, unless their number of rows changed.
    Fitted,
    /// They are taken whole.
    Full,
    /// They are left out.
    Skip,
}

/// What becomes of tensors that no method is fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// They are taken whole.
    Full,
    /// They are left out.
    Skip,
}

/// An extraction that can be run.
pub struct Plan {
    options: Options,
    base: Base,
    tuned: Checkpoint,
    pairs: Vec<Pair>,
    method: &'static dyn Method,
    algebra: &'static dyn Algebra,
    target: &'static dyn Format,
    rank_for: Vec<(Pattern, usize)>,
    left_out: Vec<Loss>,
    notices: Vec<Notice>,
}

/// Bytes that the difference of one layer may take; a larger one is formed anew for every product.
const MEMORY: usize = 512 << 20;

/// Opens both sides, pairs their tensors and checks everything that can be told without arithmetic.
///
/// # Errors
/// Tensors that have no difference, all listed; sides that are quantised or have nothing to do with each other;
/// options that contradict each other; an output that cannot be written.
pub fn plan(options: &Options) -> Result<Plan> {
    checked(options)?;
    let method = named(options.method.as_deref())?;
    let algebra = dense::named(options.algebra.as_deref())?;
    let rank_for = options.rank_for.iter();
    let rank_for = rank_for.map(|(pattern, rank)| Ok((Pattern::search(pattern)?, *rank)));
    let rank_for: Vec<_> = rank_for.collect::<Result<_>>()?;
    let base = Base::open(&options.base)?;
    let tuned = Checkpoint::open(&options.tuned)?;
    for side in [&base.checkpoint, &tuned] {
        if let Some(how) = side.quantisation() {
            return Err(Error::new(Reason::QuantisedBase { how }).in_file(&side.path));
        }
    }
    let pairs::Paired { pairs, unmatched } = pairs::pair(options, &base, &tuned)?;
    if !unmatched.is_empty() && !options.allow_unmatched {
        let count = unmatched.len();
        return Err(Error::new(Reason::Unmatched { count })
            .in_file(&options.tuned)
            .with_cases(unmatched)
            .with_hint(
                "--allow-unmatched leaves them out; --skip leaves out what a pattern finds",
            ));
    }
    if !options.allow_unrelated {
        pairs::refuse_strangers(&pairs, &tuned)?;
    }
    let target = match &options.to {
        Some(to) => format(to)?,
        None => customary(is_denoiser(&pairs)),
    };
    let left_out = unmatched.iter().map(|case| {
        let (item, text) = case.split_once(": ").unwrap_or((case, ""));
        Loss {
            item: item.to_owned(),
            text: text.to_owned(),
        }
    });
    let notices = base
        .checkpoint
        .notices
        .iter()
        .chain(&tuned.notices)
        .cloned();
    let plan = Plan {
        options: options.clone(),
        left_out: left_out.collect(),
        notices: notices.collect(),
        base,
        tuned,
        pairs,
        method,
        algebra,
        target,
        rank_for,
    };
    plan.destination(&Control::default())?;
    Ok(plan)
}

/// Refuses numbers that mean nothing.
fn checked(options: &Options) -> Result<()> {
    let bad = |text: String, problem: &str| {
        let problem = problem.to_owned();
        Err(Error::new(Reason::BadOption { text, problem }))
    };
    match options.ranks {
        Ranks::Fixed(0) => return bad("0".to_owned(), "a rank is at least 1"),
        Ranks::Energy(share) if !(share > 0.0 && share <= 1.0) => {
            return bad(
                share.to_string(),
                "a share of the energy is more than 0 and at most 1",
            );
        }
        Ranks::Ratio(ratio) if !(ratio >= 1.0 && ratio.is_finite()) => {
            return bad(
                ratio.to_string(),
                "a ratio of singular values is at least 1",
            );
        }
        _ => {}
    }
    if options.max_rank == 0 || options.rank_for.iter().any(|(_, rank)| *rank == 0) {
        return bad("0".to_owned(), "a rank is at least 1");
    }
    if let Some(tolerance) = options
        .tolerance
        .filter(|tolerance| !(*tolerance > 0.0 && tolerance.is_finite()))
    {
        return bad(tolerance.to_string(), "a tolerance is more than 0");
    }
    match options
        .alpha
        .filter(|alpha| *alpha == 0.0 || !alpha.is_finite())
    {
        Some(alpha) => bad(alpha.to_string(), "alpha is a number other than 0"),
        None => Ok(()),
    }
}

/// The method of a name, or the first.
fn named(name: Option<&str>) -> Result<&'static dyn Method> {
    let fitting = || METHODS.iter().copied().filter(|method| method.fits());
    let is_it =
        |method: &&dyn Method| name.is_none_or(|name| method.name().eq_ignore_ascii_case(name));
    fitting().find(is_it).ok_or_else(|| {
        let all: Vec<&str> = fitting().map(Method::name).collect();
        Error::new(Reason::BadOption {
            text: name.unwrap_or_default().to_owned(),
            problem: format!("no method that can be fitted; there are {}", all.join(", ")),
        })
    })
}

/// Whether the layers are those of an image or video model.
fn is_denoiser(pairs: &[Pair]) -> bool {
    use crate::naming::{component, families};
    pairs.iter().any(|pair| {
        let found = families::find(component::split(&pair.path, false).path, false);
        found.iter().any(|found| found.family.denoiser().is_some())
    })
}

impl Plan {
    /// What is odd about the two sides.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    fn inputs(&self) -> impl Iterator<Item = &Arc<Input>> {
        self.base.checkpoint.inputs().chain(self.tuned.inputs())
    }

    /// The files and folders that are read.
    fn places(&self) -> Vec<&Path> {
        let folders = [&self.options.base, &self.options.tuned];
        let folders = folders.into_iter().filter(|path| path.is_dir());
        let files = self.inputs().map(|input| input.path());
        files.chain(folders.map(PathBuf::as_path)).collect()
    }

    /// Whether the decomposition of a layer gains by a device.
    fn gains(&self, pair: &Pair) -> bool {
        let on = pair.geometry();
        !self.options.exact && on.rows * on.columns >= LARGE
    }

    /// What decomposes a layer.
    fn algebra(&self, pair: &Pair) -> &dyn Algebra {
        let choice = self.options.device.as_ref();
        device::algebra(choice, self.algebra, self.gains(pair)).0
    }

    /// Where layers were decomposed, if that was to be chosen.
    fn device(&self, fitted: &[usize]) -> Option<DeviceReport> {
        let choice = self.options.device.as_ref()?;
        let gains = fitted.iter().any(|index| self.gains(&self.pairs[*index]));
        let why = match self.options.exact {
            true => "all singular values are asked for, which takes few products",
            false => "no layer is large enough to gain by it",
        };
        Some(DeviceReport::of(choice, gains.then_some(()).ok_or(why)))
    }

    /// Where the output goes, as far as the format tells it without an adapter.
    fn destination(&self, control: &Control<'_>) -> Result<Destination> {
        let options = &self.options;
        Destination::check(
            &options.output,
            expected_shape(self.target, &options.output),
            options.force,
            self.places(),
            control.faults.clone(),
        )
    }

    /// Decomposes every difference and reports; the output is not touched.
    ///
    /// # Errors
    /// A difference that is not finite, factors that do not fit their type, losses that are not allowed.
    pub fn measure(&self, control: &Control<'_>) -> Result<Report> {
        let (_, mut report) = self.searched(control)?;
        report.dry_run = true;
        Ok(report)
    }

    /// Extracts and writes the output, complete or not at all.
    ///
    /// # Errors
    /// As [`Plan::measure`], and those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        let start = Instant::now();
        let (outgoing, mut report) = self.searched(control)?;
        let output = (self.options.output.as_path(), self.options.force);
        outgoing.publish_to(output, self.places(), self.inputs(), control)?;
        report.seconds = start.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Does the work on threads of its own.
    fn searched(&self, control: &Control<'_>) -> Result<(Outgoing, Report)> {
        let destination = self.destination(control)?;
        let folder = destination.target().parent().unwrap_or(Path::new("."));
        workers(self.options.threads)?.install(|| Search::new(self, control).run(folder))
    }
}
