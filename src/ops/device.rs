//! Where products were computed, told.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::linalg::device::{Choice, Device, PROCESSOR};

/// Where products are computed, and why there.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// The device; `cpu` where there is none, or nothing gained by it.
    pub device: String,
    /// Why it is that one.
    pub reason: String,
}

impl DeviceReport {
    /// What was chosen.
    pub(super) fn of(choice: &Choice) -> Self {
        let name = choice.device.as_ref().map_or(PROCESSOR, Device::name);
        DeviceReport {
            device: name.to_owned(),
            reason: choice.reason.clone(),
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
