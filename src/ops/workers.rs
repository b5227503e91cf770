//! The threads that arithmetic is done with.

use crate::error::{Error, Reason, Result};

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
