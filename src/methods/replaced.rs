//! Replaced weights: W' = V, whatever the strength.
//!
//! ComfyUI, `comfy/lora.py` (`set_weight`), which BFL's control adapters are read as.

use std::ops::Range;

use crate::adapter::factor::Factor;
use crate::adapter::{
    Along, BiasUse, Extent, Geometry, Method, Module, Order, Role, RoleUse, Update, Workspace,
};
use crate::error::{Reason, Result};
use crate::linalg::Kernel;

/// V, in the shape of the weight.
pub const VALUE: Role = Role::new("value");

/// The method.
pub static REPLACED: Replaced = Replaced;

/// Weights that take the place of the base's.
#[derive(Debug)]
pub struct Replaced;

impl Method for Replaced {
    fn name(&self) -> &'static str {
        "replaced weight"
    }

    fn roles(&self) -> &'static [RoleUse] {
        &[RoleUse {
            role: VALUE,
            suffix: "set_weight",
            required: true,
            along: Along::Outputs,
        }]
    }

    fn order(&self) -> Order {
        Order::Sequential
    }

    fn ignores_strength(&self) -> bool {
        true
    }

    fn check(&self, module: &Module) -> Result<()> {
        match module.require(VALUE)?.shape.is_empty() {
            false => Ok(()),
            true => {
                let problem = "the value has no axis".to_owned();
                Err(module.error(Reason::FactorShape { problem }))
            }
        }
    }

    fn extent(&self, module: &Module) -> Extent {
        let value = module.get(VALUE);
        Extent {
            outputs: value.map(|value| value.dimension(0)),
            inputs: value.map(|value| value.shape.iter().skip(1).product()),
            with_kernel: true,
            as_stored: true,
        }
    }

    fn rank(&self, _module: &Module) -> Option<usize> {
        None
    }

    fn bias(&self, _module: &Module) -> BiasUse {
        BiasUse::No
    }

    fn update(&self, module: &Module, on: &Geometry, _strength: f64) -> Result<Box<dyn Update>> {
        let value = Factor::new(module.require(VALUE)?, on.rows)?;
        Ok(Box::new(Set { value }))
    }
}

/// `value[i,j] = V[i,j]`.
struct Set {
    value: Factor,
}

impl Update for Set {
    fn apply(
        &self,
        rows: Range<usize>,
        _base: &[f64],
        value: &mut [f64],
        _workspace: &mut Workspace,
        _kernel: &Kernel,
    ) -> Result<()> {
        let new = self.value.block(rows, 0..self.value.columns())?;
        for (value, new) in value.iter_mut().zip(&new) {
            *value = *new;
        }
        Ok(())
    }

    fn touches(&self, _row: usize, _column: usize) -> Result<bool> {
        Ok(true)
    }
}
