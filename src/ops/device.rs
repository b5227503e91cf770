//! Where products were computed, told.

use serde::Serialize;

/// Where products are computed, and why there.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// The device; `cpu` where there is none, or nothing gained by it.
    pub device: String,
    /// Why it is that one.
    pub reason: String,
}
