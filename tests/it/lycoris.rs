//! What LyCORIS and diffusers computed, against what we compute.

use std::path::Path;

use loratool::containers::TensorFile;
use loratool::formats::{Found, Order, ReadOptions};
use loratool::naming::Spelling;
use loratool::ops::convert;
use loratool::ops::merge::Control;
use loratool::tensor::DType;
use loratool::{Error, Kind, Reason};

use crate::oracle::Stored;
use crate::support::{fixture, merge, options, write_safetensors};

fn close(name: &str, ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len(), "{name}");
    let largest = theirs.iter().fold(0.0, |all: f64, v| all.max(v.abs()));
    let gap = ours
        .iter()
        .zip(theirs)
        .fold(0.0, |all: f64, (a, b)| all.max((a - b).abs()));
    assert!(
        gap <= 1e-5 * largest,
        "{name} differs by {gap:e} of {largest:e}"
    );
}

/// Merges one adapter into one file at a strength.
fn merged(base: &Path, adapter: &Path, strength: f64) -> TensorFile {
    with_alpha(base, adapter, strength, None)
}

fn with_alpha(base: &Path, adapter: &Path, strength: f64, alpha: Option<f64>) -> TensorFile {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("merged.safetensors");
    let mut options = options(base, adapter, &output);
    options.adapters[0].strength = strength;
    options.read.alpha = alpha;
    merge(&options).unwrap_or_else(|error| panic!("{}: {error:?}", adapter.display()));
    TensorFile::open(&output).unwrap()
}

fn compare(name: &str, merged: &TensorFile, expected: &TensorFile, end: &str) -> usize {
    let mut compared = 0;
    for expected in &expected.directory.tensors {
        let wanted = expected.name.strip_suffix(end);
        if let Some(wanted) = wanted.filter(|wanted| {
            !wanted.contains('@') && (wanted.ends_with("weight") || wanted.ends_with("bias"))
        }) {
            let ours = merged.tensor(wanted).unwrap();
            let theirs = expected.to_f64().unwrap();
            close(
                &format!("{name}: {wanted}{end}"),
                &ours.to_f64().unwrap(),
                &theirs,
            );
            compared += 1;
        }
    }
    compared
}

#[test]
fn every_golden_of_lycoris_is_met() {
    let mut met = 0;
    for entry in std::fs::read_dir(fixture("lycoris")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if !folder.join("adapter.safetensors").exists() {
            continue; // one adapter in several spellings
        }
        let file = |name: &str| folder.join(name);
        let (base, adapter) = (file("base.safetensors"), file("adapter.safetensors"));
        let expected = TensorFile::open(file("expected.safetensors")).unwrap();
        let whole = merged(&base, &adapter, 1.0);
        assert!(compare(&name, &whole, &expected, "") >= 1, "{name}");
        // LyCORIS' DoRA at half strength starts from W + ΔW; ours from W (docs/methods.md).
        if !name.contains("dora") {
            let half = merged(&base, &adapter, 0.5);
            assert_eq!(compare(&name, &half, &expected, "@0.5"), 1, "{name}");
        }
        met += 1;
    }
    assert_eq!(met, 16);
}

/// A folder, adapters in it, bases with what they become, and how many tensors are compared at least.
type Case = (
    &'static str,
    &'static [&'static str],
    &'static [(&'static str, &'static str)],
    usize,
);

/// Adapters of one meaning, bases in either layout, and what the bases become.
const SPELLED: &[Case] = &[
    (
        "unet_attn",
        &[
            "kohya",
            "kohya_sgm",
            "diffusers_new",
            "diffusers_mid",
            "diffusers_old",
        ],
        UNETS,
        618,
    ),
    (
        "unet_full",
        &["kohya", "kohya_sgm", "diffusers_new"],
        UNETS,
        618,
    ),
    (
        "flux_fused",
        &["kohya_dense", "diffusers_dense"],
        &[
            ("base_bfl", "merged_dense_bfl"),
            ("base_diffusers", "merged_dense_diffusers"),
        ],
        2,
    ),
    (
        "flux_fused",
        &["kohya_sparse", "diffusers_sparse"],
        &[
            ("base_bfl", "merged_sparse_bfl"),
            ("base_diffusers", "merged_sparse_diffusers"),
        ],
        2,
    ),
];

const UNETS: &[(&str, &str)] = &[("unet", "unet_merged"), ("unet_ldm", "unet_merged_ldm")];

fn spelled(case: &str, name: &str) -> std::path::PathBuf {
    fixture("lycoris")
        .join(case)
        .join(format!("{name}.safetensors"))
}

#[test]
fn one_adapter_in_any_spelling_gives_what_diffusers_computes_in_either_layout() {
    for (case, adapters, bases, least) in SPELLED {
        for (base, expected) in *bases {
            let expected = TensorFile::open(spelled(case, expected)).unwrap();
            for adapter in *adapters {
                let merged = merged(&spelled(case, base), &spelled(case, adapter), 1.0);
                let compared = compare(adapter, &merged, &expected, "");
                assert!(compared >= *least, "{case}, {adapter}: {compared}");
                assert_eq!(compared, expected.directory.tensors.len());
            }
        }
    }
}

/// Converts one adapter and gives where it lies.
fn converted(
    from: &Path,
    to: &str,
    family: Option<&str>,
    output: &Path,
) -> Result<convert::Report, Error> {
    let options = convert::Options {
        adapter: from.to_owned(),
        to: to.to_owned(),
        output: output.to_owned(),
        family: family.map(str::to_owned),
        ..convert::Options::default()
    };
    convert::plan(&options)?.run(&Control::default())
}

fn bytes_of(file: &TensorFile) -> Vec<(String, Vec<u8>)> {
    let tensors = file.directory.tensors.iter();
    let mut all: Vec<_> = tensors
        .map(|tensor| (tensor.name.clone(), tensor.bytes().unwrap().into_owned()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_converted_adapter_merges_as_its_source_does() {
    let mut exact = 0;
    for (case, adapters, bases, _) in SPELLED {
        for adapter in *adapters {
            let from = spelled(case, adapter);
            // Two layers do not tell FLUX.1 from FLUX.2.
            let family = (*case == "flux_fused").then_some("flux1");
            for target in convert::targets() {
                let room = tempfile::tempdir().unwrap();
                let output = room.path().join("converted");
                let report = match converted(&from, target.id(), family, &output) {
                    Ok(report) => report,
                    Err(error) => {
                        // These have no names for image models.
                        let nameless = ["gguf", "torchtune", "simo"].contains(&target.id());
                        let unnamed = nameless && error.kind() == Kind::Unresolved;
                        let lossy = unnamed || matches!(error.reason(), Reason::Losses { .. });
                        assert!(lossy, "{adapter} to {}: {error:?}", target.id());
                        assert!(!output.exists());
                        continue;
                    }
                };
                for (base, expected) in *bases {
                    let base = spelled(case, base);
                    let ours = with_alpha(&base, &output, 1.0, report.alpha);
                    let expected = TensorFile::open(spelled(case, expected)).unwrap();
                    let name = format!("{case}: {adapter} to {}", target.id());
                    let compared = compare(&name, &ours, &expected, "");
                    assert_eq!(compared, expected.directory.tensors.len());
                    if report.folded.is_empty() {
                        let theirs = merged(&base, &from, 1.0);
                        assert_eq!(bytes_of(&ours), bytes_of(&theirs), "{name}");
                        exact += 1;
                    }
                }
            }
        }
    }
    assert!(exact > 20, "{exact}");
}

#[test]
fn a_folder_of_peft_and_a_file_of_diffusers_are_each_others_conversion() {
    let Some(adapters) = crate::real_adapters::folder() else {
        return;
    };
    let file = adapters.join("diffusers-new-sd15-metadata/pytorch_lora_weights.safetensors");
    let folder = adapters.join("diffusers-new-sd15-peft-twin");
    let room = tempfile::tempdir().unwrap();
    for (from, to, name, twin) in [
        (
            &file,
            "peft",
            "adapter_model.safetensors",
            &folder.join("adapter_model.safetensors"),
        ),
        (
            &folder,
            "diffusers",
            "pytorch_lora_weights.safetensors",
            &file,
        ),
    ] {
        let output = room.path().join(to);
        converted(from, to, None, &output).unwrap();
        let ours = TensorFile::open(output.join(name)).unwrap();
        let theirs = bytes_of(&TensorFile::open(twin).unwrap());
        // The file was written for one part, without its name.
        let bare = |(name, bytes): (String, Vec<u8>)| match name.strip_prefix("unet.") {
            Some(bare) => (bare.to_owned(), bytes),
            None => (name, bytes),
        };
        let ours: Vec<_> = bytes_of(&ours).into_iter().map(bare).collect();
        assert_eq!(ours, theirs);
        let scale = |path: &Path| {
            let adapter = Found::open(path)
                .unwrap()
                .read(&ReadOptions::default())
                .unwrap();
            adapter
                .modules
                .iter()
                .map(|module| module.scale.value)
                .collect::<Vec<_>>()
        };
        assert_eq!(scale(&output), scale(from));
    }
}

#[test]
fn layers_with_numbers_alone_are_those_of_the_table() {
    let room = tempfile::tempdir().unwrap();
    let from = spelled("unet_attn", "diffusers_new");
    let adapter = Found::open(&from).unwrap();
    let adapter = adapter.read(&ReadOptions::default()).unwrap();
    let table = room.path().join("order.txt");
    let paths: Vec<&str> = adapter.modules.iter().map(|module| &*module.path).collect();
    std::fs::write(&table, format!("\n{} \n", paths.join("\n"))).unwrap();
    let order = Order::read(table.to_str().unwrap()).unwrap();
    let options = |order: Option<Order>| convert::Options {
        adapter: from.clone(),
        to: "simo".to_owned(),
        output: room.path().join("numbered.safetensors"),
        read: ReadOptions {
            order,
            ..ReadOptions::default()
        },
        ..convert::Options::default()
    };
    let unordered = convert::plan(&options(None)).map(drop).unwrap_err();
    assert!(
        matches!(unordered.reason(), Reason::OrderNeeded),
        "{unordered:?}"
    );
    let numbered = options(Some(order.clone()));
    let report = convert::plan(&numbered)
        .unwrap()
        .run(&Control::default())
        .unwrap();
    assert_eq!(report.modules, paths.len());
    let file = TensorFile::open(&numbered.output).unwrap();
    assert!(file.tensor("unet:0:up").is_some());
    let told = |key: &str| {
        let mut told = file.directory.metadata.iter();
        told.find(|(known, _)| known == key)
            .map(|(_, value)| value.clone())
    };
    assert_eq!(told("unet:0:rank").as_deref(), Some("4"));
    // Its loader takes a pair for every layer below these classes; the table has none below GEGLU.
    let classes = r#"["CrossAttention", "Attention"]"#;
    assert_eq!(told("unet").as_deref(), Some(classes));
    // It says nothing without the table, and everything with it.
    let open = || Found::open(&numbered.output).unwrap();
    let error = open().read(&ReadOptions::default()).unwrap_err();
    assert!(matches!(error.reason(), Reason::Ordinals), "{error:?}");
    let output = room.path().join("merged.safetensors");
    let mut merging =
        crate::support::options(&spelled("unet_attn", "unet"), &numbered.output, &output);
    merging.read.order = Some(order.clone());
    merge(&merging).unwrap();
    let expected = TensorFile::open(spelled("unet_attn", "unet_merged")).unwrap();
    let compared = compare("simo", &TensorFile::open(&output).unwrap(), &expected, "");
    assert_eq!(compared, expected.directory.tensors.len());
    // Another number of layers is another model.
    for lines in [paths[1..].to_vec(), [&paths[..], &["unet.a"]].concat()] {
        std::fs::write(&table, lines.join("\n")).unwrap();
        let order = Some(Order::read(table.to_str().unwrap()).unwrap());
        let read = ReadOptions {
            order,
            ..ReadOptions::default()
        };
        assert_eq!(open().read(&read).unwrap_err().kind(), Kind::Malformed);
    }
    for bad in ["down_blocks.0.a", "unet."] {
        std::fs::write(&table, bad).unwrap();
        assert_eq!(
            Order::read(table.to_str().unwrap()).unwrap_err().kind(),
            Kind::Usage
        );
    }
}

#[test]
fn a_file_of_cloneofsimo_goes_to_diffusers_and_back() {
    let Some(adapters) = crate::real_adapters::folder() else {
        return;
    };
    let order = Some(Order::read("sd1").unwrap());
    let room = tempfile::tempdir().unwrap();
    let from = adapters.join("simo-disney-pti/lora_disney.safetensors");
    let go = |from: &Path, to: &str, output: &str| {
        let options = convert::Options {
            adapter: from.to_owned(),
            to: to.to_owned(),
            output: room.path().join(output),
            // diffusers has no place for its two tokens.
            allow_losses: to == "diffusers",
            read: ReadOptions {
                order: order.clone(),
                ..ReadOptions::default()
            },
            ..convert::Options::default()
        };
        let report = convert::plan(&options)
            .unwrap()
            .run(&Control::default())
            .unwrap();
        assert_eq!(report.modules, 144 + 48, "{to}");
        options.output
    };
    let there = go(&from, "diffusers", "there.safetensors");
    let back = go(&there, "simo", "back.safetensors");
    let again = go(&from, "simo", "again.safetensors");
    let all = |path: &Path| bytes_of(&TensorFile::open(path).unwrap());
    assert_eq!(all(&again), all(&from));
    let metadata = TensorFile::open(&back).unwrap().directory.metadata;
    let mut gated = metadata.iter().filter(|(_, text)| text.contains("GEGLU"));
    assert_eq!(gated.next().map(|(key, _)| &**key), Some("unet"));
    let ours = all(&back);
    let mut theirs = bytes_of(&TensorFile::open(&from).unwrap());
    theirs.retain(|(name, _)| !name.starts_with('<'));
    assert_eq!(ours, theirs);
    let file = TensorFile::open(&there).unwrap();
    let key = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight";
    assert_eq!(file.tensor(key).unwrap().shape, [1, 768]);
    let list = adapters.join("simo-kiriko2-te-list-pt/lora_kiriko2.text_encoder.pt");
    let read = ReadOptions {
        order,
        ..ReadOptions::default()
    };
    let adapter = Found::open(&list).unwrap().read(&read).unwrap();
    assert_eq!(adapter.modules.len(), 48);
    let path = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj";
    assert_eq!(adapter.modules[0].path, path);
}

fn stored(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Stored {
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

fn ones(shape: &[usize]) -> Stored {
    let count = shape.iter().product();
    let bytes = std::iter::repeat_n(1f32.to_le_bytes(), count).flatten();
    stored(DType::F32, shape, bytes.collect())
}

fn read(tensors: &[(&str, Stored)]) -> Result<loratool::adapter::Adapter, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    write_safetensors(&path, tensors);
    Found::open(&path)?.read(&ReadOptions::default())
}

#[test]
fn alpha_is_one_element_of_any_rank_and_type() {
    for (dtype, shape, bytes, alpha) in [
        (DType::F32, &[][..], 8f32.to_le_bytes().to_vec(), 8.0),
        (DType::F16, &[1][..], vec![0x00, 0x48], 8.0),
        (DType::BF16, &[1, 1][..], vec![0x00, 0x41], 8.0),
        (DType::I64, &[][..], 8i64.to_le_bytes().to_vec(), 8.0),
        (DType::I8, &[1][..], vec![0xfe], -2.0),
        (DType::U8, &[1][..], vec![0xfe], 254.0),
    ] {
        let adapter = read(&[
            ("lora_unet_a.lora_down.weight", ones(&[2, 3])),
            ("lora_unet_a.lora_up.weight", ones(&[4, 2])),
            ("lora_unet_a.alpha", stored(dtype, shape, bytes)),
        ])
        .unwrap();
        let module = &adapter.modules[0];
        assert_eq!(module.scale.value, alpha / 2.0, "{dtype:?}");
        assert_eq!(module.spelling, Spelling::Flattened);
    }
    let adapter = read(&[
        ("lora_unet_a.lora_down.weight", ones(&[2, 3])),
        ("lora_unet_a.lora_up.weight", ones(&[4, 2])),
    ])
    .unwrap();
    assert_eq!(adapter.modules[0].scale.value, 1.0, "alpha is the rank");
}

#[test]
fn other_methods_and_leftovers_are_refused_with_all_cases() {
    let error = read(&[
        ("lora_unet_a.hada_w1_a", ones(&[2, 3])),
        ("lora_unet_b.lokr_w1", ones(&[4, 2])),
    ])
    .unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.cases(), ["lora_unet_a: LoHa", "lora_unet_b: LoKr"]);
    let error = read(&[
        ("lora_unet_a.alpha", ones(&[])),
        ("lora_unet_b.lora_down.weight", ones(&[4, 2])),
    ])
    .unwrap_err();
    assert_eq!(error.cases().len(), 2, "{error}");
    let error = read(&[("lora_unet_a.lora_what", ones(&[]))]).unwrap_err();
    assert_eq!(error.kind(), Kind::Malformed);
    let norms = read(&[
        ("lora_unet_a.lora_down.weight", ones(&[2, 4])),
        ("lora_unet_a.lora_up.weight", ones(&[4, 2])),
        ("lora_unet_a.dora_scale", ones(&[4])),
    ])
    .unwrap_err();
    assert!(norms.to_string().contains("cannot be told"), "{norms}");
}
