//! Worker threads.

use crate::error::{Error, Reason, Result};

/// How many there are: one per core if nothing is asked for.
pub(crate) fn count(wanted: Option<usize>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    wanted.unwrap_or_else(cores).clamp(1, 256)
}

/// As many of them.
///
/// # Errors
/// [`Reason::ThreadPool`].
pub(crate) fn pool(wanted: Option<usize>) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(count(wanted))
        .build();
    pool.map_err(|e| {
        let problem = e.to_string();
        Error::new(Reason::ThreadPool { problem })
    })
}
