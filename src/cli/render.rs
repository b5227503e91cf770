//! Text for people: folded lists, numbers with units, warnings and errors within a budget.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use loratool::formats::Loss;
use loratool::naming::fold::fold;
use loratool::notice::{Notice, NoticeKind};
use loratool::ops::device::DeviceReport;
use loratool::ops::merge::Control;
use loratool::{Error, printable, printable_json};

use super::cancel_flag;

/// Lines of a list that people get to see; JSON has all of them.
const LINES: usize = 10;

/// Most bytes on standard error.
const STDERR_BYTES: usize = 15_000;

/// Longest line on standard error, in characters.
const LINE: usize = 600;

/// Writes a JSON document to standard output.
pub(super) fn json(value: &impl serde::Serialize) {
    let text = serde_json::to_string_pretty(value).unwrap_or_else(|_| "{}".to_owned());
    out(&printable_json(&text));
}

/// Writes text to standard output; a reader that left is no error.
pub(super) fn out(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

/// Standard error, with a limit on how much is said.
pub(super) struct Stderr {
    left: Cell<usize>,
}

impl Stderr {
    pub(super) fn new() -> Self {
        Stderr {
            left: Cell::new(STDERR_BYTES),
        }
    }

    fn line(&self, text: &str) {
        let mut text: String = match text.char_indices().nth(LINE) {
            Some((cut, _)) => format!("{}…", &text[..cut]),
            None => text.to_owned(),
        };
        text.push('\n');
        match self.left.get().checked_sub(text.len()) {
            Some(left) => {
                self.left.set(left);
                let _ = io::stderr().write_all(text.as_bytes());
            }
            None => {
                if self.left.replace(0) > 0 {
                    let _ = io::stderr().write_all("… (--json tells everything)\n".as_bytes());
                }
            }
        }
    }

    /// `error:`, its cases, and what to do next.
    pub(super) fn error(&self, error: &Error) {
        self.line(&format!("error: {error}"));
        if error.cases().len() > 1
            || error
                .cases()
                .first()
                .is_some_and(|case| !error.to_string().contains(case))
        {
            for line in folded(error.cases()) {
                self.line(&format!("  {}", printable(&line)));
            }
        }
        if let Some(hint) = error.hint() {
            self.line(&format!("hint: {}", printable(hint)));
        }
    }

    /// A `warning:` line per oddity, equal ones folded.
    pub(super) fn notices(&self, notices: &[Notice]) {
        let mut groups: BTreeMap<(NoticeKind, &str, Option<&str>), Vec<&str>> = BTreeMap::new();
        for notice in notices {
            let group = groups
                .entry((notice.kind, &notice.text, notice.file.as_deref()))
                .or_default();
            group.extend(notice.item.as_deref());
        }
        let mut of_kind: BTreeMap<NoticeKind, usize> = BTreeMap::new();
        for ((kind, text, file), items) in groups {
            let count = of_kind.entry(kind).or_default();
            *count += 1;
            if *count > LINES {
                continue;
            }
            let mut line = "warning: ".to_owned();
            for part in file.iter() {
                line.push_str(&format!("{}: ", printable(part)));
            }
            if !items.is_empty() {
                line.push_str(&format!("{}: ", printable(&joined(&items))));
            }
            line.push_str(&printable(text));
            self.line(&line);
        }
        for (kind, count) in of_kind.into_iter().filter(|(_, count)| *count > LINES) {
            self.line(&format!(
                "warning: and {} more of the kind {kind}",
                count - LINES
            ));
        }
    }
}

/// At most ten lines, and how many names the rest stands for.
pub(super) fn folded<S: AsRef<str>>(names: &[S]) -> Vec<String> {
    let lines = fold(names);
    if lines.len() <= LINES {
        return lines;
    }
    let mut shown: Vec<String> = lines[..LINES].to_vec();
    shown.push(format!("and {} more", lines.len() - LINES));
    shown
}

/// A few folded names in one line.
fn joined(names: &[&str]) -> String {
    let lines = fold(names);
    match lines.as_slice() {
        [a, b, c, rest @ ..] if !rest.is_empty() => {
            format!("{a}, {b}, {c} and {} more", rest.len())
        }
        all => all.join(", "),
    }
}

/// Bytes with a unit.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: &[&str] = &["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A whole number with separators.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A name and its value, aligned, the value made safe.
pub(super) struct Fields(String);

impl Fields {
    pub(super) fn new(title: &str) -> Self {
        Fields(printable(title).into_owned())
    }

    pub(super) fn add(&mut self, name: &str, value: impl AsRef<str>) {
        self.0
            .push_str(&format!("\n  {name:<13} {}", printable(value.as_ref())));
    }

    /// A name with several lines.
    pub(super) fn list<S: AsRef<str>>(&mut self, name: &str, lines: &[S]) {
        for (index, line) in lines.iter().enumerate() {
            self.add(if index == 0 { name } else { "" }, line);
        }
    }

    /// The device, where one was asked for.
    pub(super) fn add_device(&mut self, report: Option<&DeviceReport>) {
        if let Some(DeviceReport { device, reason }) = report {
            self.add("device", format!("{device} ({reason})"));
        }
    }

    pub(super) fn print(self) {
        out(&self.0);
    }
}

/// `12 × LoRA, 3 × DoRA`
pub(super) fn counts<K: std::fmt::Display>(counts: impl IntoIterator<Item = (K, usize)>) -> String {
    let parts: Vec<String> = counts
        .into_iter()
        .map(|(what, count)| format!("{what} ({count})"))
        .collect();
    parts.join(", ")
}

/// Does long work that a signal stops, with a bar on a terminal.
pub(super) fn with_progress<T>(unwanted: bool, work: impl FnOnce(&Control<'_>) -> T) -> T {
    let bar = progress_bar(unwanted);
    let progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let done = work(&Control {
        progress: Some(&progress),
        cancel: cancel_flag(),
        ..Control::default()
    });
    bar.finish_and_clear();
    done
}

/// A bar on a terminal, hidden elsewhere and where it is not wanted.
fn progress_bar(unwanted: bool) -> ProgressBar {
    let hidden = unwanted || !io::stderr().is_terminal();
    let target = match hidden {
        true => ProgressDrawTarget::hidden(),
        false => ProgressDrawTarget::stderr(),
    };
    let style =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(0), target).with_style(style)
}

/// Losses, or whatever else is a part with a text.
pub(super) fn losses(what: &str, list: &[Loss]) {
    let lines: Vec<String> = list
        .iter()
        .map(|loss| format!("{}: {}", loss.item, loss.text))
        .collect();
    for line in folded(&lines) {
        out(&printable(&format!("{what}: {line}")));
    }
}
