//! What arithmetic is done with: threads, and a library of linear algebra.

use crate::error::{Error, Reason, Result};
use crate::linalg::dense::{ALGEBRAS, Algebra};

/// How many threads there are, as many as are asked for; one per core if that is not said.
pub(super) fn threads(wanted: Option<usize>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    wanted.unwrap_or_else(cores).clamp(1, 256)
}

/// As many worker threads.
///
/// # Errors
/// [`Reason::ThreadPool`].
pub(super) fn workers(wanted: Option<usize>) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads(wanted))
        .build();
    pool.map_err(|e| {
        let problem = e.to_string();
        Error::new(Reason::ThreadPool { problem })
    })
}

/// The library of a name, or the first.
///
/// # Errors
/// [`Reason::BadOption`], with all names that there are.
pub(super) fn algebra(name: Option<&str>) -> Result<&'static dyn Algebra> {
    let Some(name) = name else {
        return Ok(ALGEBRAS[0]);
    };
    let found = ALGEBRAS
        .iter()
        .copied()
        .find(|algebra| algebra.name() == name);
    found.ok_or_else(|| {
        let all: Vec<&str> = ALGEBRAS.iter().map(|algebra| algebra.name()).collect();
        Error::new(Reason::BadOption {
            text: name.to_owned(),
            problem: format!(
                "no such linear algebra in this build; there are {}",
                all.join(", ")
            ),
        })
    })
}
