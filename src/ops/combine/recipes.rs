//! The ways to combine: what stays of each change, and how changes become one. A row each.

use super::consensus::{self, Blended, Consensus, Panel};
use super::sparsify::{self, Masked, Sparsify, Subject};
use crate::error::{Error, Reason, Result};
use crate::linalg::truncated::Blocks;

/// A way to combine adapters.
pub struct Recipe {
    /// Its name in the field.
    pub name: &'static str,
    /// What it does, in a line.
    pub text: &'static str,
    /// Numbers that it takes.
    pub(super) takes: &'static [Knob],
    /// Nothing where factors tell the sum.
    pub(super) on_changes: Option<Pair>,
    /// How many adapters it is made for.
    pub(super) adapters: Option<usize>,
}

/// What stays of each change, and how changes become one.
pub(super) type Pair = (Sparsify, Consensus);

/// Every way; the first is the usual one.
pub static RECIPES: &[Recipe] = &[
    Recipe {
        name: "linear",
        text: "the exact sum of strength times change",
        takes: &[],
        on_changes: None,
        adapters: None,
    },
    Recipe {
        name: "ties",
        text: "the largest of each, then the mean of those whose sign the majority has",
        takes: &[Knob::Density, Knob::Majority, Knob::Normalize],
        on_changes: Some((sparsify::largest, consensus::elected)),
        adapters: None,
    },
    Recipe {
        name: "dare-linear",
        text: "some of each, drawn and made up for, then the sum",
        takes: &[Knob::Density, Knob::Seed, Knob::Normalize],
        on_changes: Some((sparsify::random, consensus::sum)),
        adapters: None,
    },
    Recipe {
        name: "dare-ties",
        text: "some of each, drawn and made up for, then as ties",
        takes: &[Knob::Density, Knob::Seed, Knob::Majority, Knob::Normalize],
        on_changes: Some((sparsify::random, consensus::elected)),
        adapters: None,
    },
    Recipe {
        name: "magnitude-prune",
        text: "the largest of each, then the sum",
        takes: &[Knob::Density, Knob::Normalize],
        on_changes: Some((sparsify::largest, consensus::sum)),
        adapters: None,
    },
    Recipe {
        name: "breadcrumbs",
        text: "neither the largest nor the smallest of each, then the sum",
        takes: &[Knob::Density, Knob::Gamma, Knob::Normalize],
        on_changes: Some((sparsify::without_outliers, consensus::sum)),
        adapters: None,
    },
    Recipe {
        name: "della",
        text: "some of each, the larger the likelier, made up for, then as ties",
        takes: &[
            Knob::Density,
            Knob::Epsilon,
            Knob::Seed,
            Knob::Majority,
            Knob::Normalize,
        ],
        on_changes: Some((sparsify::random_by_magnitude, consensus::elected)),
        adapters: None,
    },
    Recipe {
        name: "median",
        text: "the median of each element",
        takes: &[],
        on_changes: Some((sparsify::everything, consensus::median)),
        adapters: None,
    },
    Recipe {
        name: "slerp",
        text: "between two, on the great circle",
        takes: &[],
        on_changes: Some((sparsify::everything, consensus::spherical)),
        adapters: Some(2),
    },
];

/// Which sign the majority has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Majority {
    /// That of the sum.
    #[default]
    Total,
    /// That which more have.
    Frequency,
}

/// What may be turned; what is absent has its usual value.
#[derive(Clone, Copy, Debug, Default)]
pub struct Knobs {
    /// The share of each change that stays.
    pub density: Option<f64>,
    /// The share of the largest that is left out (breadcrumbs); 0.01 if absent.
    pub gamma: Option<f64>,
    /// How far probabilities differ from the density (della); 0.15 if absent.
    pub epsilon: Option<f64>,
    /// Which sign the majority has.
    pub majority: Option<Majority>,
    /// Divides by the strengths that took part.
    pub normalize: bool,
    /// What the result is multiplied by; 1 if absent.
    pub lambda: Option<f64>,
    /// The seed of what is drawn; 0 if absent.
    pub seed: Option<u64>,
}

/// A number that a way takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Knob {
    Density,
    Gamma,
    Epsilon,
    Majority,
    Normalize,
    Seed,
}

/// A number, its option, and whether it was given.
type Asked = (Knob, &'static str, fn(&Knobs) -> bool);

/// Every number.
const KNOBS: &[Asked] = &[
    (Knob::Density, "--density", |knobs| knobs.density.is_some()),
    (Knob::Gamma, "--gamma", |knobs| knobs.gamma.is_some()),
    (Knob::Epsilon, "--epsilon", |knobs| knobs.epsilon.is_some()),
    (Knob::Majority, "--majority", |knobs| {
        knobs.majority.is_some()
    }),
    (Knob::Normalize, "--normalize", |knobs| knobs.normalize),
    (Knob::Seed, "--seed", |knobs| knobs.seed.is_some()),
];

/// The numbers that hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tuning {
    pub(super) density: f64,
    pub(super) gamma: f64,
    pub(super) epsilon: f64,
    pub(super) majority: Majority,
    pub(super) normalize: bool,
    pub(super) lambda: f64,
    pub(super) seed: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            density: 1.0,
            gamma: 0.01,
            epsilon: 0.15,
            majority: Majority::Total,
            normalize: false,
            lambda: 1.0,
            seed: 0,
        }
    }
}

impl Tuning {
    /// Checks what was given against what a way takes.
    ///
    /// # Errors
    /// [`Reason::BadOption`] for numbers that mean nothing or that the way does not take.
    pub(super) fn of(knobs: &Knobs, takes: &[Knob], name: &str) -> Result<Self> {
        let bad = |text: String, problem: String| Error::new(Reason::BadOption { text, problem });
        for (knob, option, given) in KNOBS {
            if given(knobs) && !takes.contains(knob) {
                return Err(bad((*option).to_owned(), format!("{name} takes none")));
            }
        }
        if takes.contains(&Knob::Density) && knobs.density.is_none() {
            let problem = "needs --density, the share of each change that stays".to_owned();
            return Err(bad(name.to_owned(), problem));
        }
        let usual = Tuning::default();
        let tuning = Tuning {
            density: knobs.density.unwrap_or(usual.density),
            gamma: knobs.gamma.unwrap_or(usual.gamma),
            epsilon: knobs.epsilon.unwrap_or(usual.epsilon),
            majority: knobs.majority.unwrap_or_default(),
            normalize: knobs.normalize,
            lambda: knobs.lambda.unwrap_or(usual.lambda),
            seed: knobs.seed.unwrap_or(usual.seed),
        };
        for (number, option) in [
            (tuning.density, "--density"),
            (tuning.gamma, "--gamma"),
            (tuning.epsilon, "--epsilon"),
        ] {
            if !(0.0..=1.0).contains(&number) {
                let problem = "it is a share, from 0 to 1".to_owned();
                return Err(bad(format!("{option} {number}"), problem));
            }
        }
        if takes.contains(&Knob::Density) && tuning.density == 0.0 {
            let problem = "nothing would be left".to_owned();
            return Err(bad("--density 0".to_owned(), problem));
        }
        if !tuning.lambda.is_finite() || tuning.lambda == 0.0 {
            let problem = "it is a number other than 0".to_owned();
            return Err(bad(format!("--lambda {}", tuning.lambda), problem));
        }
        Ok(tuning)
    }
}

/// The way of a name.
///
/// # Errors
/// [`Reason::BadOption`], with all names that there are.
pub(super) fn named(name: &str) -> Result<&'static Recipe> {
    let found = RECIPES.iter().find(|recipe| recipe.name == name);
    found.ok_or_else(|| {
        let all: Vec<&str> = RECIPES.iter().map(|recipe| recipe.name).collect();
        Error::new(Reason::BadOption {
            text: name.to_owned(),
            problem: format!("no such way to combine; there are {}", all.join(", ")),
        })
    })
}

/// Changes of one layer with their strengths.
pub(super) struct Changes<'a> {
    /// The changes at strength 1, and whose they are.
    pub(super) parts: Vec<(&'a dyn Blocks, f64, usize)>,
    /// The sum of the magnitudes of all strengths.
    pub(super) whole: f64,
    /// The layer's name, of which random numbers are a function.
    pub(super) name: String,
}

/// What a pair of functions makes of the changes.
///
/// # Errors
/// What forming the matrices gives.
pub(super) fn blended<'a>(
    changes: &Changes<'a>,
    (sparsify, consensus): Pair,
    tuning: &Tuning,
) -> Result<Blended<'a>> {
    let mut parts = Vec::new();
    for (matrix, _, adapter) in &changes.parts {
        let mask = sparsify(&Subject {
            matrix: *matrix,
            seed: sparsify::seed(tuning.seed, &changes.name, *adapter),
            tuning,
        })?;
        parts.push(Masked {
            matrix: *matrix,
            mask,
        });
    }
    let strengths: Vec<f64> = changes.parts.iter().map(|part| part.1).collect();
    let blend = consensus(&Panel {
        matrices: &parts,
        strengths: &strengths,
        whole: changes.whole,
        tuning,
    })?;
    Ok(Blended {
        parts,
        blend,
        by: tuning.lambda,
    })
}
