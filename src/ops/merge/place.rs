//! From a module to the rows of a tensor: orientation and shape.

use std::ops::Range;

use crate::adapter::{Extent, Geometry, Layer, Module, Orientation, Part};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Reason, Result};
use crate::json::Value;
use crate::naming::{Rows, path};

/// A tensor seen as a matrix, and the rows of it that a module owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) rows: Range<usize>,
    pub(super) columns: usize,
}

impl Area {
    /// The area of a place in a tensor of a shape.
    pub(super) fn of(rows: Rows, shape: &[usize]) -> Option<Self> {
        match (rows, shape) {
            (Rows::All, [outer, rest @ ..]) => Some(Area {
                rows: 0..*outer,
                columns: rest.iter().product(),
            }),
            (Rows::Expert { expert, part, of }, &[experts, height, columns])
                if expert < experts && height % of == 0 =>
            {
                let part_height = height / of;
                let start = expert * height + part * part_height;
                Some(Area {
                    rows: start..start + part_height,
                    columns,
                })
            }
            _ => None,
        }
    }
}

/// Finds out how a module lies on a weight of the base.
///
/// # Errors
/// [`Reason::Shape`], [`Reason::GroupedConvolution`].
pub(super) fn on_weight(
    base: &Checkpoint,
    module: &Module,
    tensor: &str,
    shape: &[usize],
    area: &Area,
) -> Result<Geometry> {
    let extent = module.method.extent(module);
    let (rows, columns) = (area.rows.len(), area.columns);
    let kernel: usize = if shape.len() > 2 && area.rows.len() == shape[0] {
        shape[2..].iter().product()
    } else {
        1
    };
    let geometry = |orientation| Geometry {
        part: Part::Weight,
        rows,
        columns,
        orientation,
        kernel,
    };
    let channels = columns.checked_div(kernel).unwrap_or(0);
    let outputs_first = (shape.len() >= 2 || extent.as_stored)
        && fits(extent.outputs, rows)
        && fits(
            extent.inputs,
            if extent.with_kernel {
                columns
            } else {
                channels
            },
        );
    let inputs_first = shape.len() == 2
        && !extent.as_stored
        && fits(extent.outputs, columns)
        && fits(extent.inputs, rows);
    let orientation = if module.layer == Layer::Embedding {
        inputs_first.then_some(Orientation::InputsFirst)
    } else {
        match (outputs_first, inputs_first) {
            (true, false) => Some(Orientation::OutputsFirst),
            (_, true) if stores_inputs_first(base, tensor) => Some(Orientation::InputsFirst),
            (true, true) => Some(Orientation::OutputsFirst),
            _ => None,
        }
    };
    orientation
        .map(geometry)
        .ok_or_else(|| mismatch(module, &extent, shape, kernel))
}

fn fits(wanted: Option<usize>, found: usize) -> bool {
    wanted.is_none_or(|wanted| wanted == found)
}

fn mismatch(module: &Module, extent: &Extent, shape: &[usize], kernel: usize) -> Error {
    if let (Some(inputs), [_, channels, _, ..]) = (extent.inputs, shape)
        && extent.with_kernel
        && kernel > 0
        && inputs % kernel == 0
        && inputs / kernel > *channels
        && (inputs / kernel).is_multiple_of(*channels)
    {
        let reason = Reason::GroupedConvolution {
            adapter: inputs / kernel,
            base: *channels,
        };
        return module.error(reason);
    }
    let side = |size: Option<usize>| size.map_or("?".to_owned(), |size| size.to_string());
    let adapter = format!(
        "{} outputs and {} inputs",
        side(extent.outputs),
        side(extent.inputs)
    );
    module.error(Reason::Shape {
        adapter,
        base: format!("shape {shape:?}"),
    })
}

/// Whether stacked experts are stored outputs first, as single experts are.
///
/// gpt-oss and Llama 4 stack [experts, inputs, outputs], and interleave gate and up: an adapter for a
/// single expert does not lie in slices there. With square experts only the sibling tells.
pub(super) fn stacks_outputs_first(base: &Checkpoint, tensor: &str) -> bool {
    let sibling = |name: &str| base.tensor(name).map(|tensor| tensor.shape.clone());
    let (up, down) = match tensor.strip_suffix("gate_up_proj") {
        Some(owner) => (sibling(tensor), sibling(&format!("{owner}down_proj"))),
        None => {
            let owner = tensor.strip_suffix("down_proj").unwrap_or(tensor);
            (sibling(&format!("{owner}gate_up_proj")), sibling(tensor))
        }
    };
    match (up.as_deref(), down.as_deref()) {
        (Some([_, up_rows, up_columns]), Some([_, down_rows, down_columns])) => {
            *up_rows == 2 * down_columns && up_columns == down_rows
        }
        _ => true,
    }
}

/// Model types whose dense layers are GPT-2's Conv1D, stored input first
/// (`huggingface/transformers`, uses of `pytorch_utils.Conv1D`).
const CONV1D_MODELS: &[&str] = &[
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "gpt-sw3",
    "ctrl",
];

/// Names of Conv1D layers.
const CONV1D_LEAVES: &[&str] = &["c_attn", "c_proj", "c_fc", "q_attn"];

/// Whether a weight is GPT-2's Conv1D. PEFT's `fan_in_fan_out` is not asked: PEFT itself overrides it.
fn stores_inputs_first(base: &Checkpoint, tensor: &str) -> bool {
    let owner = tensor.strip_suffix(".weight").unwrap_or(tensor);
    if !CONV1D_LEAVES.contains(&path::leaf(owner)) {
        return false;
    }
    match base.configured("model_type").and_then(Value::as_str) {
        Some(model) => CONV1D_MODELS.contains(&model),
        // Without a configuration the shapes of its siblings tell: the first layer of the MLP widens.
        None => base
            .tensors()
            .filter(|tensor| tensor.shape.len() == 2)
            .find_map(|tensor| match tensor.shape[..] {
                [first, second] if tensor.name.ends_with("c_fc.weight") && first != second => {
                    Some(second > first)
                }
                [first, second]
                    if tensor.name.ends_with("attn.c_attn.weight") && first != second =>
                {
                    Some(second > first)
                }
                _ => None,
            })
            .unwrap_or(false),
    }
}
