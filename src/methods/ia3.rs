//! (IA)³: a learned factor per output, or per input for feed-forward layers.
//!
//! Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
//! Learning", 2022; as PEFT computes it (`peft/tuners/ia3/layer.py`, `merge`): W' = W ∘ l, and the bias
//! is multiplied as well where l is per output.

use std::ops::Range;

use super::dora::interpolate;
use super::full::weighted;
use crate::adapter::{
    Along, BiasUse, Extent, Geometry, Method, Module, Order, Orientation, Role, RoleUse, Update,
    Workspace,
};
use crate::error::{Reason, Result};
use crate::linalg::Kernel;
use crate::tensor::DType;

/// Factors on inputs.
pub const INPUT_SCALE: Role = Role::new("input scale");

/// Factors on outputs.
pub const OUTPUT_SCALE: Role = Role::new("output scale");

/// The method.
pub static IA3: Ia3 = Ia3;

/// Learned factors.
#[derive(Debug)]
pub struct Ia3;

impl Method for Ia3 {
    fn name(&self) -> &'static str {
        "IA3"
    }

    fn roles(&self) -> &'static [RoleUse] {
        &[
            RoleUse {
                role: OUTPUT_SCALE,
                suffix: "ia3_l",
                required: false,
                along: Along::Outputs,
            },
            RoleUse {
                role: INPUT_SCALE,
                suffix: "ia3_l",
                required: false,
                along: Along::Others,
            },
        ]
    }

    fn order(&self) -> Order {
        Order::Sequential
    }

    fn check(&self, module: &Module) -> Result<()> {
        if module.parameters.len() != 1 {
            let reason = Reason::RoleMissing {
                role: "scale",
                suffix: "ia3_l".to_owned(),
            };
            return Err(module.error(reason));
        }
        let (_, scale) = &module.parameters[0];
        if scale.shape.iter().filter(|size| **size != 1).count() > 1 {
            let problem = format!(
                "the factors have shape {:?}; one axis was expected",
                scale.shape
            );
            return Err(module.error(Reason::FactorShape { problem }));
        }
        Ok(())
    }

    fn extent(&self, module: &Module) -> Extent {
        Extent {
            outputs: module.get(OUTPUT_SCALE).map(|scale| scale.elements()),
            inputs: module.get(INPUT_SCALE).map(|scale| scale.elements()),
            ..Extent::default()
        }
    }

    fn rank(&self, _module: &Module) -> Option<usize> {
        None
    }

    fn bias(&self, module: &Module) -> BiasUse {
        match module.get(OUTPUT_SCALE) {
            Some(_) => BiasUse::IfPresent,
            None => BiasUse::No,
        }
    }

    fn sum(&self, parts: &[(&Module, f64)]) -> Result<Option<Module>> {
        let [(first, _), ..] = parts else {
            return Ok(None);
        };
        let (role, _) = first.parameters[0];
        // Factors on outputs and on inputs are no factors on one of them.
        if parts.iter().any(|(module, _)| module.get(role).is_none()) {
            return Ok(None);
        }
        let sum = weighted(parts, role, 1.0)?;
        Ok(sum.map(|sum| Module {
            parameters: vec![(role, sum)],
            ..(*first).clone()
        }))
    }

    /// W' = W · (1 + m · (l − 1)), so the inverse multiplies by what that divides by.
    fn inverse(&self, module: &Module, strength: f64) -> Result<Option<(Module, f64)>> {
        let (role, scale) = &module.parameters[0];
        let factors = scale.to_f64()?;
        let inverse = |factor: f64| 1.0 / interpolate(1.0, factor, strength);
        let inverses: Vec<f64> = factors.into_iter().map(inverse).collect();
        if inverses.iter().any(|inverse| !inverse.is_finite()) {
            return Ok(None);
        }
        let bytes = inverses.iter().flat_map(|inverse| inverse.to_le_bytes());
        let scale = scale.holding(DType::F64, scale.shape.clone(), bytes.collect());
        let inverse = Module {
            parameters: vec![(*role, scale)],
            ..module.clone()
        };
        Ok(Some((inverse, 1.0)))
    }

    fn update(&self, module: &Module, on: &Geometry, strength: f64) -> Result<Box<dyn Update>> {
        let (role, scale) = &module.parameters[0];
        let outputs = *role == OUTPUT_SCALE;
        let per_row = outputs == (on.orientation == Orientation::OutputsFirst);
        let elements_per_factor = if outputs || per_row { 1 } else { on.kernel };
        Ok(Box::new(Multiply {
            factors: scale.to_f64()?,
            per_row,
            elements_per_factor,
            columns: on.columns.max(1), // a chunk has a size even where there is none
            strength,
        }))
    }
}

struct Multiply {
    factors: Vec<f64>,
    per_row: bool,
    elements_per_factor: usize,
    columns: usize,
    strength: f64,
}

impl Update for Multiply {
    fn apply(
        &self,
        rows: Range<usize>,
        _base: &[f64],
        value: &mut [f64],
        _workspace: &mut Workspace,
        _kernel: &Kernel,
    ) -> Result<()> {
        for (row, value) in rows.zip(value.chunks_exact_mut(self.columns)) {
            for (column, value) in value.iter_mut().enumerate() {
                let factor = match self.per_row {
                    true => self.factors[row],
                    false => self.factors[column / self.elements_per_factor],
                };
                *value = interpolate(*value, factor * *value, self.strength);
            }
        }
        Ok(())
    }
}
