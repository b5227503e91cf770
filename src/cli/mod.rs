//! The command line: one command per file, over the public API of the library only.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use loratool::formats::{Order, ReadOptions};
use loratool::linalg::dense::named;
use loratool::linalg::device::Choice;
use loratool::ops::convert::{Names, targets as written};
use loratool::tensor::Float;
use loratool::{Error, Reason};

mod adapters;
mod check;
mod combine;
mod convert;
mod extract;
mod inspect;
mod manual;
mod merge;
mod plot;
mod render;
mod rescale;
mod resize;
mod switch;
mod table;
mod unmerge;

use render::Stderr;

/// Merge LoRA adapters into checkpoints, and look at both, without Python and without loading a model.
#[derive(Parser)]
#[command(name = "loratool", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Merge(merge::Merge),
    Unmerge(unmerge::Unmerge),
    Switch(Box<switch::Switch>),
    Combine(Box<combine::Combine>),
    Convert(convert::Convert),
    Rescale(rescale::Rescale),
    Resize(Box<resize::Resize>),
    Extract(Box<extract::Extract>),
    Inspect(inspect::Inspect),
    Check(check::Check),
    Completions(manual::Completions),
    Man(manual::Man),
}

const EXIT_CODES: &str = "\
Exit codes:
  0 done, or clean        5 not supported          10 NaN or infinity in the result
  1 check: something odd  6 parts do not agree     11 an input changed meanwhile
  2 wrong call            7 no place in the base   12 interrupted, nothing changed
  3 reading or writing    8 a limit was reached    70 a bug in loratool
  4 malformed file        9 output refused";

/// The exit code of a panic, as `sysexits.h` has it for software errors.
const BUG: u8 = 70;

/// A type of tensors that are written.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    /// Each tensor's own
    Keep,
    F32,
    Bf16,
    F16,
}

impl Type {
    fn float(self) -> Option<Float> {
        match self {
            Type::Keep => None,
            Type::F32 => Some(Float::F32),
            Type::Bf16 => Some(Float::BF16),
            Type::F16 => Some(Float::F16),
        }
    }
}

/// Names of layers.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayerNames {
    /// Those of diffusers and transformers
    Diffusers,
    /// Those of the model's first publication
    Ldm,
}

impl LayerNames {
    fn names(self) -> Names {
        match self {
            LayerNames::Diffusers => Names::Hub,
            LayerNames::Ldm => Names::Original,
        }
    }
}

/// What stands before flattened names, with the underscore that ends it.
fn prefix(text: &str) -> String {
    match text.ends_with('_') {
        true => text.to_owned(),
        false => format!("{text}_"),
    }
}

/// How much of the machine is used.
#[derive(Args, Clone, Copy, Debug)]
struct Workers {
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

impl Workers {
    fn count(self) -> Option<usize> {
        self.threads.map(usize::from)
    }
}

/// Help of `--device` where products are those of decompositions.
const DECOMPOSED_ON: &str = "Decompose on a device: cpu, candle-cpu, cuda[:N], metal[:N], or auto for one if it gains by \
    it; what is proved and told is as good, but not every bit is the same";

/// Where products are computed.
#[derive(Args, Clone, Debug)]
struct Devices {
    /// Compute products on a device: cpu, candle-cpu, cuda[:N], metal[:N], or auto for one if it gains by it
    #[arg(long, value_name = "DEVICE", default_value = loratool::linalg::device::PROCESSOR)]
    device: String,
    /// Use at most so much of the memory of the device, such as 8GB [default: most of what is free]
    #[arg(long, value_name = "SIZE")]
    device_memory: Option<String>,
}

impl Devices {
    /// The device that was asked for; `algebra` factorises beside it.
    fn choice(&self, algebra: Option<&str>) -> Result<Option<Choice>, Error> {
        let memory = self.device_memory.as_deref().map(size).transpose()?;
        let choice = Choice::named(&self.device, memory, named(algebra)?)?;
        let is_on = |name: &str| std::env::var(name).is_ok_and(|value| value != "0");
        choice.map(|choice| choice.checked(is_on)).transpose()
    }
}

/// What every command takes.
#[derive(Args, Clone, Debug)]
struct Common {
    /// Print one JSON document on standard output (schema in docs/report.md)
    #[arg(long)]
    json: bool,
    /// Accept this configuration field although it is unknown (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unknown_config: Vec<String>,
    /// Alpha of adapters whose files do not state it (loralib, LitGPT without its settings)
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    adapter_alpha: Option<f64>,
    /// Layers of adapters that only number them (cloneofsimo): `sd1`, or a file with a path on each line
    #[arg(long, value_name = "TABLE")]
    order: Option<String>,
}

/// The formats that are written, and other values.
fn targets<const N: usize>(others: [&'static str; N]) -> PossibleValuesParser {
    let formats = written().map(|format| PossibleValue::new(format.id()).help(format.name()));
    PossibleValuesParser::new(formats.chain(others.map(PossibleValue::new)))
}

impl Common {
    /// How adapters are read.
    fn reading(&self) -> loratool::Result<ReadOptions> {
        Ok(ReadOptions {
            allow_unknown_config: self.allow_unknown_config.clone(),
            alpha: self.adapter_alpha,
            order: self.order.as_deref().map(Order::read).transpose()?,
            ..ReadOptions::default()
        })
    }
}

/// Runs the command line and never panics through.
pub(crate) fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        let text = info.to_string().replace('\n', ": ");
        let _ = writeln!(
            io::stderr(),
            "loratool: a bug: {}",
            loratool::printable(&text)
        );
    }));
    let code = std::panic::catch_unwind(|| {
        let parsed = Cli::command().try_get_matches().and_then(|matches| {
            let cli = Cli::from_arg_matches(&matches)?;
            Ok((cli, matches))
        });
        match parsed {
            Ok((cli, matches)) => run(cli.command, &matches),
            Err(error) => wrong_call(&error),
        }
    });
    ExitCode::from(code.unwrap_or(BUG))
}

fn run(command: Command, matches: &clap::ArgMatches) -> u8 {
    loratool::mapped::guard_against_truncation();
    ignore_file_size_signal();
    let (_, own) = matches.subcommand().expect("a command was parsed");
    let (json, result) = match command {
        Command::Merge(command) => (command.json(), command.run(own)),
        Command::Unmerge(command) => (command.common.json, command.run(own)),
        Command::Switch(command) => (command.json(), command.run(own)),
        Command::Combine(command) => (command.writing.common.json, command.run(own)),
        Command::Convert(command) => (command.writing.common.json, command.run()),
        Command::Rescale(command) => (command.writing.common.json, command.run()),
        Command::Resize(command) => (command.writing.common.json, command.run()),
        Command::Extract(command) => (command.json, command.run()),
        Command::Inspect(command) => (command.common.json, command.run()),
        Command::Check(command) => (command.common.json, command.run()),
        Command::Completions(command) => (false, command.run(Cli::command())),
        Command::Man(command) => (false, command.run(Cli::command())),
    };
    result.unwrap_or_else(|error| {
        Stderr::new().error(&error);
        let code = error.kind().exit_code();
        if json {
            let problem = loratool::ops::inspect::Problem::of(error);
            render::json(&serde_json::json!({ "schema": 1, "error": problem }));
        }
        code
    })
}

/// Help and versions are no errors; a wrong call is a document where one was asked for.
fn wrong_call(error: &clap::Error) -> u8 {
    let code = error.exit_code();
    if code != 0 && std::env::args_os().any(|argument| argument == "--json") {
        let kind = loratool::Kind::Usage;
        let text = error.render().to_string();
        let problem =
            serde_json::json!({ "kind": kind.name(), "exit_code": kind.exit_code(), "text": text });
        render::json(&serde_json::json!({ "schema": 1, "error": problem }));
    }
    // A reader that left is no error.
    let _ = error.print();
    u8::try_from(code).unwrap_or(BUG)
}

/// Writing beyond `ulimit -f` must be an error of that write, not the death of the process.
fn ignore_file_size_signal() {
    #[cfg(unix)]
    {
        let _ =
            signal_hook::flag::register(libc_signals::SIGXFSZ, Arc::new(AtomicBool::new(false)));
    }
}

#[cfg(unix)]
mod libc_signals {
    pub(super) const SIGXFSZ: i32 = signal_hook::consts::SIGXFSZ;
}

/// A flag that becomes true on SIGINT, SIGTERM or SIGHUP.
fn cancel_flag() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    #[cfg(unix)]
    let signals = [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ];
    #[cfg(not(unix))]
    let signals = [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM];
    for signal in signals {
        if signal_hook::flag::register(signal, flag.clone()).is_err() {
            // Without the handler the signal kills, and the next run sweeps what is left.
            flag.store(false, Ordering::Relaxed);
        }
    }
    flag
}

/// Forces an arithmetic kernel by name, so that tests reach all of them.
fn kernel() -> Option<String> {
    std::env::var("LORATOOL_KERNEL")
        .ok()
        .filter(|name| !name.is_empty())
}

/// A path argument.
type Path = PathBuf;

/// What a command gives: an exit code, or an error that has its own.
type Outcome = Result<u8, Error>;

fn size(text: &str) -> Result<u64, Error> {
    const UNITS: &[(&str, u64)] = &[
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
        ("kb", 1_000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("tb", 1_000_000_000_000),
        ("b", 1),
    ];
    let wrong = || {
        Error::new(Reason::BadSize {
            text: text.to_owned(),
        })
    };
    let lower = text.trim().to_ascii_lowercase();
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| Some((lower.strip_suffix(name)?, *unit)))
        .unwrap_or((lower.as_str(), 1));
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * unit as f64;
    if bytes.is_finite() && (1.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}
