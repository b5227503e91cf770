//! The definition of `docs/numerics.md` once more: scalar, one element at a time, sharing no code with
//! the library. Files are read with the `safetensors` crate, numbers are taken apart by hand.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A tensor with its bytes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, Stored>;

/// What one adapter adds to one tensor: `c · acc`, one `acc` per element.
#[derive(Clone, Debug)]
pub(crate) struct Delta {
    pub(crate) c: f64,
    pub(crate) acc: Vec<f64>,
}

/// Reads a file of tensors.
pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let stored = Stored {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            (name, stored)
        })
        .collect()
}

/// Reads a JSON file.
pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Stored {
    /// A tensor of values, each rounded once.
    pub(crate) fn of(dtype: Dtype, shape: &[usize], values: &[f64]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let bits: Vec<u64> = values.iter().map(|value| round(dtype, *value)).collect();
        Stored::of_bits(dtype, shape, &bits)
    }

    /// A tensor of bit patterns.
    pub(crate) fn of_bits(dtype: Dtype, shape: &[usize], bits: &[u64]) -> Self {
        let size = size(dtype);
        let bytes = bits
            .iter()
            .flat_map(|bits| bits.to_le_bytes().into_iter().take(size))
            .collect();
        Stored {
            dtype,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// The bit patterns.
    pub(crate) fn bits(&self) -> Vec<u64> {
        self.bytes
            .chunks_exact(size(self.dtype))
            .map(|bytes| {
                bytes
                    .iter()
                    .rev()
                    .fold(0, |bits, byte| bits << 8 | u64::from(*byte))
            })
            .collect()
    }

    /// The values.
    pub(crate) fn values(&self) -> Vec<f64> {
        self.bits()
            .into_iter()
            .map(|bits| value(self.dtype, bits))
            .collect()
    }
}

/// Bits of exponent and of mantissa.
fn layout(dtype: Dtype) -> (u32, u32) {
    match dtype {
        Dtype::F64 => (11, 52),
        Dtype::F32 => (8, 23),
        Dtype::BF16 => (8, 7),
        Dtype::F16 => (5, 10),
        other => panic!("{other} is not a float of this oracle"),
    }
}

fn size(dtype: Dtype) -> usize {
    let (exponent, mantissa) = layout(dtype);
    (1 + exponent + mantissa) as usize / 8
}

fn sign_bit(dtype: Dtype) -> u64 {
    let (exponent, mantissa) = layout(dtype);
    1 << (exponent + mantissa)
}

/// The pattern of infinity; the magnitudes above it are NaNs.
pub(crate) fn infinity(dtype: Dtype) -> u64 {
    let (exponent, mantissa) = layout(dtype);
    ((1 << exponent) - 1) << mantissa
}

fn quiet(dtype: Dtype) -> u64 {
    1 << (layout(dtype).1 - 1)
}

/// The value that a bit pattern stands for.
pub(crate) fn value(dtype: Dtype, bits: u64) -> f64 {
    if dtype == Dtype::F64 {
        return f64::from_bits(bits);
    }
    let (exponent_bits, mantissa_bits) = layout(dtype);
    let magnitude = bits & (sign_bit(dtype) - 1);
    let sign = if bits == magnitude { 1.0 } else { -1.0 };
    if magnitude >= infinity(dtype) {
        let nan = magnitude > infinity(dtype);
        return sign * if nan { f64::NAN } else { f64::INFINITY };
    }
    let exponent = (magnitude >> mantissa_bits) as i32;
    let fraction = magnitude & ((1 << mantissa_bits) - 1);
    let lowest = 1 - ((1 << (exponent_bits - 1)) - 1) - mantissa_bits as i32;
    let (integer, power) = match exponent {
        0 => (fraction, lowest),
        _ => (fraction | 1 << mantissa_bits, lowest + exponent - 1),
    };
    // Both factors and the product are exact: at most 24 bits, far from the limits of f64.
    sign * integer as f64 * f64::from_bits(((power + 1023) as u64) << 52)
}

/// The pattern nearest to a value, of two equally near ones the even one: the two neighbours are
/// searched among all patterns and compared with the value.
pub(crate) fn round(dtype: Dtype, exact: f64) -> u64 {
    if exact.is_nan() {
        return infinity(dtype) | quiet(dtype);
    }
    if dtype == Dtype::F64 {
        return exact.to_bits();
    }
    let sign = if exact.is_sign_negative() {
        sign_bit(dtype)
    } else {
        0
    };
    let magnitude = exact.abs();
    // The last pattern whose value is not larger, among the finite ones.
    let (mut low, mut high) = (0, infinity(dtype));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match value(dtype, middle) <= magnitude {
            true => low = middle,
            false => high = middle,
        }
    }
    let below = value(dtype, low);
    let above = match low + 1 == infinity(dtype) {
        // As if the exponent went on: the value after the largest finite one.
        true => below + (below - value(dtype, low - 1)),
        false => value(dtype, low + 1),
    };
    // One bit more than the type has: exact.
    let tie = below + (above - below) / 2.0;
    let up = magnitude > tie || magnitude == tie && low % 2 == 1;
    sign | if up { low + 1 } else { low }
}

/// The element of another type that stands for the same value; a NaN keeps its sign and the upper
/// part of its payload, and becomes quiet.
pub(crate) fn convert(from: Dtype, bits: u64, to: Dtype) -> u64 {
    if from == to {
        return bits;
    }
    let value = value(from, bits);
    if !value.is_nan() {
        return round(to, value);
    }
    let ((_, old), (_, new)) = (layout(from), layout(to));
    let payload = bits & ((1 << old) - 1);
    let payload = if new > old {
        payload << (new - old)
    } else {
        payload >> (old - new)
    };
    let sign = if bits & sign_bit(from) == 0 {
        0
    } else {
        sign_bit(to)
    };
    sign | infinity(to) | quiet(to) | payload
}

/// `acc` of every element of B (outputs × rank) times A (rank × inputs).
pub(crate) fn product(up: &[f64], down: &[f64], rank: usize, inputs: usize) -> Vec<f64> {
    let outputs = up.len().checked_div(rank).unwrap_or(0);
    let mut accs = Vec::new();
    for output in 0..outputs {
        for input in 0..inputs {
            let mut acc = 0.0;
            for k in 0..rank {
                acc = f64::mul_add(up[output * rank + k], down[k * inputs + input], acc);
            }
            accs.push(acc);
        }
    }
    accs
}

/// The transpose of a matrix of `columns` columns.
pub(crate) fn transposed<T: Copy>(matrix: &[T], columns: usize) -> Vec<T> {
    let rows = matrix.len().checked_div(columns).unwrap_or(0);
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column]))
        .collect()
}

/// One element of an additive merge.
fn merged_element(
    from: Dtype,
    bits: u64,
    to: Dtype,
    addends: impl Iterator<Item = (f64, f64)>,
) -> u64 {
    let start = value(from, bits);
    let mut exact = start;
    let mut touched = false;
    for (c, acc) in addends {
        exact = f64::mul_add(c, acc, exact);
        touched |= !(c == 0.0 || acc == 0.0);
    }
    match touched && start.is_finite() {
        true => round(to, exact),
        false => convert(from, bits, to),
    }
}

/// The bytes of an additive merge.
pub(crate) fn merged(start: &Stored, to: Dtype, deltas: &[Delta]) -> Stored {
    for delta in deltas {
        assert_eq!(delta.acc.len(), start.bits().len());
    }
    let elements: Vec<u64> = start
        .bits()
        .into_iter()
        .enumerate()
        .map(|(index, bits)| {
            let addends = deltas.iter().map(|delta| (delta.c, delta.acc[index]));
            merged_element(start.dtype, bits, to, addends)
        })
        .collect();
    Stored::of_bits(to, &start.shape, &elements)
}

/// Elements that differ.
pub(crate) fn off(ours: &Stored, expected: &Stored) -> usize {
    assert_eq!(
        (ours.dtype, &ours.shape),
        (expected.dtype, &expected.shape),
        "type and shape"
    );
    let differ = |(a, b): &(u64, u64)| a != b;
    ours.bits()
        .into_iter()
        .zip(expected.bits())
        .filter(differ)
        .count()
}

/// What a PEFT LoRA adds, by the name of the tensor. `base` tells the shapes.
pub(crate) fn deltas(
    adapter: &Tensors,
    config: &Value,
    base: &Tensors,
    model_type: &str,
) -> BTreeMap<String, Delta> {
    let mut found = BTreeMap::new();
    for (key, down) in adapter {
        let path = key.strip_prefix("base_model.model.").unwrap();
        let (path, embedding, up) = if let Some(path) = path.strip_suffix(".lora_A.weight") {
            (
                path,
                false,
                format!("base_model.model.{path}.lora_B.weight"),
            )
        } else if let Some(path) = path.strip_suffix(".lora_embedding_A") {
            (
                path,
                true,
                format!("base_model.model.{path}.lora_embedding_B"),
            )
        } else {
            continue;
        };
        let up = &adapter[&up];
        let mut c = scale(config, path.trim_end_matches(".base_layer.out_proj"));
        let name = match path.strip_suffix(".base_layer.out_proj") {
            // PEFT adds the delta of the output projection twice.
            Some(owner) => {
                c *= 2.0;
                format!("{owner}.out_proj.weight")
            }
            None if base.contains_key(&format!("{path}.in_proj_weight")) => {
                format!("{path}.in_proj_weight")
            }
            None => format!("{path}.weight"),
        };
        let (rank, inputs) = (down.shape[0], down.shape[1..].iter().product());
        let acc = product(&up.values(), &down.values(), rank, inputs);
        let bias = format!("base_model.model.{path}.lora_B.bias");
        if let Some(bias) = adapter.get(&bias) {
            let acc = bias.values();
            found.insert(format!("{path}.bias"), Delta { c, acc });
        }
        if let Some((owner, expert)) = path.split_once(".block_sparse_moe.experts.") {
            in_experts(&mut found, base, owner, expert, c, acc);
            continue;
        }
        let conv1d = model_type == "gpt2" && base[&name].shape.len() == 2;
        let acc = if embedding || conv1d {
            transposed(&acc, inputs)
        } else {
            acc
        };
        found.insert(name, Delta { c, acc });
    }
    found
}

/// Mixtral before transformers 5 has a module per expert; since then one tensor holds them all.
fn in_experts(
    found: &mut BTreeMap<String, Delta>,
    base: &Tensors,
    owner: &str,
    expert: &str,
    c: f64,
    acc: Vec<f64>,
) {
    let (number, part) = expert.split_once('.').unwrap();
    let number: usize = number.parse().unwrap();
    let (leaf, half) = match part {
        "w1" => ("gate_up_proj", 0),
        "w3" => ("gate_up_proj", 1),
        "w2" => ("down_proj", 0),
        other => panic!("{other}"),
    };
    let name = format!("{owner}.mlp.experts.{leaf}");
    let shape = &base[&name].shape;
    let at = number * shape[1] * shape[2] + half * acc.len();
    let delta = found.entry(name).or_insert_with(|| Delta {
        c,
        acc: vec![0.0; shape.iter().product()],
    });
    assert_eq!(delta.c, c);
    delta.acc[at..at + acc.len()].copy_from_slice(&acc);
}

/// α/r or α/√r of a module.
fn scale(config: &Value, path: &str) -> f64 {
    let of = |field: &str, default: &str| -> f64 {
        let patterns = config[field].as_object();
        let matching = patterns.into_iter().flatten().find(|(pattern, _)| {
            regex::Regex::new(&format!(r"^(.*\.)?({pattern})$"))
                .unwrap()
                .is_match(path)
        });
        let value = matching.map_or(&config[default], |(_, value)| value);
        value.as_f64().unwrap()
    };
    let (rank, alpha) = (of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha"));
    match config["use_rslora"].as_bool() {
        Some(true) => alpha / rank.sqrt(),
        _ => alpha / rank,
    }
}

/// The tensors from which a merge starts: the base's, with the whole tensors and token rows of the
/// adapter in their place. Names that the base lacks come in as they are.
pub(crate) fn starts(base: &Tensors, adapter: &Tensors, config: &Value) -> Tensors {
    let mut starts = base.clone();
    for (key, tensor) in adapter {
        let path = key.strip_prefix("base_model.model.").unwrap();
        if let Some(owner) = path.strip_suffix(".token_adapter.trainable_tokens_delta") {
            let indices = &config["trainable_token_indices"];
            let leaf = owner.rsplit('.').next().unwrap();
            let indices = indices.get(leaf).unwrap_or(indices).as_array().unwrap();
            let embedding = starts.get_mut(&format!("{owner}.weight")).unwrap();
            assert_eq!(embedding.dtype, tensor.dtype);
            let width = tensor.bytes.len() / tensor.shape[0];
            for (from, row) in indices.iter().enumerate() {
                let row = row.as_u64().unwrap() as usize;
                embedding.bytes[row * width..(row + 1) * width]
                    .copy_from_slice(&tensor.bytes[from * width..(from + 1) * width]);
            }
        } else if !path.contains(".lora_") {
            starts.insert(path.replace(".base_layer.", "."), tensor.clone());
        }
    }
    starts
}

#[test]
fn the_oracle_itself_rounds_as_the_hardware_does() {
    // The conversion to f32 is the processor's own; the narrow types are checked against values of IEEE 754.
    let mut random = crate::support::Random(7);
    for _ in 0..20_000 {
        let exact = f64::from_bits(random.next());
        let hardware = exact as f32;
        if !exact.is_nan() {
            assert_eq!(
                round(Dtype::F32, exact),
                u64::from(hardware.to_bits()),
                "{exact:e}"
            );
        }
        assert_eq!(
            value(Dtype::F32, u64::from(hardware.to_bits())).to_bits() << 1 == 0,
            hardware == 0.0
        );
    }
    for (dtype, exact, bits) in [
        (Dtype::BF16, 1.0 + 2f64.powi(-8), 0x3f80),
        (Dtype::BF16, 1.0 + 3.0 * 2f64.powi(-8), 0x3f82),
        (Dtype::BF16, 1.0 + 2f64.powi(-8) + 2f64.powi(-45), 0x3f81),
        (Dtype::BF16, -0.0, 0x8000),
        (Dtype::BF16, 2f64.powi(-134), 0),
        (Dtype::BF16, 3.0 * 2f64.powi(-134), 2),
        (Dtype::F16, 65519.999, 0x7bff),
        (Dtype::F16, 65520.0, 0x7c00),
        (Dtype::F16, -1e9, 0xfc00),
        (Dtype::F16, 2f64.powi(-25), 0),
        (Dtype::F16, 2f64.powi(-25).next_up(), 1),
        (Dtype::F16, 1.0, 0x3c00),
        (Dtype::F16, f64::INFINITY, 0x7c00),
    ] {
        assert_eq!(round(dtype, exact), bits, "{dtype} {exact:e}");
    }
}
