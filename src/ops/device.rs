//! Where products are computed, decided and told.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::linalg::dense::Algebra;
use crate::linalg::device::{Choice, PROCESSOR};

/// Elements of the smallest layer that gains by a device. A merge asks for a rank as well.
///
/// An estimate from what carrying costs, not measured on a GPU: a layer of 2²⁰ elements is 4 MiB of f32, which a bus of
/// 10 GB/s carries in 0.4 ms. Some twenty products of it with 48 vectors are 2 GFLOP, 10 ms at the 200 GFLOP/s of a
/// processor. Of smaller layers what the processor does in any case takes longer than products.
pub(super) const LARGE: usize = 1 << 20;

/// Where products are computed, and why there.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// The device; `cpu` where there is none, or nothing gained by it.
    pub device: String,
    /// Why it is that one.
    pub reason: String,
}

impl DeviceReport {
    /// What is told of a choice; `gains` says whether anything gains by a device, or why nothing does.
    pub(super) fn of(choice: &Choice, gains: Result<(), &str>) -> Self {
        let (device, reason) = match (&choice.device, gains) {
            (Some(_), Err(why)) if choice.only_if_faster => (PROCESSOR, why),
            (Some(device), _) => (device.name(), &*choice.reason),
            (None, _) => (PROCESSOR, &*choice.reason),
        };
        DeviceReport {
            device: device.to_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// What a device did of a merge.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// Tensors whose products it computed.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Elements that its candidates did not settle, and that the definition gave.
    pub recomputed: u64,
    /// Tensors that were left to the processor, by the reason.
    pub processor: BTreeMap<&'static str, usize>,
}

impl Tally {
    /// Counts a tensor that the device computed.
    pub(super) fn on_device(&mut self, elements: u64, recomputed: u64) {
        self.tensors += 1;
        self.elements += elements;
        self.recomputed += recomputed;
    }

    /// Counts one that was left to the processor.
    pub(super) fn on_processor(&mut self, reason: &'static str) {
        *self.processor.entry(reason).or_default() += 1;
    }
}

/// What computes something, and whether that is a device: where one was chosen, and the work gains by it or is to be
/// done there at any rate.
pub(super) fn algebra<'a>(
    choice: Option<&'a Choice>,
    processor: &'static dyn Algebra,
    gains: bool,
) -> (&'a dyn Algebra, bool) {
    let choice = choice.filter(|choice| gains || !choice.only_if_faster);
    match choice.and_then(|choice| choice.device.as_ref()) {
        Some(device) => (device.algebra(), true),
        None => (processor, false),
    }
}
