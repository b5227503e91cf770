//! Merges whose products something else computes: the bytes are those of the processor's own kernels.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use loratool::linalg::dense::ALGEBRAS;
use loratool::linalg::device::{Choice, Device};
use loratool::ops::merge::{Control, MergeDevice, Options, Report, plan};
use loratool::tensor::Float;
use loratool::{Kind, Reason, Result};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use crate::devices_support::{Twist, Twisted, gpu};
use crate::goldens::cases;
use crate::hostile_support::{Room, tree};
use crate::kernels::scene;
use crate::oracle::Stored;
use crate::support::{Random, algebras, fixture, merge, options, write_adapter, write_base};
use crate::undo::{elements, few};

/// A device that is the first library of this build.
pub(crate) fn plain() -> Device {
    Twisted::device("plain", || Twisted::of(ALGEBRAS[0]))
}

/// Every library with f64 and as if it had none; noisy, or as it is.
fn libraries(twist: Twist) -> Vec<Device> {
    let mut devices = Vec::new();
    for inner in algebras() {
        for has_doubles in [true, false] {
            let name = format!("{}, f64: {has_doubles}, {twist:?}", inner.name());
            devices.push(Twisted::device(&name, || Twisted {
                has_doubles,
                twist,
                ..Twisted::of(inner)
            }));
        }
    }
    devices
}

/// Devices that need no hardware: every library as noisy as its bound allows, one like Metal, and those of the build.
fn devices() -> Vec<Device> {
    let mut devices = libraries(Twist::Noise);
    devices.push(Twisted::device("flushing", || Twisted {
        has_doubles: false,
        twist: Twist::Flushes,
        ..Twisted::of(ALGEBRAS[0])
    }));
    if cfg!(feature = "candle") {
        let open = |memory| Device::open("candle-cpu", memory, ALGEBRAS[0]).unwrap();
        devices.extend([open(None), open(Some(128 << 10))]);
    }
    devices.extend(gpu());
    devices
}

/// Runs with a device.
fn on(device: &Device, options: &Options) -> Result<Report> {
    merge(&Options {
        device: Some(Choice::of(device.clone())),
        ..options.clone()
    })
}

fn of(report: &Report) -> &MergeDevice {
    report.device.as_ref().expect("a device was asked for")
}

/// Everything at a path.
fn bytes(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    tree(path).into_iter().collect()
}

/// Merges with every device, and compares with the processor; how many tensors each had at least.
fn same_everywhere(options: &Options, devices: &[Device]) -> usize {
    let expected = merge(options).map(|_| bytes(&options.output));
    let options = Options {
        force: true,
        ..options.clone()
    };
    let mut least = usize::MAX;
    for device in devices {
        match (on(device, &options), &expected) {
            (Ok(report), Ok(expected)) => {
                let what = format!("{device:?}: {}", options.adapters[0].path.display());
                assert!(bytes(&options.output) == *expected, "{what}");
                least = least.min(of(&report).work.as_ref().unwrap().tensors);
            }
            (Err(error), Err(expected)) => {
                assert_eq!(error.to_string(), expected.to_string(), "{device:?}");
                least = 0;
            }
            (found, expected) => panic!("{device:?}: {found:?}, expected {expected:?}"),
        }
    }
    least
}

#[test]
fn every_golden_of_peft_has_the_same_bytes_on_every_device() {
    let (room, devices) = (Room::new(), devices());
    let mut on_device = 0;
    for case in cases() {
        let adapter = case.folder.join("adapter");
        let mut options = options(&case.base, &adapter, &room.path("merged"));
        options.force = true;
        for (strength, dtype) in [
            (1.0, None),
            (-0.7, Some(Float::BF16)),
            (1.5, Some(Float::F16)),
            (0.3, Some(Float::F32)),
        ] {
            options.adapters[0].strength = strength;
            options.dtype = dtype;
            on_device += same_everywhere(&options, &devices);
        }
    }
    assert!(on_device > 200, "{on_device}");
}

#[test]
fn every_golden_of_other_tools_has_the_same_bytes_on_every_device() {
    let (room, devices) = (Room::new(), devices());
    let mut pairs: Vec<(PathBuf, PathBuf)> = Vec::new();
    for folder in std::fs::read_dir(fixture("lycoris")).unwrap() {
        let folder = folder.unwrap().path();
        pairs.push((
            folder.join("base.safetensors"),
            folder.join("adapter.safetensors"),
        ));
    }
    for adapter in ["comfy_native", "diffusers_new", "kohya", "kohya_sgm"] {
        let folder = fixture("lycoris/unet_full");
        pairs.push((
            folder.join("unet.safetensors"),
            folder.join(adapter).with_extension("safetensors"),
        ));
    }
    pairs.push((fixture("gguf/base.gguf"), fixture("gguf/adapter.gguf")));
    pairs.retain(|(base, adapter)| base.exists() && adapter.exists());
    assert!(pairs.len() >= 15, "{pairs:?}");
    let mut on_device = 0;
    for (base, adapter) in pairs {
        let output = match base
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            true => "merged.gguf",
            false => "merged.safetensors",
        };
        let mut options = options(&base, &adapter, &room.path(output));
        options.force = true;
        for dtype in [None, Some(Float::BF16), Some(Float::F16)] {
            options.dtype = dtype;
            on_device += same_everywhere(&options, &devices);
        }
    }
    assert!(on_device > 60, "{on_device}");
}

#[test]
fn values_on_and_beside_ties_and_every_rule_have_the_same_bytes_on_every_device() {
    let scene = scene();
    let folder = scene.folder.path();
    let mut options = options(
        &folder.join("base"),
        &folder.join("adapter"),
        &folder.join("out"),
    );
    options.adapters[0].strength = 0.7;
    options.allow_nonfinite = true;
    for dtype in [None, Some(Float::F32), Some(Float::BF16), Some(Float::F16)] {
        options.dtype = dtype;
        options.force = true;
        same_everywhere(&options, &devices());
    }
    // Where they do not fit, the same element is the first, and as many are counted.
    options.allow_nonfinite = false;
    options.dtype = Some(Float::F16);
    same_everywhere(&options, &devices());
}

/// A model of one weight and an adapter of a rank on it; the change is so much of the weight.
fn one_layer(room: &Room, dtype: Dtype, [rows, columns, rank]: [usize; 3], change: f64) -> Options {
    let mut random = Random(rank as u64);
    let mut floats = |count: usize, scale: f64| -> Vec<f64> {
        let values = (0..count).map(|_| random.float() * scale * 3f64.sqrt());
        values.collect()
    };
    let weight = Stored::of(dtype, &[rows, columns], &floats(rows * columns, 0.02));
    let scale = (change * 0.02 / (rank as f64).sqrt()).sqrt();
    let up = Stored::of(Dtype::F32, &[rows, rank], &floats(rows * rank, scale));
    let down = Stored::of(Dtype::F32, &[rank, columns], &floats(rank * columns, scale));
    write_base(&room.path("base"), None, &[("m.weight", weight)]);
    write_adapter(
        &room.path("adapter"),
        &json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank}),
        &[
            ("base_model.model.m.lora_A.weight", down),
            ("base_model.model.m.lora_B.weight", up),
        ],
    );
    let mut options = options(&room.path("base"), &room.path("adapter"), &room.path("out"));
    options.force = true;
    options
}

#[test]
fn few_elements_are_left_to_the_definition_and_they_are_counted() {
    let room = Room::new();
    for rank in [1, 16, 64, 255, 257] {
        for (dtype, of_doubles, of_singles) in [
            // f32 keeps 24 digits, and candidates come in f64.
            (Dtype::F32, 1e-4, None),
            (Dtype::BF16, 2e-4, Some(2e-2)),
            (Dtype::F16, 2e-3, Some(1e-1)),
        ] {
            let options = one_layer(&room, dtype, [160, 500, rank], 0.1);
            for device in devices().into_iter().chain(libraries(Twist::Nothing)) {
                same_everywhere(&options, std::slice::from_ref(&device));
                let report = on(&device, &options).unwrap();
                let work = of(&report).work.clone().unwrap();
                let limit = match device.algebra().has_doubles() {
                    true => Some(of_doubles),
                    false => of_singles,
                };
                let Some(limit) = limit else {
                    assert_eq!((work.tensors, work.elements), (0, 0));
                    assert_eq!(work.processor.len(), 1, "{work:?}");
                    continue;
                };
                assert_eq!((work.tensors, work.elements), (1, 160 * 500), "{work:?}");
                let share = work.recomputed as f64 / work.elements as f64;
                println!("{dtype}, rank {rank}, {device:?}: {share:e}");
                assert!(
                    share <= limit,
                    "{dtype}, rank {rank}, {device:?}: {share:e}"
                );
            }
        }
    }
}

#[test]
fn where_every_value_is_a_tie_every_element_is_left_to_the_definition() {
    let room = Room::new();
    let size = 24;
    let mut random = Random(5);
    let (mut weights, mut deltas) = (Vec::new(), Vec::new());
    for _ in 0..size * size {
        // Eight digits of bf16, and half a unit of the last.
        let weight = 1.0 + random.below(127) as f64 / 128.0;
        weights.push(weight);
        deltas.push(1.0 / 256.0);
    }
    let identity = |index: usize| f64::from(u8::from(index.is_multiple_of(size + 1)));
    let identity: Vec<f64> = (0..size * size).map(identity).collect();
    write_base(
        &room.path("base"),
        None,
        &[("m.weight", Stored::of(Dtype::BF16, &[size, size], &weights))],
    );
    write_adapter(
        &room.path("adapter"),
        &json!({"peft_type": "LORA", "r": size, "lora_alpha": size}),
        &[
            (
                "base_model.model.m.lora_A.weight",
                Stored::of(Dtype::F32, &[size, size], &deltas),
            ),
            (
                "base_model.model.m.lora_B.weight",
                Stored::of(Dtype::F32, &[size, size], &identity),
            ),
        ],
    );
    let mut options = options(&room.path("base"), &room.path("adapter"), &room.path("out"));
    options.force = true;
    for device in devices() {
        same_everywhere(&options, std::slice::from_ref(&device));
        let report = on(&device, &options).unwrap();
        let work = of(&report).work.clone().unwrap();
        assert_eq!(work.recomputed, (size * size) as u64, "{device:?}");
    }
}

#[test]
fn several_chunks_have_the_same_bytes_with_any_number_of_threads() {
    let room = Room::new();
    // Some chunks of eight megabytes for each lane, the last of them short.
    let options = one_layer(&room, Dtype::F32, [9001, 1009, 3], 0.05);
    merge(&options).unwrap();
    let expected = bytes(&options.output);
    for device in devices() {
        for threads in [1, 2, 3] {
            let options = Options {
                threads: Some(threads),
                ..options.clone()
            };
            on(&device, &options).unwrap();
            assert!(bytes(&options.output) == expected, "{device:?}, {threads}");
        }
    }
}

#[test]
fn a_device_that_fails_in_mid_run_leaves_the_old_output_as_it_was() {
    let room = Room::new();
    let options = one_layer(&room, Dtype::F32, [9001, 1009, 3], 0.05);
    merge(&options).unwrap();
    let (before, names) = (bytes(&options.output), room.names());
    for inner in algebras() {
        for fails_at in [0, 1] {
            for threads in [1, 3] {
                let device = Twisted::device("twisted", || Twisted {
                    fails_at,
                    ..Twisted::of(inner)
                });
                let options = Options {
                    threads: Some(threads),
                    ..options.clone()
                };
                let error = on(&device, &options).unwrap_err();
                assert!(
                    matches!(error.reason(), Reason::DeviceFailed { .. }),
                    "{error:?}"
                );
                assert!(error.hint().unwrap().contains("--device cpu"));
                assert!(bytes(&options.output) == before);
                assert_eq!(room.names(), names);
            }
        }
    }
}

#[test]
fn a_run_that_is_cancelled_ends_with_a_device_too() {
    let room = Room::new();
    let options = one_layer(&room, Dtype::F32, [9001, 1009, 3], 0.05);
    for device in devices() {
        for threads in [1, 3] {
            let options = Options {
                threads: Some(threads),
                device: Some(Choice::of(device.clone())),
                ..options.clone()
            };
            let control = Control::default();
            let cancel = control.cancel.clone();
            let stop = move |_, _| cancel.store(true, Ordering::Relaxed);
            let control = Control {
                progress: Some(&stop),
                ..control
            };
            let error = plan(&options).unwrap().run(&control).unwrap_err();
            assert!(matches!(error.reason(), Reason::Stopped), "{error:?}");
            assert!(!options.output.exists());
        }
    }
}

#[test]
fn what_a_device_does_not_do_is_left_to_the_processor_and_said() {
    let room = Room::new();
    let device = Twisted::device("twisted", || Twisted::of(ALGEBRAS[0]));
    let reasons = |options: &Options| -> Vec<(String, usize)> {
        let report = on(&device, options).unwrap();
        let work = of(&report).work.clone().unwrap();
        let reasons = work.processor.into_iter();
        reasons
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect()
    };
    let simple = one_layer(&room, Dtype::BF16, [20, 30, 4], 0.1);
    assert_eq!(reasons(&simple), []);
    let with_undo = Options {
        undo: Some(room.path("side.undo")),
        ..simple.clone()
    };
    assert!(reasons(&with_undo)[0].0.contains("undo file"));
    let wide = one_layer(&room, Dtype::F64, [20, 30, 4], 0.1);
    assert!(reasons(&wide)[0].0.contains("last digit of f64"));
    for case in cases() {
        let mut options = options(&case.base, &case.folder.join("adapter"), &room.path("o"));
        options.force = true;
        let told = reasons(&options);
        let is = |word: &str| told.iter().any(|(reason, _)| reason.contains(word));
        match case.name.as_str() {
            "lora_dora" | "ia3" => assert!(is("no bound"), "{}: {told:?}", case.name),
            "lora_all_linear" => assert_eq!(told, []),
            _ => {}
        }
    }
    // What gains nothing is left out where that is asked for.
    let automatic = Options {
        device: Some(Choice {
            only_if_faster: true,
            ..Choice::of(device.clone())
        }),
        ..one_layer(&room, Dtype::BF16, [20, 30, 4], 0.1)
    };
    let report = merge(&automatic).unwrap();
    let work = of(&report).work.clone().unwrap();
    assert_eq!(work.tensors, 0);
    assert!(
        work.processor
            .keys()
            .all(|reason| reason.contains("to gain"))
    );
    let large = Options {
        threads: Some(1),
        device: automatic.device,
        ..one_layer(&room, Dtype::BF16, [1024, 1024, 64], 0.1)
    };
    let report = merge(&large).unwrap();
    assert_eq!(of(&report).work.clone().unwrap().tensors, 1);
}

#[test]
fn a_plan_names_the_device_and_a_report_without_one_has_no_such_field() {
    let room = Room::new();
    let options = one_layer(&room, Dtype::BF16, [20, 30, 4], 0.1);
    let report = serde_json::to_value(merge(&options).unwrap()).unwrap();
    assert!(report.get("device").is_none());
    let device = Twisted::device("twisted", || Twisted::of(ALGEBRAS[0]));
    let options = Options {
        device: Some(Choice::of(device)),
        ..options
    };
    let planned = serde_json::to_value(plan(&options).unwrap().report()).unwrap();
    assert_eq!(
        planned["device"],
        json!({"device": "twisted", "reason": "asked for"})
    );
    let report = serde_json::to_value(merge(&options).unwrap()).unwrap();
    assert_eq!(report["device"]["work"]["elements"], 600);
}

proptest! {
    #![proptest_config(few(48))]

    #[test]
    fn bases_of_any_bits_and_changes_of_any_size_have_the_same_bytes_on_every_device(
        seeds in prop::collection::vec((any::<u64>(), any::<i16>()), 12 * 20),
        (from, factors, to) in (0..4usize, 1..4usize, 0..4usize),
        (up, down) in (-160i32..130, -160i32..130),
        rank in 1..70usize,
        (strength, seed) in (-2.0f64..2.0, any::<u64>()),
    ) {
        const FLOATS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16];
        let room = Room::new();
        let mut random = Random(seed);
        let mut factor = |shape: &[usize], exponent: i32| {
            // Some are zero, and the sizes within one matrix differ as well.
            let mut value = || match random.below(8) {
                0 => 0.0,
                some => random.float() * 2f64.powi(exponent.min(100) - 3 * some as i32),
            };
            let dtype = FLOATS[factors];
            let limit = crate::oracle::value(dtype, crate::oracle::infinity(dtype) - 1);
            let values = (0..shape.iter().product()).map(|_| value().clamp(-limit, limit));
            Stored::of(dtype, shape, &values.collect::<Vec<f64>>())
        };
        let adapter = [
            ("base_model.model.m.lora_A.weight", factor(&[rank, 20], down)),
            ("base_model.model.m.lora_B.weight", factor(&[12, rank], up)),
        ];
        let weight = Stored::of_bits(FLOATS[from], &[12, 20], &elements(FLOATS[from], &seeds));
        write_base(&room.path("base"), None, &[("m.weight", weight)]);
        let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank});
        write_adapter(&room.path("adapter"), &config, &adapter);
        let mut options = options(&room.path("base"), &room.path("adapter"), &room.path("out"));
        options.adapters[0].strength = strength;
        options.allow_nonfinite = true;
        options.dtype = FLOATS.get(to).and_then(|to| Float::of(*to)).filter(|to| *to != Float::F64);
        same_everywhere(&options, &devices());
    }
}

#[test]
fn a_device_that_rounds_its_inputs_is_refused_when_it_is_opened() {
    for inner in algebras() {
        let honest = [Twist::Nothing, Twist::Noise, Twist::OneByOne].map(|twist| Twisted {
            twist,
            ..Twisted::of(inner)
        });
        for lane in honest {
            Device::new("honest", vec![Box::new(lane)])
                .proved()
                .unwrap();
        }
        for has_doubles in [false, true] {
            let lane = Twisted {
                twist: Twist::Short,
                has_doubles,
                ..Twisted::of(inner)
            };
            let error = Device::new("short", vec![Box::new(lane)])
                .proved()
                .unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().contains("products of f32"), "{error}");
            assert!(error.hint().unwrap().contains("NVIDIA_TF32_OVERRIDE"));
        }
    }
}

/// Small models are with those of every device above.
#[test]
fn a_gpu_gives_the_same_bytes_of_large_layers_where_there_is_one() {
    let Some(device) = gpu() else { return };
    let room = Room::new();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        for rank in [16, 64, 256] {
            let options = one_layer(&room, dtype, [4096, 4096, rank], 0.01);
            same_everywhere(&options, std::slice::from_ref(&device));
        }
    }
}
