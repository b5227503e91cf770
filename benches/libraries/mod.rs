//! What benchmarks compare, and tests go through.

use loratool::linalg::dense::{ALGEBRAS, Algebra};
use loratool::linalg::device::Device;

/// Every library of linear algebra that needs no hardware: those of the build, and the device that is the processor.
pub(crate) fn libraries() -> Vec<&'static dyn Algebra> {
    let mut all = ALGEBRAS.to_vec();
    if cfg!(feature = "candle") {
        let device = Device::open("candle-cpu", None, ALGEBRAS[0]).expect("it is in this build");
        // Few, and as good as static.
        let device: &'static Device = Box::leak(Box::new(device));
        all.push(device.algebra());
    }
    all
}
