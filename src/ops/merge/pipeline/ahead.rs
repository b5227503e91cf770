//! Chains that a device computes ahead of the threads that round: one lane carries while another computes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::Scope;
use std::time::Duration;

use rayon::{ThreadPool, Yield};

use crate::adapter::candidates::{Candidates, Chains};
use crate::adapter::evaluate::Recipe;
use crate::error::{Error, Reason, Result};
use crate::linalg::dense::Algebra;
use crate::linalg::device::{Choice, Device};
use crate::ops::device::LARGE;
use crate::tensor::Float;

/// Chunks that a lane may be ahead, beside the one that it computes.
const WAITING: usize = 1;

/// How long a thread sleeps that has nothing else to do.
const PAUSE: Duration = Duration::from_millis(1);

/// Length of the chains of an element, for each thread and each byte that is carried, from which a device is done
/// sooner: a thread computes some 46 GFLOP/s in f64 (`docs/benchmarks.md`) where a bus carries some 10 GB/s. An estimate: no
/// GPU was at hand.
const LENGTH_PER_BYTE: usize = 2;

/// Where tensors may be evaluated beside the processor.
#[derive(Clone, Copy)]
pub(crate) struct Aside<'a> {
    device: &'a Device,
    only_if_faster: bool,
    /// For devices whose products use its threads.
    pool: &'a ThreadPool,
}

impl<'a> Aside<'a> {
    /// Where a choice says, if there is a device.
    pub(crate) fn of(choice: &'a Choice, pool: &'a ThreadPool) -> Option<Self> {
        Some(Aside {
            device: choice.device.as_ref()?,
            only_if_faster: choice.only_if_faster,
            pool,
        })
    }
}

/// Where one tensor is computed.
pub(super) enum Place<'a> {
    /// On the device, but for the rounding.
    Device(Work<'a>),
    /// On the processor, and why.
    Processor(&'static str),
}

/// The device, and what it computes of one tensor.
pub(super) struct Work<'a> {
    aside: Aside<'a>,
    /// For each step.
    steps: Vec<Option<Candidates<'a>>>,
}

impl<'a> Work<'a> {
    /// What there is to do for a device, or why there is nothing.
    ///
    /// # Errors
    /// What reading the parameters gives.
    pub(super) fn of(
        aside: Aside<'a>,
        recipe: &'a Recipe,
        rows: usize,
        needs_chains: bool,
    ) -> Result<Place<'a>> {
        let processor = |reason| Ok(Place::Processor(reason));
        if needs_chains {
            return processor("an undo file is made of the definition's own chains");
        }
        if recipe.to == Float::F64 {
            return processor("no bound settles the last digit of f64");
        }
        let mut updates = recipe.steps.iter().map(|step| &step.update);
        if updates.any(|update| update.multiplier().is_none()) {
            return processor("a method does more than to add, and has no bound");
        }
        let has_doubles = aside.device.algebra().has_doubles();
        let steps = recipe.steps.iter();
        let steps: Vec<_> = steps
            .map(|step| step.update.candidates(recipe.to, has_doubles))
            .collect::<Result<_>>()?;
        if steps.iter().all(Option::is_none) {
            return processor(match has_doubles {
                true => "nothing is multiplied",
                false => "nothing is multiplied, or f32 does not settle it",
            });
        }
        let (mut length, mut carried) = (0, 0);
        for candidates in steps.iter().flatten() {
            length += candidates.length();
            carried += candidates.carried();
        }
        let threads = aside.pool.current_num_threads();
        let gains = length >= LENGTH_PER_BYTE * carried * threads;
        if aside.only_if_faster && (rows * recipe.columns < LARGE || !gains) {
            return processor("too little to do to gain by a device");
        }
        Ok(Place::Device(Work { aside, steps }))
    }

    /// Starts the lanes; they end with the last chunk, with an error, or when nobody takes their chunks any more.
    pub(super) fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        recipe: &'scope Recipe,
        chunks: &'scope [Range<usize>],
    ) -> Ahead<'scope> {
        let lanes = self.aside.device.lanes().take(chunks.len());
        let count = lanes.len();
        let running = Arc::new(AtomicUsize::new(count));
        let lane = |(number, lane): (usize, &'scope dyn Algebra)| {
            let (sender, receiver) = sync_channel(WAITING);
            let mine = chunks.iter().skip(number).step_by(count);
            let running = Running(running.clone());
            scope.spawn(move || {
                let _running = running;
                self.lane(lane, recipe, mine, &sender);
            });
            receiver
        };
        Ahead {
            lanes: lanes.enumerate().map(lane).collect(),
            device: self.aside.device.name(),
            running,
        }
    }

    fn lane<'b>(
        &self,
        lane: &dyn Algebra,
        recipe: &Recipe,
        chunks: impl Iterator<Item = &'b Range<usize>>,
        sender: &SyncSender<Result<Vec<Option<Chains>>>>,
    ) {
        let work = || -> Result<()> {
            let mut steps = Vec::new();
            for candidates in &self.steps {
                steps.push(candidates.as_ref().map(|own| own.on(lane)).transpose()?);
            }
            for chunk in chunks {
                let all = recipe.steps.iter().zip(&steps).map(|(step, own)| {
                    let Some(own) = own else { return Ok(None) };
                    let rows = chunk.start.max(step.rows.start)..chunk.end.min(step.rows.end);
                    if rows.is_empty() {
                        return Ok(None);
                    }
                    let first = step.rows.start;
                    own.chains(rows.start - first..rows.end - first).map(Some)
                });
                let all = match lane.uses_threads() {
                    true => self.aside.pool.install(|| all.collect::<Vec<_>>()),
                    false => all.collect(),
                };
                let all: Result<Vec<_>> = all.into_iter().collect();
                if sender.send(Ok(all?)).is_err() {
                    break;
                }
            }
            Ok(())
        };
        if let Err(error) = work() {
            // Whoever no longer listens has an error of its own.
            let _ = sender.send(Err(error));
        }
    }
}

/// Counts a lane as running until it is dropped.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Chunks that lanes compute in turn.
pub(super) struct Ahead<'a> {
    lanes: Vec<Receiver<Result<Vec<Option<Chains>>>>>,
    device: &'a str,
    running: Arc<AtomicUsize>,
}

impl Drop for Ahead<'_> {
    /// Ends the lanes. They may need the pool for it, of which this thread may be the last.
    fn drop(&mut self) {
        self.lanes.clear();
        while self.running.load(Ordering::Acquire) > 0 {
            if rayon::yield_now() != Some(Yield::Executed) {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

impl Ahead<'_> {
    /// The chains of the next chunk by its number. The thread works for its pool while it waits: what it waits for may
    /// need it.
    ///
    /// # Errors
    /// That of the lane.
    pub(super) fn next(&self, number: usize) -> Result<Vec<Option<Chains>>> {
        let lane = &self.lanes[number % self.lanes.len()];
        loop {
            let pause = match rayon::yield_now() {
                Some(Yield::Executed) => Duration::ZERO,
                Some(Yield::Idle) | None => PAUSE,
            };
            match lane.recv_timeout(pause) {
                Ok(chains) => return chains,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let problem = "its thread ended".to_owned();
                    let device = self.device.to_owned();
                    return Err(Error::new(Reason::DeviceFailed { device, problem }));
                }
            }
        }
    }
}
