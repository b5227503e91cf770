//! `loratool completions` and `loratool man`: both derived from the same definition as the help.

use std::io::Write;

use clap::{Args, Command};
use clap_complete::Shell;

use super::Outcome;

/// Print a completion script for a shell.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  loratool completions bash > ~/.local/share/bash-completion/completions/loratool"
)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, mut command: Command) -> Outcome {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut command, "loratool", &mut text);
        print(&text);
        Ok(0)
    }
}

/// Print the manual page of loratool, or of one of its commands, in roff.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  loratool man merge | man -l -")]
pub(super) struct Man {
    /// A command
    command: Option<String>,
}

impl Man {
    pub(super) fn run(self, command: Command) -> Outcome {
        let page = match &self.command {
            None => command,
            Some(name) => match command.find_subcommand(name) {
                Some(found) => found
                    .clone()
                    .name(format!("loratool-{name}"))
                    .display_name(format!("loratool {name}")),
                None => {
                    let problem = "there is no such command".to_owned();
                    return Err(loratool::Error::new(loratool::Reason::BadOption {
                        text: name.clone(),
                        problem,
                    }));
                }
            },
        };
        let mut text = Vec::new();
        clap_mangen::Man::new(page)
            .render(&mut text)
            .map_err(|e| loratool::Error::io(loratool::Reason::Write, e))?;
        print(&text);
        Ok(0)
    }
}

fn print(text: &[u8]) {
    // A reader that left is no error.
    let _ = std::io::stdout().lock().write_all(text);
}
