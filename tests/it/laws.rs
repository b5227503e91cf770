//! What must hold for any input: strength, zero adapters, several adapters, DoRA and IA3.

use std::path::Path;

use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::oracle::{self, Delta, Stored};
use crate::support::{Random, merge, options, selection, write_adapter, write_base};

const FLOATS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16];

fn few() -> ProptestConfig {
    ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// A folder with a base and adapters, and what merging gives.
struct Bench {
    folder: tempfile::TempDir,
    adapters: usize,
    runs: usize,
}

impl Bench {
    fn new(config: Option<&Value>, base: &[(&str, Stored)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_base(&folder.path().join("base"), config, base);
        Bench {
            folder,
            adapters: 0,
            runs: 0,
        }
    }

    /// Writes an adapter; its number is how many there were before.
    fn adapter(&mut self, config: &Value, tensors: &[(&str, Stored)]) -> usize {
        let path = self.folder.path().join(format!("adapter{}", self.adapters));
        write_adapter(&path, config, tensors);
        self.adapters += 1;
        self.adapters - 1
    }

    fn merge_into(&mut self, base: &Path, order: &[(usize, f64)]) -> std::path::PathBuf {
        let output = self.folder.path().join(format!("out{}", self.runs));
        self.runs += 1;
        let mut options = options(base, Path::new(""), &output);
        options.adapters = order
            .iter()
            .map(|(number, strength)| {
                selection(
                    &self.folder.path().join(format!("adapter{number}")),
                    *strength,
                )
            })
            .collect();
        merge(&options).unwrap();
        output
    }

    fn merge(&mut self, order: &[(usize, f64)]) -> oracle::Tensors {
        let base = self.folder.path().join("base");
        oracle::read(&self.merge_into(&base, order).join("model.safetensors"))
    }
}

fn lora(rank: usize, alpha: f64) -> Value {
    json!({"peft_type": "LORA", "r": rank, "lora_alpha": alpha})
}

fn dora(rank: usize, alpha: f64) -> Value {
    json!({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_dora": true})
}

fn random_tensor(random: &mut Random, dtype: Dtype, shape: &[usize]) -> Stored {
    let values = random.floats(shape.iter().product());
    Stored::of(dtype, shape, &values)
}

/// Any bits at all: zeros of both signs, subnormals, infinities, NaNs.
fn any_bits(random: &mut Random, dtype: Dtype, shape: &[usize]) -> Stored {
    let bits: Vec<u64> = (0..shape.iter().product())
        .map(|_| {
            let sign = 1u64 << (dtype.bitsize() - 1);
            match random.below(8) {
                0 => 0,
                1 => sign,
                2 => oracle::infinity(dtype) | 1,
                _ => random.next() >> (64 - dtype.bitsize()),
            }
        })
        .collect();
    Stored::of_bits(dtype, shape, &bits)
}

fn assert_same(ours: &Stored, expected: &Stored) {
    assert_eq!(oracle::off(ours, expected), 0, "elements differ");
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn strength_zero_gives_the_base_bit_for_bit(
        seed: u64, rows in 1usize..9, columns in 1usize..20, rank in 1usize..5, float in 0usize..4,
    ) {
        let mut random = Random(seed);
        let base = any_bits(&mut random, FLOATS[float], &[rows, columns]);
        let bias = any_bits(&mut random, FLOATS[float], &[rows]);
        let down = random_tensor(&mut random, Dtype::F32, &[rank, columns]);
        let up = random_tensor(&mut random, Dtype::F32, &[rows, rank]);
        let magnitude = random_tensor(&mut random, Dtype::F32, &[rows]);
        let mut bench = Bench::new(None, &[("m.weight", base.clone()), ("m.bias", bias.clone())]);
        let factors = [("base_model.model.m.lora_A.weight", down), ("base_model.model.m.lora_B.weight", up)];
        bench.adapter(&lora(rank, 2.0), &factors);
        let with_norm = [
            factors[0].clone(),
            factors[1].clone(),
            ("base_model.model.m.lora_magnitude_vector", magnitude),
        ];
        bench.adapter(&dora(rank, 2.0), &with_norm);
        let scales = random_tensor(&mut random, Dtype::F32, &[rows, 1]);
        bench.adapter(&json!({"peft_type": "IA3"}), &[("base_model.model.m.ia3_l", scales)]);
        for order in [&[(0, 0.0)][..], &[(1, 0.0)], &[(2, -0.0)], &[(0, 0.0), (1, 0.0), (2, 0.0)]] {
            let merged = bench.merge(order);
            prop_assert_eq!(&merged["m.weight"], &base, "{:?}", order);
            prop_assert_eq!(&merged["m.bias"], &bias, "{:?}", order);
        }
    }

    #[test]
    fn an_up_factor_of_zeros_gives_the_base_bit_for_bit(
        seed: u64, rows in 1usize..9, columns in 1usize..20, rank in 1usize..5, float in 0usize..4, strength in -3.0..3.0,
    ) {
        let mut random = Random(seed);
        let base = any_bits(&mut random, FLOATS[float], &[rows, columns]);
        let down = random_tensor(&mut random, Dtype::F32, &[rank, columns]);
        let zeros: Vec<f64> = (0..rows * rank).map(|_| [0.0, -0.0][random.below(2)]).collect();
        let up = Stored::of(Dtype::F32, &[rows, rank], &zeros);
        let mut bench = Bench::new(None, &[("m.weight", base.clone())]);
        bench.adapter(
            &lora(rank, 2.0),
            &[("base_model.model.m.lora_A.weight", down), ("base_model.model.m.lora_B.weight", up)],
        );
        prop_assert_eq!(&bench.merge(&[(0, strength)])["m.weight"], &base);
    }

    #[test]
    fn two_adapters_are_added_in_one_rounding(
        seed: u64, rows in 1usize..9, columns in 1usize..20, s1 in -2.0..2.0, s2 in -2.0..2.0,
    ) {
        let (ours, expected, _) = two_adapters(seed, rows, columns, s1, s2);
        assert_same(&ours, &expected);
    }

    #[test]
    fn dora_on_a_linear_layer_is_its_formula(
        seed: u64, outputs in 1usize..9, inputs in 1usize..20, rank in 1usize..5, float in 0usize..4, strength in strengths(),
    ) {
        let layer = Layer { outputs, inputs, kernel: vec![], stored: Orientation::OutputsFirst };
        check_dora(&mut Random(seed), &layer, rank, FLOATS[float], strength, "m", None);
    }

    #[test]
    fn dora_on_a_convolution_is_its_formula(
        seed: u64, outputs in 1usize..7, inputs in 1usize..5, kernel in prop::collection::vec(1usize..4, 1..4), rank in 1usize..5,
        strength in strengths(),
    ) {
        let layer = Layer { outputs, inputs, kernel, stored: Orientation::OutputsFirst };
        check_dora(&mut Random(seed), &layer, rank, Dtype::F32, strength, "m", None);
    }

    #[test]
    fn dora_on_conv1d_normalises_the_columns(
        seed: u64, outputs in 1usize..30, inputs in 1usize..9, rank in 1usize..5, float in 0usize..4, strength in strengths(),
    ) {
        let layer = Layer { outputs, inputs, kernel: vec![], stored: Orientation::InputsFirst };
        let config = json!({"model_type": "gpt2"});
        check_dora(&mut Random(seed), &layer, rank, FLOATS[float], strength, "h.0.attn.c_attn", Some(&config));
    }

    #[test]
    fn dora_on_an_embedding_normalises_the_columns(
        seed: u64, outputs in 1usize..12, inputs in 1usize..9, rank in 1usize..5, float in 0usize..4, strength in strengths(),
    ) {
        let layer = Layer { outputs, inputs, kernel: vec![], stored: Orientation::Embedding };
        check_dora(&mut Random(seed), &layer, rank, FLOATS[float], strength, "m", None);
    }

    #[test]
    fn dora_after_another_adapter_takes_its_norm_from_the_base(
        seed: u64, outputs in 1usize..9, inputs in 1usize..20, first in -2.0..2.0, second in strengths(), inputs_first: bool,
    ) {
        let mut random = Random(seed);
        let stored = if inputs_first { Orientation::Embedding } else { Orientation::OutputsFirst };
        let layer = Layer { outputs, inputs, kernel: vec![], stored };
        let base = layer.weight(&mut random, Dtype::F32);
        let one = layer.adapter(&mut random, 2, "m", false);
        let two = layer.adapter(&mut random, 3, "m", true);
        let mut bench = Bench::new(None, &[("m.weight", base.clone())]);
        bench.adapter(&lora(2, 1.0), &named(&one.tensors));
        bench.adapter(&dora(3, 5.0), &named(&two.tensors));
        let merged = bench.merge(&[(0, first), (1, second)]);
        let running: Vec<f64> = base
            .values()
            .iter()
            .zip(&one.acc)
            .map(|(w, acc)| (first * (1.0 / 2.0)).mul_add(*acc, *w))
            .collect();
        let exact = normalised(&layer, &base.values(), &running, &two, 5.0 / 3.0, second);
        assert_same(&merged["m.weight"], &Stored::of(Dtype::F32, &base.shape, &exact));
    }

    #[test]
    fn ia3_multiplies_outputs_with_their_bias_or_inputs(
        seed: u64, outputs in 2usize..9, inputs in 2usize..9, kernel in prop::collection::vec(1usize..4, 0..3),
        feedforward: bool, float in 0usize..4, strength in strengths(),
    ) {
        let layer = Layer { outputs, inputs, kernel, stored: Orientation::OutputsFirst };
        check_ia3(&mut Random(seed), &layer, feedforward, FLOATS[float], strength, "m", None);
    }

    #[test]
    fn ia3_on_conv1d_multiplies_the_stored_columns_or_rows(
        seed: u64, outputs in 2usize..9, inputs in 2usize..9, feedforward: bool, strength in strengths(),
    ) {
        let layer = Layer { outputs, inputs, kernel: vec![], stored: Orientation::InputsFirst };
        let config = json!({"model_type": "gpt2"});
        check_ia3(&mut Random(seed), &layer, feedforward, Dtype::F32, strength, "h.0.attn.c_attn", Some(&config));
    }
}

fn strengths() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), Just(0.5), -2.0..2.0]
}

/// Two adapters on a bf16 weight: merged together, the definition, and merged one after the other.
fn two_adapters(
    seed: u64,
    rows: usize,
    columns: usize,
    s1: f64,
    s2: f64,
) -> (Stored, Stored, Stored) {
    let mut random = Random(seed);
    let base = random_tensor(&mut random, Dtype::BF16, &[rows, columns]);
    let mut bench = Bench::new(None, &[("m.weight", base.clone())]);
    let mut deltas = Vec::new();
    for (strength, rank, alpha) in [(s1, 2, 0.3), (s2, 3, 0.1)] {
        let down = random_tensor(&mut random, Dtype::F32, &[rank, columns]);
        let up = random_tensor(&mut random, Dtype::F32, &[rows, rank]);
        let acc = oracle::product(&up.values(), &down.values(), rank, columns);
        let c = strength * (alpha / rank as f64);
        deltas.push(Delta { c, acc });
        bench.adapter(
            &lora(rank, alpha),
            &[
                ("base_model.model.m.lora_A.weight", down),
                ("base_model.model.m.lora_B.weight", up),
            ],
        );
    }
    let together = bench.merge(&[(0, s1), (1, s2)])["m.weight"].clone();
    let base_folder = bench.folder.path().join("base");
    let halfway = bench.merge_into(&base_folder, &[(0, s1)]);
    let sequential = bench.merge_into(&halfway, &[(1, s2)]);
    let sequential = oracle::read(&sequential.join("model.safetensors"))["m.weight"].clone();
    let expected = oracle::merged(&base, Dtype::BF16, &deltas);
    (together, expected, sequential)
}

#[test]
fn two_merges_one_after_the_other_round_twice() {
    let (together, expected, sequential) = two_adapters(1, 16, 16, 1.0, 1.0);
    assert_same(&together, &expected);
    assert!(oracle::off(&together, &sequential) > 0);
}

/// How a layer's weight is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Orientation {
    OutputsFirst,
    /// Conv1D: PEFT's factors are those of a Linear.
    InputsFirst,
    /// PEFT's factors have names of their own.
    Embedding,
}

#[derive(Debug)]
struct Layer {
    outputs: usize,
    inputs: usize,
    kernel: Vec<usize>,
    stored: Orientation,
}

/// Tensors of an adapter, with what they stand for.
struct Parts {
    tensors: Vec<(String, Stored)>,
    /// Per element of the stored weight.
    acc: Vec<f64>,
    magnitude: Vec<f64>,
}

fn named(tensors: &[(String, Stored)]) -> Vec<(&str, Stored)> {
    tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect()
}

impl Layer {
    /// Inputs times the size of the kernel.
    fn width(&self) -> usize {
        self.inputs * self.kernel.iter().product::<usize>()
    }

    fn shape(&self) -> Vec<usize> {
        match self.stored {
            Orientation::OutputsFirst => {
                [vec![self.outputs, self.inputs], self.kernel.clone()].concat()
            }
            _ => vec![self.inputs, self.outputs],
        }
    }

    /// A weight without zeros, whose signs would depend on more than the formula.
    fn weight(&self, random: &mut Random, dtype: Dtype) -> Stored {
        let values: Vec<f64> = random
            .floats(self.outputs * self.width())
            .iter()
            .map(|value| value + 0.01f64.copysign(*value))
            .collect();
        Stored::of(dtype, &self.shape(), &values)
    }

    fn adapter(&self, random: &mut Random, rank: usize, path: &str, with_norm: bool) -> Parts {
        let ones = vec![1; self.kernel.len()];
        let down_shape = [vec![rank, self.inputs], self.kernel.clone()].concat();
        let up_shape = [vec![self.outputs, rank], ones.clone()].concat();
        let down = random_tensor(random, Dtype::F32, &down_shape);
        let up = random_tensor(random, Dtype::F32, &up_shape);
        let acc = oracle::product(&up.values(), &down.values(), rank, self.width());
        let acc = match self.stored {
            Orientation::OutputsFirst => acc,
            _ => oracle::transposed(&acc, self.inputs),
        };
        let norm_shape = match self.kernel.is_empty() {
            true => vec![self.outputs],
            false => [vec![1, self.outputs], ones].concat(),
        };
        let magnitude = random_tensor(random, Dtype::F32, &norm_shape);
        let key = |tail: &str| format!("base_model.model.{path}.{tail}");
        let (a, b) = match self.stored {
            Orientation::Embedding => ("lora_embedding_A", "lora_embedding_B"),
            _ => ("lora_A.weight", "lora_B.weight"),
        };
        let values = magnitude.values();
        let mut tensors = vec![(key(a), down), (key(b), up)];
        if with_norm {
            tensors.push((key("lora_magnitude_vector"), magnitude));
        }
        Parts {
            tensors,
            acc,
            magnitude: values,
        }
    }

    /// The output that an element of the stored weight belongs to.
    fn output_of(&self, element: usize) -> usize {
        match self.stored {
            Orientation::OutputsFirst => element / self.width(),
            _ => element % self.outputs,
        }
    }

    fn input_of(&self, element: usize) -> usize {
        match self.stored {
            Orientation::OutputsFirst => {
                element % self.width() / self.kernel.iter().product::<usize>()
            }
            _ => element / self.outputs,
        }
    }
}

/// `w + m · (w' − w)`, which at full strength is w' itself.
fn at_strength(w: f64, full: f64, strength: f64) -> f64 {
    match strength == 1.0 {
        true => full,
        false => f64::mul_add(strength, full - w, w),
    }
}

/// DoRA: norms of the base plus the delta, factors on the running weight plus the delta.
fn normalised(
    layer: &Layer,
    base: &[f64],
    running: &[f64],
    parts: &Parts,
    scale: f64,
    strength: f64,
) -> Vec<f64> {
    let mut sums = vec![0.0; layer.outputs];
    for (element, w) in base.iter().enumerate() {
        let moved = f64::mul_add(scale, parts.acc[element], *w);
        sums[layer.output_of(element)] += moved * moved;
    }
    running
        .iter()
        .enumerate()
        .map(|(element, w)| {
            let output = layer.output_of(element);
            let factor = parts.magnitude[output] / sums[output].sqrt();
            let moved = f64::mul_add(scale, parts.acc[element], *w);
            at_strength(*w, factor * moved, strength)
        })
        .collect()
}

fn check_dora(
    random: &mut Random,
    layer: &Layer,
    rank: usize,
    dtype: Dtype,
    strength: f64,
    path: &str,
    config: Option<&Value>,
) {
    let base = layer.weight(random, dtype);
    let parts = layer.adapter(random, rank, path, true);
    let name = format!("{path}.weight");
    let mut bench = Bench::new(config, &[(&name, base.clone())]);
    bench.adapter(&dora(rank, 0.7), &named(&parts.tensors));
    let merged = bench.merge(&[(0, strength)]);
    let scale = 0.7 / rank as f64;
    let w = base.values();
    let exact = normalised(layer, &w, &w, &parts, scale, strength);
    assert_same(&merged[&name], &Stored::of(dtype, &base.shape, &exact));
}

fn check_ia3(
    random: &mut Random,
    layer: &Layer,
    feedforward: bool,
    dtype: Dtype,
    strength: f64,
    path: &str,
    config: Option<&Value>,
) {
    let base = layer.weight(random, dtype);
    let bias = layer.weight(random, dtype).values()[..layer.outputs].to_vec();
    let bias = Stored::of(dtype, &[layer.outputs], &bias);
    let count = if feedforward {
        layer.inputs
    } else {
        layer.outputs
    };
    // For convolutions PEFT's shape is the same for both kinds.
    let shape = match (layer.kernel.is_empty(), feedforward) {
        (true, true) => vec![1, count],
        (true, false) => vec![count, 1],
        _ => [vec![1, count], vec![1; layer.kernel.len()]].concat(),
    };
    let factors = random_tensor(random, Dtype::F32, &shape);
    let l = factors.values();
    let (weight_name, bias_name) = (format!("{path}.weight"), format!("{path}.bias"));
    let mut bench = Bench::new(
        config,
        &[(&weight_name, base.clone()), (&bias_name, bias.clone())],
    );
    let leaf = path.rsplit('.').next().unwrap();
    let names: &[&str] = if feedforward { &[leaf] } else { &["another"] };
    bench.adapter(
        &json!({"peft_type": "IA3", "target_modules": [leaf], "feedforward_modules": names}),
        &[(&format!("base_model.model.{path}.ia3_l"), factors)],
    );
    let merged = bench.merge(&[(0, strength)]);
    let exact: Vec<f64> = base
        .values()
        .iter()
        .enumerate()
        .map(|(element, w)| {
            let factor = match feedforward {
                true => l[layer.input_of(element)],
                false => l[layer.output_of(element)],
            };
            at_strength(*w, factor * w, strength)
        })
        .collect();
    assert_same(
        &merged[&weight_name],
        &Stored::of(dtype, &base.shape, &exact),
    );
    let exact: Vec<f64> = bias
        .values()
        .iter()
        .enumerate()
        .map(|(output, w)| match feedforward {
            true => *w,
            false => at_strength(*w, l[output] * w, strength),
        })
        .collect();
    assert_same(&merged[&bias_name], &Stored::of(dtype, &bias.shape, &exact));
}

#[test]
fn methods_know_their_rows_beyond_the_first_block() {
    // A run evaluates blocks of some ten thousand elements.
    for stored in [
        Orientation::OutputsFirst,
        Orientation::InputsFirst,
        Orientation::Embedding,
    ] {
        let layer = Layer {
            outputs: 301,
            inputs: 311,
            kernel: vec![],
            stored,
        };
        let (path, config) = match stored {
            Orientation::InputsFirst => ("h.0.attn.c_attn", Some(json!({"model_type": "gpt2"}))),
            _ => ("m", None),
        };
        let mut random = Random(1);
        let config = config.as_ref();
        check_dora(&mut random, &layer, 2, Dtype::F32, 0.5, path, config);
        if stored != Orientation::Embedding {
            for feedforward in [false, true] {
                check_ia3(
                    &mut random,
                    &layer,
                    feedforward,
                    Dtype::BF16,
                    1.0,
                    path,
                    config,
                );
            }
        }
    }
}
