//! Tensors that no method is fitted to: their new values, or what has to be added.

use std::sync::Arc;

use super::pairs::{Pair, What};
use crate::adapter::fit::{Difference, Stored};
use crate::adapter::{Layer, Module, Replacement, ReplacementKind, Scale};
use crate::error::Result;
use crate::linalg::truncated::Blocks;
use crate::methods::METHODS;
use crate::naming::Spelling;
use crate::tensor::{Float, Tensor, narrowed};

/// The new value.
pub(super) fn value(pair: &Pair) -> Replacement {
    Replacement {
        name: pair.name(),
        tensor: pair.tuned.clone(),
        kind: match pair.what {
            What::Bias => ReplacementKind::Bias,
            _ => ReplacementKind::Module,
        },
    }
}

/// Modules of a method that adds whole differences; weight and bias of a layer are one.
pub(super) fn differences(pairs: &[&Pair], dtype: Float) -> Result<Vec<Module>> {
    let mut layers: Vec<(&Pair, Option<Tensor>, Option<Tensor>)> = Vec::new();
    for pair in pairs.iter().filter(|pair| !pair.grown) {
        let tensor = Some(difference(pair, dtype));
        let known = layers
            .iter_mut()
            .find(|(first, ..)| first.path == pair.path);
        match (known, pair.parameter == "bias") {
            (Some((_, _, bias)), true) => *bias = tensor,
            (Some((_, weight, _)), false) => *weight = tensor,
            (None, true) => layers.push((pair, None, tensor)),
            (None, false) => layers.push((pair, tensor, None)),
        }
    }
    let mut modules = Vec::new();
    for (pair, weight, bias) in layers {
        let said = METHODS.iter().find_map(|method| {
            let parameters = method.of_difference(weight.clone(), bias.clone())?;
            Some((*method, parameters))
        });
        if let Some((method, parameters)) = said {
            let module = Module::new(
                pair.path.clone(),
                method,
                parameters,
                Scale::ONE,
                Layer::Dense,
            )?;
            modules.push(match pair.in_part {
                true => module.spelled(Spelling::InComponent),
                false => module,
            });
        }
    }
    Ok(modules)
}

/// Tuned − base, rounded once.
fn difference(pair: &Pair, dtype: Float) -> Tensor {
    let (base, tuned) = (pair.base.clone(), pair.tuned.clone());
    let made = move || {
        let sides = (Stored::new(&base)?, Stored::new(&tuned)?);
        let mut values = vec![0.0; tuned.elements()];
        let difference = Difference {
            base: &sides.0,
            tuned: &sides.1,
        };
        difference.fill(0..difference.rows(), &mut values)?;
        narrowed(dtype, &values).map_err(|e| e.in_file(tuned.input.path()).on(&*tuned.name))
    };
    pair.tuned
        .derived(dtype.dtype(), pair.tuned.shape.clone(), Arc::new(made))
}
