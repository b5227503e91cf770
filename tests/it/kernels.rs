//! Every kernel, every number of threads: the same bytes.

use loratool::linalg::{ChainBound, KERNELS, Kernel, LANES, Panels};
use loratool::tensor::Float;
use ndarray::ArrayView2;
use safetensors::Dtype;
use serde_json::json;

use crate::oracle::{self, Delta, Stored};
use crate::support::{Random, merge, options, write_adapter, write_base};

/// The kernels that this machine has.
fn kernels() -> Vec<&'static Kernel> {
    let (here, lacking): (Vec<&Kernel>, Vec<&Kernel>) =
        KERNELS.iter().partition(|kernel| (kernel.available)());
    for kernel in lacking {
        println!("skipped: this machine lacks the kernel {}", kernel.name);
    }
    assert!(
        here.iter().any(|kernel| kernel.name == "portable"),
        "the portable kernel runs anywhere"
    );
    here
}

/// Ways to fill a matrix.
#[derive(Clone, Copy, Debug)]
enum Fill {
    /// f64 with all its bits.
    Wide,
    /// Values of f32.
    Single,
    /// Values of bf16.
    Brain,
    /// Values of f16.
    Half,
    /// Large terms that cancel, with small ones between.
    Cancelling,
    /// Zeros, subnormals, the largest values, and what overflows.
    Extreme,
}

impl Fill {
    const ALL: [Fill; 6] = [
        Fill::Wide,
        Fill::Single,
        Fill::Brain,
        Fill::Half,
        Fill::Cancelling,
        Fill::Extreme,
    ];

    /// Whether the values are those of f32 or narrower.
    fn is_narrow(self) -> bool {
        !matches!(self, Fill::Wide)
    }

    fn value(self, random: &mut Random, index: usize) -> f64 {
        let near = |dtype, value| oracle::value(dtype, oracle::round(dtype, value));
        match self {
            Fill::Wide => random.float(),
            Fill::Single => near(Dtype::F32, random.float()),
            Fill::Brain => near(Dtype::BF16, random.float()),
            Fill::Half => near(Dtype::F16, random.float()),
            Fill::Cancelling => match index % 3 {
                0 => 2f64.powi(60),
                1 => near(Dtype::F32, random.float()),
                _ => -2f64.powi(60),
            },
            Fill::Extreme => {
                let single = f64::from(f32::MAX);
                let tiny = 2f64.powi(-149);
                let values = [
                    0.0,
                    -0.0,
                    tiny,
                    -tiny,
                    single,
                    -single,
                    1.0,
                    2f64.powi(-126),
                ];
                values[random.below(values.len())]
            }
        }
    }

    fn matrix(self, random: &mut Random, elements: usize) -> Vec<f64> {
        (0..elements)
            .map(|index| self.value(random, index))
            .collect()
    }
}

/// The same bits, or both no number: which NaN an operation gives is the processor's choice.
fn same(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[test]
fn every_kernel_gives_the_chains_of_the_definition() {
    let kernels = kernels();
    let mut random = Random(11);
    let (mut unfused, mut compared) = (0, 0);
    for rank in [0, 1, 15, 16, 17, 255, 257] {
        for columns in 1..=40 {
            for fill in Fill::ALL {
                // Whole tiles of 8 and of 2 rows, and odd ones; few where the chains are long.
                let rows = if rank > 17 { 3 } else { 1 + columns % 19 };
                let left = fill.matrix(&mut random, rows * rank);
                let right = fill.matrix(&mut random, rank * columns);
                let c = 0.3 * random.float();
                // The columns lie somewhere in wider rows.
                let (first, stride) = (columns % 5, columns % 5 + columns + columns % 3);
                let start = random.floats(rows * stride);
                let acc = oracle::product(&left, &right, rank, columns);
                let mut expected = start.clone();
                for (index, acc) in acc.iter().enumerate() {
                    let at = index / columns * stride + first + index % columns;
                    expected[at] = c.mul_add(*acc, start[at]);
                    unfused += usize::from(!same(c * acc + start[at], expected[at]));
                }
                let mut panels = Panels::new(rank, columns);
                // In two pieces, the second one beginning inside a panel.
                let cut = columns / 2;
                let view = ArrayView2::from_shape((rank, columns), &right).unwrap();
                let (one, two) = view.split_at(ndarray::Axis(1), cut);
                panels.pack(0, one);
                panels.pack(cut, two);
                for kernel in &kernels {
                    for exact in [false, true] {
                        if exact && !fill.is_narrow() {
                            continue;
                        }
                        let mut value = start.clone();
                        kernel.add_low_rank(&left, &panels, c, exact, &mut value, first, stride);
                        compared += value.len();
                        for (at, (ours, expected)) in value.iter().zip(&expected).enumerate() {
                            assert!(
                                same(*ours, *expected),
                                "{}: rank {rank}, {rows} × {columns}, {fill:?}, exact products {exact}, element {at}: {ours:e}, not {expected:e}",
                                kernel.name
                            );
                        }
                    }
                }
            }
        }
    }
    assert!(unfused > 1000, "the inputs must tell a fused step from two");
    assert!(compared > 100_000);
}

#[test]
fn factors_of_f64_need_the_fused_product() {
    // (1 + ε)² − 1 − 2ε = ε², which a rounded product loses.
    let epsilon = 2f64.powi(-52);
    let left = [1.0 + epsilon, -1.0, -2.0 * epsilon];
    let right = [1.0 + epsilon, 1.0, 1.0];
    // The other way round, the product is fused into what the first two terms left.
    let (left, right): (Vec<f64>, Vec<f64>) =
        [1, 2, 0].into_iter().map(|k| (left[k], right[k])).unzip();
    let columns = LANES + 1;
    let wide: Vec<f64> = right
        .iter()
        .flat_map(|value| std::iter::repeat_n(*value, columns))
        .collect();
    let mut panels = Panels::new(3, columns);
    panels.pack(0, ArrayView2::from_shape((3, columns), &wide).unwrap());
    for kernel in kernels() {
        let mut value = vec![0.0; columns];
        kernel.add_low_rank(&left, &panels, 1.0, false, &mut value, 0, columns);
        assert_eq!(value, vec![epsilon * epsilon; columns], "{}", kernel.name);
    }
}

const NARROW: [Float; 3] = [Float::F32, Float::BF16, Float::F16];

/// Values on every tie of a type (of f32: on some), one ulp of f64 beside it, and the extremes.
fn beside_ties(dtype: Dtype) -> Vec<f64> {
    let infinity = oracle::infinity(dtype);
    let mut random = Random(5);
    let patterns: Vec<u64> = match dtype {
        Dtype::F32 => (0..4000)
            .chain((0x80_0000 - 40)..(0x80_0000 + 40))
            .chain(infinity - 40..infinity)
            .chain((0..20_000).map(|_| random.next() % infinity))
            .collect(),
        _ => (0..infinity).collect(),
    };
    let mut values = Vec::new();
    for bits in patterns {
        let below = oracle::value(dtype, bits);
        let step = match bits + 1 == infinity {
            true => below - oracle::value(dtype, bits - 1),
            false => oracle::value(dtype, bits + 1) - below,
        };
        let tie = below + step / 2.0;
        values.extend([below, tie.next_down(), tie, tie.next_up()]);
    }
    values.extend([
        1e300,
        f64::MAX,
        f64::INFINITY,
        f64::from_bits(1),
        f64::MIN_POSITIVE,
        f64::NAN,
    ]);
    let negative: Vec<f64> = values.iter().map(|value| -value).collect();
    values.extend(negative);
    // An odd number, so that no vector width divides it.
    values.push(1.5);
    values
}

#[test]
fn every_kernel_rounds_once_on_and_beside_every_tie() {
    let kernels = kernels();
    for float in NARROW {
        let dtype = float.dtype();
        let values = beside_ties(dtype);
        let expected = Stored::of(dtype, &[values.len()], &values);
        for kernel in &kernels {
            let mut bytes = vec![0; values.len() * float.size()];
            kernel.narrow(float, &values, &mut bytes);
            let ours = Stored {
                bytes,
                ..expected.clone()
            };
            for ((value, ours), expected) in values.iter().zip(ours.bits()).zip(expected.bits()) {
                let nan = value.is_nan() && oracle::value(dtype, ours).is_nan();
                assert!(
                    ours == expected || nan,
                    "{}: {value:e} to {dtype}: {ours:#x}, not {expected:#x}",
                    kernel.name
                );
            }
        }
    }
}

#[test]
fn every_kernel_widens_every_pattern_exactly() {
    let kernels = kernels();
    let mut random = Random(6);
    let signs = |dtype: Dtype, bits: u64| [bits, bits | 1 << (dtype.bitsize() - 1)];
    for float in [Float::F64, Float::F32, Float::BF16, Float::F16] {
        let dtype = float.dtype();
        let infinity = oracle::infinity(dtype);
        let bits: Vec<u64> = match float.size() {
            2 => (0..=0xffff).collect(),
            _ => (0..50)
                .chain(infinity - 50..infinity + 50)
                .flat_map(|bits| signs(dtype, bits))
                .chain((0..20_000).map(|_| random.next() >> (64 - dtype.bitsize())))
                .collect(),
        };
        let stored = Stored::of_bits(dtype, &[bits.len()], &bits);
        let mut first: Option<Vec<u64>> = None;
        for kernel in &kernels {
            let mut values = vec![0.0; bits.len()];
            kernel.widen(float, &stored.bytes, &mut values);
            for (bits, ours) in bits.iter().zip(&values) {
                let expected = oracle::value(dtype, *bits);
                assert!(
                    same(*ours, expected),
                    "{}: {dtype} {bits:#x}: {ours:e}, not {expected:e}",
                    kernel.name
                );
            }
            let ours: Vec<u64> = values.iter().map(|value| value.to_bits()).collect();
            assert_eq!(
                first.get_or_insert_with(|| ours.clone()),
                &ours,
                "{}: payloads of NaNs",
                kernel.name
            );
        }
    }
}

/// A base and an adapter that reach every rule: each tensor has a type of base, a type of factors, a rank.
pub(crate) struct Scene {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) expected: Vec<(String, Stored)>,
}

pub(crate) fn scene() -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(21);
    let (mut base, mut adapter, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
    let floats = [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16];
    let mut number = 0;
    for stored in floats {
        for factors in floats {
            for rank in [1, 15, 17] {
                let (rows, columns) = (1 + number % 11, 1 + (number * 7) % 40);
                let name = format!("m{number}");
                number += 1;
                let weight: Vec<u64> = (0..rows * columns)
                    .map(|_| any_pattern(&mut random, stored))
                    .collect();
                let weight = Stored::of_bits(stored, &[rows, columns], &weight);
                let fill = Fill::ALL[random.below(Fill::ALL.len())];
                let mut factor = |shape: &[usize]| {
                    let count = shape.iter().product();
                    // What overflows the type of the factors is no input.
                    let limit = oracle::value(factors, oracle::infinity(factors) - 1);
                    let values: Vec<f64> = fill
                        .matrix(&mut random, count)
                        .into_iter()
                        .map(|value| value.clamp(-limit, limit))
                        .collect();
                    Stored::of(factors, shape, &values)
                };
                let (up, down) = (factor(&[rows, rank]), factor(&[rank, columns]));
                let alpha = 0.1 + number as f64;
                ranks.insert(name.clone(), json!(rank));
                alphas.insert(name.clone(), json!(alpha));
                let acc = oracle::product(&up.values(), &down.values(), rank, columns);
                let c = 0.7 * (alpha / rank as f64);
                let weight_name = format!("{name}.weight");
                let merged = oracle::merged(&weight, stored, &[Delta { c, acc }]);
                expected.push((weight_name.clone(), merged));
                base.push((weight_name, weight));
                adapter.push((format!("base_model.model.{name}.lora_A.weight"), down));
                adapter.push((format!("base_model.model.{name}.lora_B.weight"), up));
            }
        }
    }
    ties(&mut base, &mut adapter, &mut expected);
    fn borrowed(tensors: &[(String, Stored)]) -> Vec<(&str, Stored)> {
        tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor.clone()))
            .collect()
    }
    let config = json!({
        "peft_type": "LORA", "r": TIE_ROWS, "lora_alpha": TIE_ROWS,
        "rank_pattern": ranks, "alpha_pattern": alphas,
    });
    write_base(&folder.path().join("base"), None, &borrowed(&base));
    write_adapter(&folder.path().join("adapter"), &config, &borrowed(&adapter));
    Scene { folder, expected }
}

fn any_pattern(random: &mut Random, dtype: Dtype) -> u64 {
    let infinity = oracle::infinity(dtype);
    let sign = (random.next() & 1) << (dtype.bitsize() - 1);
    let magnitude = match random.below(12) {
        0 => 0,
        1 => 1 + random.next() % 3,
        2 => infinity,
        // Signalling and quiet, any payload.
        3 => infinity + 1 + random.next() % (infinity & infinity.wrapping_neg()).saturating_sub(1),
        4 => infinity - 1,
        _ => oracle::round(dtype, random.float().abs()),
    };
    sign | magnitude
}

const TIE_ROWS: usize = 16;

/// Tensors whose exact results lie on ties and one ulp of f64 beside: B is the identity, so that A is
/// the delta, divided by strength times scale. The error of that division is far below an ulp of the sum.
fn ties(
    base: &mut Vec<(String, Stored)>,
    adapter: &mut Vec<(String, Stored)>,
    expected: &mut Vec<(String, Stored)>,
) {
    let mut random = Random(31);
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let columns = 37;
        let (mut weights, mut deltas) = (Vec::new(), Vec::new());
        for index in 0..TIE_ROWS * columns {
            let bits = oracle::round(dtype, random.float());
            let weight = oracle::value(dtype, bits);
            let next = oracle::value(dtype, bits + 1);
            let tie = weight + (next - weight) / 2.0;
            let wanted = match index % 3 {
                0 => tie,
                1 => tie.next_up(),
                _ => tie.next_down(),
            };
            weights.push(bits);
            deltas.push(wanted - weight);
        }
        let identity: Vec<f64> = (0..TIE_ROWS * TIE_ROWS)
            .map(|index| f64::from(u8::from(index % (TIE_ROWS + 1) == 0)))
            .collect();
        let name = format!("tie{}", dtype.to_string().to_lowercase());
        let weight = Stored::of_bits(dtype, &[TIE_ROWS, columns], &weights);
        let scaled: Vec<f64> = deltas.iter().map(|delta| delta / 0.7).collect();
        for ((bits, scaled), delta) in weights.iter().zip(&scaled).zip(&deltas) {
            let weight = oracle::value(dtype, *bits);
            assert_eq!(0.7f64.mul_add(*scaled, weight), weight + delta);
        }
        let up = Stored::of(Dtype::F32, &[TIE_ROWS, TIE_ROWS], &identity);
        let down = Stored::of(Dtype::F64, &[TIE_ROWS, columns], &scaled);
        let acc = oracle::product(&up.values(), &down.values(), TIE_ROWS, columns);
        let merged = oracle::merged(&weight, dtype, &[Delta { c: 0.7, acc }]);
        expected.push((format!("{name}.weight"), merged));
        base.push((format!("{name}.weight"), weight));
        adapter.push((format!("base_model.model.{name}.lora_A.weight"), down));
        adapter.push((format!("base_model.model.{name}.lora_B.weight"), up));
    }
}

#[test]
fn a_whole_merge_has_the_bytes_of_the_definition_with_every_kernel() {
    let scene = scene();
    let folder = scene.folder.path();
    let mut files = Vec::new();
    for kernel in kernels() {
        let output = folder.join(kernel.name);
        let mut options = options(&folder.join("base"), &folder.join("adapter"), &output);
        options.adapters[0].strength = 0.7;
        options.allow_nonfinite = true;
        options.kernel = Some(kernel.name.to_owned());
        let report = merge(&options).unwrap();
        assert_eq!(report.kernel, kernel.name);
        let path = output.join("model.safetensors");
        let ours = oracle::read(&path);
        for (name, expected) in &scene.expected {
            let off = oracle::off(&ours[name], expected);
            assert_eq!(off, 0, "{}: elements of {name}", kernel.name);
        }
        files.push(std::fs::read(&path).unwrap());
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_merge_has_the_same_bytes_on_any_number_of_threads() {
    // Several blocks per chunk, two chunks, none of them a whole number of rows of the next.
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(41);
    let (rows, columns) = (2100, 1009);
    let weight = Stored {
        dtype: Dtype::F32,
        shape: vec![rows, columns],
        bytes: (0..rows * columns)
            .flat_map(|_| (random.float() as f32).to_le_bytes())
            .collect(),
    };
    let single = |random: &mut Random, shape: &[usize; 2]| {
        let values = random.floats(shape[0] * shape[1]);
        Stored::of(Dtype::F32, shape, &values)
    };
    let (up, down) = (
        single(&mut random, &[rows, 2]),
        single(&mut random, &[2, columns]),
    );
    let magnitude = single(&mut random, &[1, rows]);
    write_base(&folder.path().join("base"), None, &[("m.weight", weight)]);
    write_adapter(
        &folder.path().join("adapter"),
        &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3}),
        &[
            ("base_model.model.m.lora_A.weight", down.clone()),
            ("base_model.model.m.lora_B.weight", up.clone()),
        ],
    );
    write_adapter(
        &folder.path().join("dora"),
        &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": true}),
        &[
            ("base_model.model.m.lora_A.weight", down),
            ("base_model.model.m.lora_B.weight", up),
            ("base_model.model.m.lora_magnitude_vector", magnitude),
        ],
    );
    for adapter in ["adapter", "dora"] {
        let mut first: Option<(Vec<u8>, String)> = None;
        for threads in [1, 2, 3, 5, 8] {
            let output = folder.path().join(format!("{adapter}{threads}"));
            let mut options = options(
                &folder.path().join("base"),
                &folder.path().join(adapter),
                &output,
            );
            options.threads = Some(threads);
            let report = merge(&options).unwrap();
            let bytes = std::fs::read(output.join("model.safetensors")).unwrap();
            // The sums in the report are floats, added up in the order of the blocks.
            let changes = serde_json::to_string(&report.changes).unwrap();
            let (first_bytes, first_changes) =
                first.get_or_insert_with(|| (bytes.clone(), changes.clone()));
            assert!(bytes == *first_bytes, "{adapter}: {threads} threads");
            assert_eq!(&changes, first_changes, "{adapter}: {threads} threads");
        }
    }
}

#[test]
fn a_kernel_that_does_not_exist_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(
        &crate::support::fixture("peft/bases/llama"),
        &crate::support::fixture("peft/cases/lora/adapter"),
        &folder.path().join("out"),
    );
    options.kernel = Some("abacus".to_owned());
    let error = merge(&options).unwrap_err();
    assert_eq!(error.kind(), loratool::Kind::Usage, "{error}");
    assert!(!folder.path().join("out").exists());
}

#[test]
fn every_kernel_looks_over_a_row_alike_and_asks_for_care_only_where_it_is_due() {
    let kernels = kernels();
    let mut random = Random(51);
    let limit = 65520.0;
    let below = 65520f64.next_down();
    let mut due = [0, 0];
    for length in 0..70 {
        // What is placed at one element of an ordinary row: base, value, and whether care is due.
        for (base_value, value_value, care) in [
            (0.5, 0.25, false),
            (0.0, 0.25, false),
            (0.5, -0.0, false),
            (-0.0, f64::from_bits(1), false),
            (f64::MAX, below, false),
            (1.0, -below, false),
            (-0.0, 0.0, true),
            (1.0, limit, true),
            (1.0, -limit, true),
            (1.0, f64::NAN, true),
            (1.0, -f64::NAN, true),
            (f64::INFINITY, 1.0, true),
            (f64::NEG_INFINITY, 1.0, true),
            (-f64::NAN, 1.0, true),
            (f64::from_bits(0x7ff0_0000_0000_0001), 1.0, true),
        ] {
            let (mut base, mut value) = (random.floats(length), random.floats(length));
            let mut care = care;
            match length {
                0 => care = false,
                _ => {
                    let at = random.below(length);
                    (base[at], value[at]) = (base_value, value_value);
                }
            }
            due[usize::from(care)] += 1;
            let first = kernels[0].survey(&base, &value, limit);
            for kernel in &kernels {
                let survey = kernel.survey(&base, &value, limit);
                assert_eq!(
                    survey.care, care,
                    "{}: {base_value:e} becomes {value_value:e} in a row of {length}",
                    kernel.name
                );
                assert!(
                    same(survey.delta, first.delta) && same(survey.base, first.base),
                    "{}: the sums of a row of {length}",
                    kernel.name
                );
            }
            if base_value == 0.5 {
                let square = |sum: f64, value: f64| sum + value * value;
                let exact = base.iter().copied().fold(0.0, square);
                assert!((first.base - exact).abs() <= 1e-12 * exact);
                let delta = base.iter().zip(&value).map(|(b, v)| v - b);
                let exact = delta.fold(0.0, square);
                assert!((first.delta - exact).abs() <= 1e-12 * exact);
            }
        }
    }
    assert!(due.iter().all(|count| *count > 300));
}

#[test]
fn every_kernel_bounds_a_chain_alike_and_its_interval_holds_the_definition() {
    let kernels = kernels();
    let mut random = Random(61);
    for length in 0..70 {
        let (chain, columns) = (random.floats(length), random.floats(length));
        let columns: Vec<f64> = columns.iter().map(|value| value.abs()).collect();
        let base = random.floats(length);
        let of_chain = ChainBound {
            row: 1e-9,
            columns: &columns,
            relative: 1e-8,
            floor: 1e-30,
        };
        let c = 0.3 * random.float();
        let outcomes: Vec<_> = kernels
            .iter()
            .map(|kernel| {
                let (mut value, mut bound) = (base.clone(), vec![0.0; length]);
                kernel.accumulate_bounded(c, &chain, &of_chain, &mut value, &mut bound);
                kernel.accumulate_bounded(-c, &chain, &of_chain, &mut value, &mut bound);
                let mut low = vec![0.0; length];
                assert!(kernel.interval(&value, &mut bound, &mut low));
                (value, bound, low)
            })
            .collect();
        assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]));
        let (_, high, low) = &outcomes[0];
        for index in 0..length {
            // The ends of what a chain may be, by the definition.
            let off = 1e-9 * columns[index] + 1e-8 * chain[index].abs() + 1e-30;
            for (first, second) in [(off, -off), (-off, off), (0.0, 0.0)] {
                let value = c.mul_add(chain[index] + first, base[index]);
                let value = (-c).mul_add(chain[index] + second, value);
                assert!(
                    low[index] < value && value < high[index],
                    "{length}, {index}"
                );
            }
            let width = high[index] - low[index];
            assert!(width <= 4.1 * c.abs() * off + 1e-14, "{width:e}");
        }
    }
    for kernel in kernels {
        for c in [f64::NAN, f64::INFINITY] {
            let of_chain = ChainBound {
                row: 0.0,
                columns: &[1.0],
                relative: 0.0,
                floor: 0.0,
            };
            let (mut value, mut bound, mut low) = ([1.0], [0.0], [0.0]);
            kernel.accumulate_bounded(c, &[1.0], &of_chain, &mut value, &mut bound);
            assert!(!kernel.interval(&value, &mut bound, &mut low), "{c}");
        }
        // Nothing was added to a zero: its interval has both signs.
        let (mut bound, mut low) = ([0.0], [1.0]);
        assert!(kernel.interval(&[0.0], &mut bound, &mut low));
        assert!(low[0] < 0.0 && bound[0] > 0.0);
    }
}
