//! From a module to the rows of a tensor: orientation and shape.

use std::ops::Range;

use crate::adapter::{Extent, Geometry, Layer, Module, Orientation, Part};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Reason, Result};
use crate::json::Value;
use crate::naming::families::Layout;
use crate::naming::{Attention, Place, Rows, families, path};

/// A tensor seen as a matrix, and rows of it that a module owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) rows: Range<usize>,
    pub(super) columns: usize,
    /// The outputs of the module that are these rows; all of them in order if none are named.
    pub(super) outputs: Option<Vec<Range<usize>>>,
}

impl Area {
    /// The areas of a place in a tensor of a shape: one for each run of neighbouring rows.
    pub(super) fn all(
        place: &Place,
        shape: &[usize],
        extent: &Extent,
        attention: Attention,
    ) -> Option<Vec<Self>> {
        if let Rows::Expert { expert, part, of } = place.rows {
            let &[experts, height, columns] = shape else {
                return None;
            };
            if expert >= experts || !height.is_multiple_of(of) {
                return None;
            }
            let start = expert * height + part * (height / of);
            return Some(vec![Area {
                rows: start..start + height / of,
                columns,
                outputs: None,
            }]);
        }
        let [outer, rest @ ..] = shape else {
            return None;
        };
        let columns = rest.iter().product();
        let area = |rows, outputs| Area {
            rows,
            columns,
            outputs,
        };
        if matches!(place.rows, Rows::Whole | Rows::Transposed | Rows::Conv1D) {
            return Some(vec![area(0..*outer, None)]);
        }
        if place.of_module {
            // A bias alone does not tell the inputs; the parts of a layer have those of the whole.
            let inputs = extent.inputs.unwrap_or(columns);
            let outputs = place.rows.ranges(extent.outputs?, inputs, attention)?;
            return Some(vec![area(0..*outer, Some(outputs))]);
        }
        let mut output = 0;
        let mut runs: Vec<(Range<usize>, Range<usize>)> = Vec::new();
        for rows in place.rows.ranges(*outer, columns, attention)? {
            let end = output + rows.len();
            runs.push((rows, output..end));
            output = end;
        }
        runs.sort_by_key(|(rows, _)| rows.start);
        let mut areas: Vec<Area> = Vec::new();
        for (rows, outputs) in runs {
            match areas.last_mut() {
                Some(Area {
                    rows: last,
                    outputs: Some(taken),
                    ..
                }) if last.end == rows.start => {
                    last.end = rows.end;
                    taken.push(outputs);
                }
                _ => areas.push(area(rows, Some(vec![outputs]))),
            }
        }
        match areas.as_mut_slice() {
            [only] if matches!(only.outputs.as_deref(), Some([all]) if *all == (0..output)) => {
                only.outputs = None;
            }
            _ => {}
        }
        Some(areas)
    }
}

/// llama.cpp's architecture of a base, from its metadata or its configuration.
pub(crate) fn architecture(base: &Checkpoint) -> Option<String> {
    let stated = stated(base, "general.architecture").map(str::to_owned);
    stated.or_else(|| {
        let model_type = base.configured("model_type").and_then(Value::as_str)?;
        Some(families::architecture(model_type).to_owned())
    })
}

/// The layout of a base's names, where it is that of one tool.
pub(crate) fn layout(base: &Checkpoint) -> Option<Layout> {
    stated(base, "general.architecture").map(|_| Layout::Gguf)
}

/// What the metadata of a base's first file say.
fn stated<'a>(base: &'a Checkpoint, key: &str) -> Option<&'a str> {
    let metadata = &base.shards.first()?.file.directory.metadata;
    let found = metadata.iter().find(|(name, _)| name == key);
    found.map(|(_, value)| value.as_str())
}

/// The heads of the base's attention, as far as its metadata or its configuration tell.
pub(crate) fn attention(base: &Checkpoint) -> Attention {
    let count = |names: &[&str], key: &str| {
        if let Some(architecture) = stated(base, "general.architecture") {
            return stated(base, &format!("{architecture}.attention.{key}"))?
                .parse()
                .ok();
        }
        let value = names.iter().find_map(|name| base.configured(name))?;
        match value {
            Value::Integer(count) => usize::try_from(*count).ok(),
            _ => None,
        }
    };
    // Falcon's `num_kv_heads` holds for its new decoder alone (transformers, `FalconAttention`).
    let is_set = |name: &str| matches!(base.configured(name), Some(Value::Bool(true)));
    let one_key = (is_set("multi_query") && !is_set("new_decoder_architecture")).then_some(1);
    Attention {
        query: count(
            &["num_attention_heads", "n_head", "num_heads", "n_heads"],
            "head_count",
        ),
        key: one_key.or_else(|| {
            count(
                &["num_key_value_heads", "num_kv_heads", "n_kv_heads"],
                "head_count_kv",
            )
        }),
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
    rows_of: Rows,
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
    let orientation = match rows_of {
        Rows::Transposed => inputs_first.then_some(Orientation::InputsFirst),
        // What is as one of the two is stored would have to be transposed.
        Rows::Conv1D if stores_inputs_first(base, tensor) => {
            inputs_first.then_some(Orientation::InputsFirst)
        }
        Rows::Conv1D => (outputs_first && !extent.as_stored).then_some(Orientation::OutputsFirst),
        _ if module.layer == Layer::Embedding => inputs_first.then_some(Orientation::InputsFirst),
        _ => match (outputs_first, inputs_first) {
            (true, false) => Some(Orientation::OutputsFirst),
            (_, true) if stores_inputs_first(base, tensor) => Some(Orientation::InputsFirst),
            (true, true) => Some(Orientation::OutputsFirst),
            _ => None,
        },
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
pub(crate) fn stores_inputs_first(base: &Checkpoint, tensor: &str) -> bool {
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
