//! Regular expressions of users and of strangers, in linear time wherever possible.
//!
//! The `regex` crate is linear in the text and has a size limit. PEFT's patterns are Python's, which
//! allow look-around and back-references; those go to `fancy-regex` with a limit on its steps, and
//! running into the limit is an error, never "no match".

use crate::error::{Error, Reason, Result};

/// A compiled pattern.
#[derive(Debug)]
pub(crate) struct Pattern {
    text: String,
    engine: Engine,
}

/// Which of the modules a user wants.
#[derive(Debug)]
pub(crate) struct Choice {
    only: Vec<Pattern>,
    skip: Vec<Pattern>,
}

impl Choice {
    /// Those that some pattern of `only` finds, or all if there is none, less those that one of `skip`
    /// finds.
    ///
    /// # Errors
    /// As [`Pattern::search`].
    pub(crate) fn new(only: &[String], skip: &[String]) -> Result<Self> {
        let patterns = |texts: &[String]| -> Result<Vec<Pattern>> {
            texts.iter().map(|text| Pattern::search(text)).collect()
        };
        Ok(Choice {
            only: patterns(only)?,
            skip: patterns(skip)?,
        })
    }

    /// Whether it is wanted.
    ///
    /// # Errors
    /// As [`Pattern::matches`].
    pub(crate) fn keeps(&self, path: &str) -> Result<bool> {
        let any = |patterns: &[Pattern]| -> Result<bool> {
            for pattern in patterns {
                if pattern.matches(path)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        Ok((self.only.is_empty() || any(&self.only)?) && !any(&self.skip)?)
    }
}

#[derive(Debug)]
enum Engine {
    Linear(regex::Regex),
    Backtracking(Box<fancy_regex::Regex>),
}

/// Largest compiled pattern, in bytes.
const SIZE_LIMIT: usize = 1 << 20;

/// Most steps of the backtracking engine on one text.
const STEP_LIMIT: usize = 100_000;

/// Longest pattern text.
const TEXT_LIMIT: usize = 16 << 10;

impl Pattern {
    /// Compiles a pattern that may match anywhere in a text.
    ///
    /// # Errors
    /// [`Reason::BadPattern`], [`Reason::PatternTooLarge`].
    pub(crate) fn search(text: &str) -> Result<Self> {
        Self::compile(text, text)
    }

    /// The pattern as it was given.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Compiles a pattern that must match a whole text, as Python's `re.fullmatch`.
    ///
    /// # Errors
    /// As [`Pattern::search`].
    pub(crate) fn full(text: &str) -> Result<Self> {
        Self::compile(text, &format!("^(?:{text})$"))
    }

    /// Compiles a key of PEFT's `rank_pattern`: `re.match(r"(.*\.)?(key)$", path)`.
    ///
    /// # Errors
    /// As [`Pattern::search`].
    pub(crate) fn suffix(text: &str) -> Result<Self> {
        Self::compile(text, &format!(r"^(?:.*\.)?(?:{text})$"))
    }

    fn compile(text: &str, whole: &str) -> Result<Self> {
        // `a)|(?:b` would be sound only inside a group that it is not meant to end.
        if text != whole {
            Self::compile(text, text)?;
        }
        let shown: String = text.chars().take(80).collect();
        if text.len() > TEXT_LIMIT {
            return Err(Error::new(Reason::PatternTooLarge { pattern: shown }));
        }
        let linear = regex::RegexBuilder::new(whole)
            .size_limit(SIZE_LIMIT)
            .build();
        let engine = match linear {
            Ok(regex) => Engine::Linear(regex),
            Err(regex::Error::CompiledTooBig(_)) => {
                return Err(Error::new(Reason::PatternTooLarge { pattern: shown }));
            }
            Err(_) => {
                let backtracking = fancy_regex::RegexBuilder::new(whole)
                    .backtrack_limit(STEP_LIMIT)
                    .delegate_size_limit(SIZE_LIMIT)
                    .build();
                let regex = backtracking.map_err(|problem| {
                    let problem = problem.to_string();
                    Error::new(Reason::BadPattern {
                        pattern: shown.clone(),
                        problem,
                    })
                })?;
                Engine::Backtracking(Box::new(regex))
            }
        };
        Ok(Pattern {
            text: shown,
            engine,
        })
    }

    /// Whether matching costs linear time.
    pub(crate) fn is_linear(&self) -> bool {
        matches!(self.engine, Engine::Linear(_))
    }

    /// Whether it matches.
    ///
    /// # Errors
    /// [`Reason::TooManyPatternSteps`].
    pub(crate) fn matches(&self, text: &str) -> Result<bool> {
        match &self.engine {
            Engine::Linear(regex) => Ok(regex.is_match(text)),
            Engine::Backtracking(regex) => regex.is_match(text).map_err(|_| {
                Error::new(Reason::TooManyPatternSteps {
                    pattern: self.text.clone(),
                })
            }),
        }
    }
}
