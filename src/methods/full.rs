//! Whole differences: W' = W + m · D, and the same for the bias. Nothing scales them but the strength.
//!
//! LyCORIS, `lycoris/modules/full.py` (`diff`, `diff_b`) and `norms.py` (`w_norm`, `b_norm`); ComfyUI,
//! `comfy/lora.py`. Either part may be there without the other.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::factor::Factor;
use crate::adapter::{
    Along, BiasUse, Extent, Geometry, Method, Module, Order, Part, Role, RoleUse, Update, Workspace,
};
use crate::error::{Reason, Result};
use crate::linalg::Kernel;
use crate::tensor::{DType, Tensor};

/// D, in the shape of the weight.
pub const DIFFERENCE: Role = Role::new("difference");

/// What is added to the bias.
pub const BIAS_DIFFERENCE: Role = Role::new("bias difference");

/// The method.
pub static FULL: Full = Full;

/// Differences of whole weights and biases.
#[derive(Debug)]
pub struct Full;

impl Method for Full {
    fn name(&self) -> &'static str {
        "full difference"
    }

    fn roles(&self) -> &'static [RoleUse] {
        &[
            RoleUse {
                role: DIFFERENCE,
                suffix: "diff",
                required: false,
                along: Along::Outputs,
            },
            RoleUse {
                role: BIAS_DIFFERENCE,
                suffix: "diff_b",
                required: false,
                along: Along::Outputs,
            },
        ]
    }

    fn order(&self) -> Order {
        Order::Additive
    }

    fn check(&self, module: &Module) -> Result<()> {
        let fail = |problem: String| Err(module.error(Reason::FactorShape { problem }));
        let (difference, bias) = (module.get(DIFFERENCE), module.get(BIAS_DIFFERENCE));
        match (difference, bias) {
            (None, None) => Err(module.error(Reason::RoleMissing {
                role: DIFFERENCE.name(),
                suffix: "diff".to_owned(),
            })),
            (Some(difference), _) if difference.shape.is_empty() => {
                fail("the difference has no axis".to_owned())
            }
            (_, Some(bias)) if bias.shape.len() != 1 => fail(format!(
                "the bias difference has shape {:?}; one axis was expected",
                bias.shape
            )),
            (Some(difference), Some(bias)) if difference.dimension(0) != bias.elements() => {
                fail(format!(
                    "the difference has shape {:?}, the bias difference {:?}",
                    difference.shape, bias.shape
                ))
            }
            _ => Ok(()),
        }
    }

    fn extent(&self, module: &Module) -> Extent {
        let difference = module.get(DIFFERENCE);
        let outputs = difference.or(module.get(BIAS_DIFFERENCE));
        Extent {
            outputs: outputs.map(|tensor| tensor.dimension(0)),
            inputs: difference.map(|difference| difference.shape[1..].iter().product()),
            with_kernel: true,
            as_stored: true,
        }
    }

    fn rank(&self, _module: &Module) -> Option<usize> {
        None
    }

    fn weight(&self, module: &Module) -> bool {
        module.get(DIFFERENCE).is_some()
    }

    fn bias(&self, module: &Module) -> BiasUse {
        match module.get(BIAS_DIFFERENCE) {
            Some(_) => BiasUse::Required,
            None => BiasUse::No,
        }
    }

    fn of_difference(
        &self,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
    ) -> Option<Vec<(Role, Tensor)>> {
        let weight = weight.map(|tensor| (DIFFERENCE, tensor));
        let bias = bias.map(|tensor| (BIAS_DIFFERENCE, tensor));
        Some(weight.into_iter().chain(bias).collect())
    }

    fn shape(&self, module: &Module) -> Option<Vec<usize>> {
        Some(module.get(DIFFERENCE)?.shape.clone())
    }

    fn sum(&self, parts: &[(&Module, f64)]) -> Result<Option<Module>> {
        let [(first, _), ..] = parts else {
            return Ok(None);
        };
        let mut parameters = Vec::new();
        for role in [DIFFERENCE, BIAS_DIFFERENCE] {
            if let Some(sum) = weighted(parts, role, 0.0)? {
                parameters.push((role, sum));
            }
        }
        Ok(Some(Module {
            parameters,
            ..(*first).clone()
        }))
    }

    fn update(&self, module: &Module, on: &Geometry, strength: f64) -> Result<Box<dyn Update>> {
        let tensor = match on.part {
            Part::Weight => module.require(DIFFERENCE)?,
            Part::Bias => module.require(BIAS_DIFFERENCE)?,
        };
        Ok(Box::new(Add {
            difference: Factor::new(tensor, on.rows)?,
            strength,
        }))
    }
}

/// `origin + Σ factor · (parameter − origin)` in f64 over the parts that have a role; nothing where none has. What is
/// taken once stays as it is.
pub(super) fn weighted(
    parts: &[(&Module, f64)],
    role: Role,
    origin: f64,
) -> Result<Option<Tensor>> {
    let mut terms: Vec<(Tensor, f64)> = Vec::new();
    for (module, factor) in parts {
        let Some(tensor) = module.get(role) else {
            continue;
        };
        if terms
            .iter()
            .any(|(term, _)| term.elements() != tensor.elements())
        {
            let (a, b) = (&terms[0].0.shape, &tensor.shape);
            let problem = format!(
                "the {} of the parts have shapes {a:?} and {b:?}",
                role.name()
            );
            return Err(module.error(Reason::FactorShape { problem }));
        }
        terms.push((tensor.clone(), *factor));
    }
    let first = match terms.as_slice() {
        [] => return Ok(None),
        [(only, 1.0)] => return Ok(Some(only.clone())),
        [(first, _), ..] => first.clone(),
    };
    let shape = first.shape.clone();
    let made = move || {
        let mut sums = vec![0.0; terms[0].0.elements()];
        for (tensor, factor) in &terms {
            for (sum, value) in sums.iter_mut().zip(tensor.to_f64()?) {
                *sum = factor.mul_add(value - origin, *sum);
            }
        }
        Ok(sums
            .iter()
            .flat_map(|sum| (origin + sum).to_le_bytes())
            .collect())
    };
    Ok(Some(first.derived(DType::F64, shape, Arc::new(made))))
}

/// `value[i,j] = fma(m, D[i,j], value[i,j])`.
pub(super) struct Add {
    pub(super) difference: Factor,
    pub(super) strength: f64,
}

impl Update for Add {
    fn apply(
        &self,
        rows: Range<usize>,
        _base: &[f64],
        value: &mut [f64],
        _workspace: &mut Workspace,
        _kernel: &Kernel,
    ) -> Result<()> {
        let difference = self.difference.block(rows, 0..self.difference.columns())?;
        for (value, difference) in value.iter_mut().zip(&difference) {
            *value = self.strength.mul_add(*difference, *value);
        }
        Ok(())
    }

    fn chain(&self, row: usize, column: usize) -> Result<f64> {
        let difference = self.difference.block(row..row + 1, column..column + 1)?;
        Ok(difference[(0, 0)])
    }

    fn multiplier(&self) -> Option<f64> {
        Some(self.strength)
    }

    fn chains(&self, rows: Range<usize>, chains: &mut [f64], _kernel: &Kernel) -> Result<()> {
        let difference = self.difference.block(rows, 0..self.difference.columns())?;
        for (chain, difference) in chains.iter_mut().zip(&difference) {
            *chain = *difference;
        }
        Ok(())
    }
}
