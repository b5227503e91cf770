//! What additive modules change, without a weight: their sum, evaluated as a merge evaluates it on zeros.

use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use ndarray::{Array2, Axis, concatenate};

use super::method::{Geometry, Order, Orientation, Part, Update, Workspace};
use super::module::{Layer, Module};
use crate::error::{Reason, Result};
use crate::linalg::Kernel;
use crate::linalg::truncated::Blocks;

impl Module {
    /// How it lies on the weight that it is made for, as far as it tells itself: a layer whose weight is stored inputs
    /// first (Conv1D of GPT-2) looks like any other.
    pub fn geometry(&self) -> Option<Geometry> {
        let shape = self.method.shape(self)?;
        let (rows, inner) = shape.split_first()?;
        Some(Geometry {
            part: Part::Weight,
            rows: *rows,
            columns: inner.iter().product(),
            orientation: match self.layer {
                Layer::Dense => Orientation::OutputsFirst,
                Layer::Embedding => Orientation::InputsFirst,
            },
            kernel: inner.iter().skip(1).product(),
        })
    }
}

impl Module {
    /// Checks that it is made for what it lies on.
    ///
    /// # Errors
    /// [`Reason::FactorShape`].
    pub fn check_on(&self, on: &Geometry) -> Result<()> {
        let extent = self.method.extent(self);
        let (outputs, inputs) = match (extent.as_stored, on.orientation) {
            (true, _) | (_, Orientation::OutputsFirst) => (on.rows, on.columns),
            (false, Orientation::InputsFirst) => (on.columns, on.rows),
        };
        let fits = match on.part {
            Part::Weight => (extent.outputs, extent.inputs) == (Some(outputs), Some(inputs)),
            Part::Bias => extent.outputs == Some(on.rows) && on.columns == 1,
        };
        if fits {
            return Ok(());
        }
        let problem = format!(
            "it is made for {} outputs and {} inputs, not for {outputs} and {inputs}",
            extent.outputs.unwrap_or(0),
            extent.inputs.unwrap_or(0)
        );
        Err(self.error(Reason::FactorShape { problem }))
    }
}

/// Σ factor · (what a module adds), rows × columns of the stored matrix.
pub struct Delta<'a> {
    parts: Vec<(&'a Module, f64)>,
    on: Geometry,
    /// Made when the first block is asked for: factors do not need them.
    updates: OnceLock<Vec<Box<dyn Update>>>,
    making: Mutex<()>,
}

impl<'a> Delta<'a> {
    /// Puts modules of one layer together.
    ///
    /// # Errors
    /// [`Reason::MethodOnTarget`] for a method whose change depends on the weight, [`Reason::FactorShape`] for a module
    /// that is made for another shape.
    pub fn of(parts: &[(&'a Module, f64)], on: Geometry) -> Result<Self> {
        for (module, _) in parts {
            if module.method.order() != Order::Additive {
                let (method, what) = (module.method.name(), "a layer without its weight");
                return Err(module.error(Reason::MethodOnTarget { method, what }));
            }
            module.check_on(&on)?;
        }
        Ok(Delta {
            parts: parts.to_vec(),
            on,
            updates: OnceLock::new(),
            making: Mutex::new(()),
        })
    }

    fn updates(&self) -> Result<&[Box<dyn Update>]> {
        if let Some(made) = self.updates.get() {
            return Ok(made);
        }
        // One thread makes them, the others wait.
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = self.updates.get() {
            return Ok(made);
        }
        let parts = self.parts.iter();
        let made = parts.map(|(module, factor)| module.method.update(module, &self.on, *factor));
        let made = made.collect::<Result<_>>()?;
        Ok(self.updates.get_or_init(|| made))
    }
}

impl Blocks for Delta<'_> {
    fn rows(&self) -> usize {
        self.on.rows
    }

    fn columns(&self) -> usize {
        self.on.columns
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let zeros = vec![0.0; values.len()];
        values.fill(0.0);
        let (mut workspace, kernel) = (Workspace::default(), Kernel::best());
        for update in self.updates()? {
            update.apply(rows.clone(), &zeros, values, &mut workspace, kernel)?;
        }
        Ok(())
    }

    /// Those of all parts side by side, where all have some.
    fn factors(&self) -> Result<Option<(Array2<f64>, Array2<f64>)>> {
        let (mut lefts, mut rights) = (Vec::new(), Vec::new());
        for (module, factor) in &self.parts {
            let Some((mut left, right)) = module.method.factors(module, &self.on)? else {
                return Ok(None);
            };
            left.mapv_inplace(|value| factor * value);
            lefts.push(left);
            rights.push(right);
        }
        let side = |axis, parts: &[Array2<f64>], empty| {
            let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
            match views.is_empty() {
                true => Array2::zeros(empty),
                false => concatenate(Axis(axis), &views).expect("all are of one shape"),
            }
        };
        Ok(Some((
            side(1, &lefts, (self.on.rows, 0)),
            side(0, &rights, (0, self.on.columns)),
        )))
    }
}
