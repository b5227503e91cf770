//! LoRA: ΔW = scale · B · A.
//!
//! Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; as PEFT computes it
//! (`peft/tuners/lora/layer.py`, `get_delta_weight`). Convolutions: A is r × in × kernel, B is
//! out × r × 1…, so that A flattened to r × (in · kernel) gives the flattened weight.
//!
//! With a core (LoCon of LyCORIS, "Tucker" or CP: `lycoris/modules/locon.py`, `functional/general.py`):
//! `ΔW[o,i,·] = scale · Σ_p B[o,p] · Σ_q M[p,q,·] · A[q,i]`. The inner sum is taken first, in f64, and the
//! result takes the place of A.
//! Not here: grouped convolutions.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::factor::{Factor, Product};
use crate::adapter::{
    BiasUse, Extent, Geometry, Method, Module, Order, Orientation, Part, Role, RoleUse, Update,
    Workspace,
};
use crate::error::{Reason, Result};
use crate::linalg::Kernel;
use crate::tensor::{DType, Tensor};

/// A, r × in (× kernel): maps inputs to the rank.
pub const DOWN: Role = Role::new("down");

/// B, out × r (× 1…): maps the rank to outputs.
pub const UP: Role = Role::new("up");

/// M, r × r × kernel: the core between A and B of a convolution.
pub const MID: Role = Role::new("mid");

/// What is added to the bias, one value per output.
pub const BIAS: Role = Role::new("bias");

/// The method.
pub static LORA: Lora = Lora;

/// LoRA on Linear, Conv1D, convolutions and embeddings.
#[derive(Debug)]
pub struct Lora;

impl Method for Lora {
    fn name(&self) -> &'static str {
        "LoRA"
    }

    fn roles(&self) -> &'static [RoleUse] {
        &[
            RoleUse {
                role: DOWN,
                suffix: "lora_down.weight",
                required: true,
            },
            RoleUse {
                role: UP,
                suffix: "lora_up.weight",
                required: true,
            },
            RoleUse {
                role: BIAS,
                suffix: "lora_up.bias",
                required: false,
            },
            RoleUse {
                role: MID,
                suffix: "lora_mid.weight",
                required: false,
            },
        ]
    }

    fn order(&self) -> Order {
        Order::Additive
    }

    fn check(&self, module: &Module) -> Result<()> {
        check_factors(module)
    }

    fn extent(&self, module: &Module) -> Extent {
        extent_of_factors(module)
    }

    fn rank(&self, module: &Module) -> Option<usize> {
        rank_of_factors(module)
    }

    fn bias(&self, module: &Module) -> BiasUse {
        match module.get(BIAS) {
            Some(_) => BiasUse::Required,
            None => BiasUse::No,
        }
    }

    fn is_transpose(&self, module: &Module, other: &Module) -> Result<bool> {
        let equal = |a: Role, b: Role| -> Result<bool> {
            let (a, b) = (module.factor(a)?, other.factor(b)?.t());
            if (a.rows(), a.columns()) != (b.rows(), b.columns()) {
                return Ok(false);
            }
            let all = |factor: &Factor| factor.block(0..factor.rows(), 0..factor.columns());
            Ok(all(&a)? == all(&b)?)
        };
        Ok(module.parameters.len() == 2 && equal(DOWN, UP)? && equal(UP, DOWN)?)
    }

    fn update(&self, module: &Module, on: &Geometry, strength: f64) -> Result<Box<dyn Update>> {
        let c = strength * module.scale.value;
        Ok(Box::new(Sum(match on.part {
            Part::Weight => product(module, on.orientation, c)?,
            Part::Bias => {
                // acc = fma(bias, 1, +0): the bias itself, as a chain of one link.
                let bias = Factor::new(module.require(BIAS)?, 1)?;
                Product::of_row(bias, c)?
            }
        })))
    }
}

/// Checks A (r × in × kernel…) against B (out × r × 1…).
pub(super) fn check_factors(module: &Module) -> Result<()> {
    let (module_down, module_up) = (module.require(DOWN)?, module.require(UP)?);
    let shape = |role| module.shape(role).unwrap_or_default();
    let (down, up) = (shape(DOWN), shape(UP));
    let fail = |problem: String| Err(module.error(Reason::FactorShape { problem }));
    if down.len() < 2 || up.len() < 2 {
        return fail(format!(
            "the factors have shapes {down:?} and {up:?}; a factor of one axis is a leftover of sharded training, not an adapter",
        ));
    }
    if let Some(mid) = module.get(MID) {
        check_core(module, module_down, mid, module_up)?;
    } else if down[0] != up[1] {
        return fail(format!(
            "the down factor {:?} has rank {}, the up factor {:?} has rank {}",
            module_down.shape, down[0], module_up.shape, up[1]
        ));
    }
    if up[2..].iter().any(|size| *size != 1) {
        return fail(format!("the up factor {up:?} has a kernel of its own"));
    }
    if let Some(bias) = module.get(BIAS)
        && bias.shape != [up[0]]
    {
        return fail(format!(
            "the bias has shape {:?}, the outputs are {}",
            bias.shape, up[0]
        ));
    }
    Ok(())
}

/// Most elements of A with the core folded into it: 1 GiB in f64.
const FOLDED_LIMIT: usize = 1 << 27;

/// Checks A (r × in × 1…) and M (r × r × kernel…) against each other and B.
fn check_core(module: &Module, down: &Tensor, mid: &Tensor, up: &Tensor) -> Result<()> {
    let fits = mid.shape.len() >= 2
        && mid.dimension(0) == up.dimension(1)
        && mid.dimension(1) == down.dimension(0)
        && down.shape[2..].iter().all(|size| *size == 1);
    if !fits {
        let problem = format!(
            "the factors have shapes {:?}, {:?} and {:?}, which do not go together",
            down.shape, mid.shape, up.shape
        );
        return Err(module.error(Reason::FactorShape { problem }));
    }
    let kernel: usize = mid.shape[2..].iter().product();
    let columns = down.dimension(1).checked_mul(kernel);
    match columns.and_then(|columns| columns.checked_mul(mid.dimension(0))) {
        Some(elements) if elements <= FOLDED_LIMIT => Ok(()),
        _ => Err(module.error(Reason::TooMany {
            what: "elements in the product of down and mid",
            limit: FOLDED_LIMIT,
        })),
    }
}

/// `C[p, (i,k)] = Σ_q M[p,q,k] · A[q,i]`, each a chain of fused multiply-adds in the order of q.
fn folded(down: &Tensor, mid: &Tensor) -> Result<Tensor> {
    let (outer, inner, inputs) = (mid.dimension(0), mid.dimension(1), down.dimension(1));
    let kernel: usize = mid.shape[2..].iter().product();
    let (core, factor) = (mid.to_f64()?, down.to_f64()?);
    let mut bytes = Vec::with_capacity(outer * inputs * kernel * 8);
    for p in 0..outer {
        for i in 0..inputs {
            for k in 0..kernel {
                let chain = (0..inner).fold(0.0, |acc, q| {
                    core[(p * inner + q) * kernel + k].mul_add(factor[q * inputs + i], acc)
                });
                bytes.extend_from_slice(&f64::to_le_bytes(chain));
            }
        }
    }
    Ok(Tensor {
        name: down.name.clone(),
        dtype: DType::F64,
        shape: vec![outer, inputs * kernel],
        input: down.input.clone(),
        offset: 0,
        length: bytes.len() as u64,
        memory: Some(Arc::from(bytes)),
        blocks: None,
    })
}

pub(super) fn rank_of_factors(module: &Module) -> Option<usize> {
    module.shape(DOWN)?.first().copied()
}

/// Input features, without the kernel of a convolution.
pub(super) fn inputs_of_down(module: &Module) -> usize {
    module
        .shape(DOWN)
        .and_then(|down| down.get(1).copied())
        .unwrap_or(0)
}

pub(super) fn extent_of_factors(module: &Module) -> Extent {
    let core: usize = module
        .get(MID)
        .map_or(1, |mid| mid.shape[2..].iter().product());
    let inputs = module
        .shape(DOWN)
        .map(|down| down[1..].iter().product::<usize>() * core);
    let outputs = module.shape(UP).map(|up| up[0]);
    Extent {
        outputs,
        inputs,
        with_kernel: true,
        ..Extent::default()
    }
}

/// B · A as rows × columns of the stored matrix.
pub(super) fn product(module: &Module, orientation: Orientation, c: f64) -> Result<Product> {
    let (down, up) = (module.factor(DOWN)?, module.factor(UP)?);
    let down = match module.get(MID) {
        Some(mid) => Factor::new(&folded(module.require(DOWN)?, mid)?, mid.dimension(0))?,
        None => down,
    };
    match orientation {
        Orientation::OutputsFirst => Product::new(up, down, c),
        Orientation::InputsFirst => Product::new(down.t(), up.t(), c),
    }
}

/// Adds a product.
struct Sum(Product);

impl Update for Sum {
    fn apply(
        &self,
        rows: Range<usize>,
        _base: &[f64],
        value: &mut [f64],
        _workspace: &mut Workspace,
        kernel: &Kernel,
    ) -> Result<()> {
        self.0.add(rows, value, kernel)
    }

    fn touches(&self, row: usize, column: usize) -> Result<bool> {
        self.0.touches(row, column)
    }
}
