//! Adapters with their strengths, as every command takes them that applies some.

use clap::{ArgMatches, Args};
use loratool::ops::merge::Selection;
use loratool::{Error, Reason};

use super::Path;

/// Adapters, each with what belongs to it.
#[derive(Args, Debug)]
pub(super) struct Adapters {
    /// An adapter folder, or its file of tensors with the configuration beside it (repeatable)
    #[arg(long, value_name = "PATH", required = true)]
    pub(super) adapter: Vec<Path>,
    #[command(flatten)]
    pub(super) strengths: Strengths,
}

/// Multipliers of the adapters before them.
#[derive(Args, Debug)]
pub(super) struct Strengths {
    /// Multiplier of the adapter before it; negative takes away
    #[arg(long, value_name = "NUMBER", default_value = "1", allow_negative_numbers = true, visible_aliases = ["weight", "ratio"])]
    strength: Vec<f64>,
    /// Strength of modules whose path the pattern finds; the first match counts (repeatable)
    #[arg(long, value_name = "REGEX=NUMBER")]
    strength_for: Vec<String>,
}

/// What the command line says of one adapter.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    /// Its strength, where it is given.
    pub(super) strength: Option<f64>,
    /// Other strengths, by pattern.
    pub(super) strength_for: Vec<(String, f64)>,
}

impl Adapters {
    /// The adapters, each with the strength behind it.
    pub(super) fn selections(&self, matches: &ArgMatches) -> Result<Vec<Selection>, Error> {
        let [said] = self.strengths.of(matches, ["adapter"])?;
        Ok(selections(&self.adapter, said))
    }
}

/// Adapters, each at strength 1 where nothing else is said.
pub(super) fn selections(paths: &[Path], said: Vec<Said>) -> Vec<Selection> {
    let selection = |(path, said): (&Path, Said)| Selection {
        path: path.clone(),
        strength: said.strength.unwrap_or(1.0),
        strength_for: said.strength_for,
    };
    paths.iter().zip(said).map(selection).collect()
}

impl Strengths {
    /// Gives each strength to the adapter before it on the command line, whichever of some options names it; a
    /// `--strength-for` before the first belongs to all.
    pub(super) fn of<const N: usize>(
        &self,
        matches: &ArgMatches,
        options: [&str; N],
    ) -> Result<[Vec<Said>; N], Error> {
        let given =
            |name: &str| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
        let indices = |name: &str| -> Vec<usize> {
            match given(name) {
                true => matches.indices_of(name).into_iter().flatten().collect(),
                false => Vec::new(),
            }
        };
        let adapters = options.map(indices);
        let mut said = adapters.clone().map(|own| vec![Said::default(); own.len()]);
        let owner = |at: usize| {
            let all = adapters.iter().enumerate().flat_map(|(option, own)| {
                let own = own.iter().enumerate();
                own.map(move |(number, adapter)| (*adapter, option, number))
            });
            all.filter(|(adapter, ..)| *adapter < at).max()
        };
        for (at, strength) in indices("strength").into_iter().zip(&self.strength) {
            let wrong = |problem: &str| {
                let text = format!("--strength {strength}");
                let problem = problem.to_owned();
                Error::new(Reason::BadOption { text, problem })
            };
            let owner = owner(at).ok_or_else(|| wrong("no --adapter stands before it"))?;
            let said = &mut said[owner.1][owner.2];
            if said.strength.replace(*strength).is_some() {
                return Err(wrong("the adapter before it has a strength already"));
            }
        }
        for (at, text) in indices("strength_for").into_iter().zip(&self.strength_for) {
            let rule = strength_for(text)?;
            match owner(at) {
                Some((_, option, number)) => said[option][number].strength_for.push(rule),
                None => said
                    .iter_mut()
                    .flatten()
                    .for_each(|said| said.strength_for.push(rule.clone())),
            }
        }
        Ok(said)
    }
}

fn strength_for(text: &str) -> Result<(String, f64), Error> {
    let wrong = || {
        let problem = "expected REGEX=NUMBER".to_owned();
        Error::new(Reason::BadOption {
            text: format!("--strength-for {text}"),
            problem,
        })
    };
    let (pattern, number) = text.rsplit_once('=').ok_or_else(wrong)?;
    let strength: f64 = number.trim().parse().map_err(|_| wrong())?;
    Ok((pattern.to_owned(), strength))
}
