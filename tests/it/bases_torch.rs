//! Torch files as bases: the result is that of the same tensors in safetensors.

use std::path::{Path, PathBuf};

use loratool::checkpoint::Checkpoint;
use loratool::containers::TensorFile;
use loratool::notice::{Notice, NoticeKind};
use loratool::ops::check::check;
use loratool::ops::inspect::inspect;
use loratool::ops::merge::{Options, Report};
use loratool::{Kind, Reason};

use crate::hostile_support::{Room, SMALL_CONFIG, assert_reason, names_in, small_adapter, tensors};
use crate::oracle::{self, Tensors};
use crate::output::fail_everywhere;
use crate::support::{fixture, merge, options};

fn base(name: &str) -> PathBuf {
    fixture("bases/torch").join(name)
}

/// A copy of a fixture, so that it can be changed.
fn copied(room: &Room, name: &str) -> PathBuf {
    for file in names_in(&base(name)) {
        let bytes = std::fs::read(base(name).join(&file)).unwrap();
        room.write(&format!("{name}/{file}"), bytes);
    }
    room.path(name)
}

/// An adapter for `m`, and one for both embeddings if asked for.
fn adapter(room: &Room) -> PathBuf {
    room.write("adapter/adapter_config.json", SMALL_CONFIG);
    room.write("adapter/adapter_model.safetensors", small_adapter());
    room.path("adapter")
}

fn merged(room: &Room, base: &Path, output: &str) -> (Report, Tensors) {
    let options = options(base, &adapter(room), &room.path(output));
    let report = merge(&options).unwrap();
    let tensors = report
        .files
        .iter()
        .flat_map(|file| oracle::read(&room.path(output).join(&file.name)))
        .collect();
    (report, tensors)
}

fn of_kind(notices: &[Notice], kind: NoticeKind) -> Vec<(Option<&str>, &str)> {
    let found = notices.iter().filter(|notice| notice.kind == kind);
    found
        .map(|notice| (notice.item.as_deref(), notice.text.as_str()))
        .collect()
}

#[test]
fn every_torch_base_merges_to_the_tensors_of_the_same_base_in_safetensors() {
    let room = Room::new();
    let (_, expected) = merged(&room, &base("plain"), "plain");
    assert_eq!(expected.len(), 10);
    for name in ["zip", "legacy", "shards", "lightning.ckpt", "deflated.pt"] {
        let output = format!("out-{}", name.replace('.', "-"));
        let (report, found) = merged(&room, &base(name), &output);
        assert_eq!(found, expected, "{name}");
        let shared = of_kind(&report.notices, NoticeKind::SharedTensor);
        assert!(shared[0].1.contains("`model.embed_tokens.weight`"));
        assert_eq!(shared.len(), 1, "{name}: {shared:?}");
        assert_eq!(shared[0].0, Some("lm_head.weight"));
        // Loaders of transformers ask for the first, those of safetensors know the second.
        let first = room.path(&output).join(&report.files[0].name);
        let metadata = TensorFile::open(first).unwrap().directory.metadata;
        let wanted = [
            ("format", "pt"),
            ("lm_head.weight", "model.embed_tokens.weight"),
        ];
        assert_eq!(metadata, wanted.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }
}

#[test]
fn every_tensor_is_aligned_to_its_type() {
    let room = Room::new();
    merged(&room, &base("zip"), "out");
    let file = TensorFile::open(room.path("out/model.safetensors")).unwrap();
    for tensor in &file.directory.tensors {
        let size = tensor.dtype.bitsize() as u64 / 8;
        assert_eq!(tensor.offset % size, 0, "{}", tensor.name);
    }
}

#[test]
fn shards_get_the_names_of_safetensors_and_an_index() {
    let room = Room::new();
    let (report, tensors) = merged(&room, &base("shards"), "out");
    let names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let files: Vec<&str> = report.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(files, names);
    let rest = [
        "config.json",
        names[0],
        names[1],
        "model.safetensors.index.json",
    ];
    assert_eq!(names_in(&room.path("out")), rest);
    let index = oracle::json(&room.path("out/model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), tensors.len());
    for name in names {
        for tensor in oracle::read(&room.path("out").join(name)).keys() {
            assert_eq!(map[tensor], name);
        }
    }
    let bytes: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    // The result is a base again.
    assert!(
        Checkpoint::open(room.path("out"))
            .unwrap()
            .notices
            .is_empty()
    );
}

#[test]
fn new_shards_of_a_torch_base_hold_the_same_tensors() {
    let room = Room::new();
    let (_, expected) = merged(&room, &base("plain"), "plain");
    let options = Options {
        shard_size: Some(60),
        ..options(&base("zip"), &adapter(&room), &room.path("out"))
    };
    let report = merge(&options).unwrap();
    assert!(report.files.len() > 2);
    let found: Tensors = report
        .files
        .iter()
        .flat_map(|file| oracle::read(&room.path("out").join(&file.name)))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn the_dictionary_around_the_weights_is_taken_off_and_the_training_left_out() {
    let room = Room::new();
    let (report, _) = merged(&room, &base("lightning.ckpt"), "out");
    let layout = of_kind(&report.notices, NoticeKind::BaseLayout);
    assert!(
        layout.len() == 1 && layout[0].1.contains("`state_dict`"),
        "{layout:?}"
    );
    let left = of_kind(&report.notices, NoticeKind::NotWeights);
    assert_eq!(left.len(), 1, "{left:?}");
    for name in [
        "optimizer_states.0.state.0.exp_avg",
        "optimizer_states.0.param_groups.0.lr",
        "epoch",
        "global_step",
    ] {
        assert!(left[0].1.contains(name), "{left:?}");
    }
    let found = inspect(&base("lightning.ckpt"), &Default::default()).unwrap();
    assert_eq!((found.what.as_str(), found.tensors), ("checkpoint", 10));
}

#[test]
fn an_output_embedding_that_is_not_tied_is_written_although_it_shares_its_storage() {
    let room = Room::new();
    let base = copied(&room, "zip");
    std::fs::write(
        base.join("config.json"),
        r#"{"tie_word_embeddings": false}"#,
    )
    .unwrap();
    let (report, tensors) = merged(&room, &base, "out");
    assert!(of_kind(&report.notices, NoticeKind::SharedTensor).is_empty());
    assert_eq!(
        tensors["lm_head.weight"],
        tensors["model.embed_tokens.weight"]
    );
}

#[test]
fn an_adapter_of_one_embedding_unties_a_torch_base_as_one_in_safetensors() {
    let room = Room::new();
    for module in ["lm_head", "model.embed_tokens"] {
        let (a, b) = match module {
            "lm_head" => ("lora_A.weight", "lora_B.weight"),
            _ => ("lora_embedding_A", "lora_embedding_B"),
        };
        // An embedding has its inputs, the tokens, along the other axis.
        let sizes: [[usize; 2]; 2] = match module {
            "lm_head" => [[2, 3], [6, 2]],
            _ => [[2, 6], [3, 2]],
        };
        let name = |factor: &str| format!("base_model.model.{module}.{factor}");
        let factors = tensors(&[(&name(a), &sizes[0]), (&name(b), &sizes[1])]);
        room.write("one/adapter_config.json", SMALL_CONFIG);
        room.write("one/adapter_model.safetensors", factors);
        let run = |base: PathBuf, output: &str| {
            let output = room.path(&format!("{output}-{module}"));
            merge(&options(&base, &room.path("one"), &output)).unwrap();
            let config = output.join("config.json");
            let tied = config
                .exists()
                .then(|| oracle::json(&config)["tie_word_embeddings"].clone());
            (oracle::read(&output.join("model.safetensors")), tied)
        };
        let (expected, tied) = run(base("plain"), "plain");
        assert_ne!(
            expected["lm_head.weight"],
            expected["model.embed_tokens.weight"]
        );
        assert_eq!(tied, Some(false.into()));
        assert_eq!(run(base("zip"), "zip"), (expected.clone(), tied));
        // Without a configuration the file itself says that they are one.
        assert_eq!(run(base("zip/pytorch_model.bin"), "bare").0, expected);
    }
}

#[test]
fn of_t5_the_shared_embedding_is_kept_and_of_others_the_first_name() {
    use loratool::checkpoint::Variant;
    // The fixture has one pair; its names are exchanged for others of the same length.
    let bytes = std::fs::read(base("legacy/pytorch_model.bin")).unwrap();
    let exchanged = |pairs: [(&str, &str); 2]| {
        let mut bytes = bytes.clone();
        for (old, new) in pairs {
            assert_eq!(old.len(), new.len());
            let found = |bytes: &[u8]| bytes.windows(old.len()).position(|w| w == old.as_bytes());
            while let Some(at) = found(&bytes) {
                bytes[at..at + old.len()].copy_from_slice(new.as_bytes());
            }
        }
        bytes
    };
    for (pairs, kept) in [
        (
            [
                ("model.embed_tokens.weight", "decoder.embed_token.weigh"),
                ("lm_head.weight", ".shared.weight"),
            ],
            ".shared.weight",
        ),
        (
            [
                ("model.embed_tokens.weight", "z.predictions.decod.weigh"),
                ("lm_head.weight", "a.embed.weight"),
            ],
            "a.embed.weight",
        ),
    ] {
        let room = Room::new();
        let path = room.write("x.pt", exchanged(pairs));
        let base = Checkpoint::open_variant(&path, &Variant::Only).unwrap();
        assert!(base.tensor(kept).is_some());
        let dropped = if pairs[0].1 == kept {
            pairs[1].1
        } else {
            pairs[0].1
        };
        assert!(base.tensor(dropped).is_none());
    }
}

#[test]
fn safetensors_beside_a_torch_file_count() {
    let room = Room::new();
    let folder = copied(&room, "plain");
    room.write("plain/pytorch_model.bin", "never opened");
    let (report, tensors) = merged(&room, &folder, "out");
    let layout = of_kind(&report.notices, NoticeKind::BaseLayout);
    assert!(
        layout.len() == 1 && layout[0].1.contains("safetensors"),
        "{layout:?}"
    );
    assert_eq!(report.not_copied, ["pytorch_model.bin"]);
    assert_eq!(tensors, merged(&room, &base("plain"), "alone").1);
}

#[test]
fn a_torch_index_beside_a_single_torch_file_is_refused() {
    let room = Room::new();
    let folder = copied(&room, "shards");
    std::fs::copy(
        base("zip/pytorch_model.bin"),
        folder.join("pytorch_model.bin"),
    )
    .unwrap();
    let error = Checkpoint::open(&folder).map(drop).unwrap_err();
    assert_reason!(
        error,
        Reason::BothLayouts { first, second }
            if first == "pytorch_model.bin" && second == "pytorch_model.bin.index.json"
    );
}

#[test]
fn a_damaged_storage_is_found_before_anything_is_written() {
    let room = Room::new();
    let folder = copied(&room, "zip");
    let adapter = adapter(&room);
    let path = folder.join("pytorch_model.bin");
    let file = TensorFile::open(&path).unwrap();
    // A tensor that is only copied.
    let at = file.tensor("m.bias").unwrap().offset as usize;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let before = room.names();
    let error = merge(&options(&folder, &adapter, &room.path("out"))).unwrap_err();
    assert_reason!(error, Reason::Checksum);
    assert_eq!(error.file(), Some(path.as_path()));
    assert_eq!(room.names(), before);
    let verdict = check(&folder, &Default::default());
    assert_eq!(verdict.exit_code, Kind::Malformed.exit_code());
    // What it was before passes.
    assert!(check(&base("zip"), &Default::default()).clean);
}

#[test]
fn an_output_that_is_named_as_another_kind_of_file_is_refused() {
    let room = Room::new();
    let file = base("zip/pytorch_model.bin");
    for name in ["out.bin", "out.ckpt", "out.gguf"] {
        let error = merge(&options(&file, &adapter(&room), &room.path(name))).unwrap_err();
        assert_reason!(error, Reason::BadOption { .. });
        assert!(error.to_string().contains(".safetensors"), "{error}");
    }
    let one = options(&file, &adapter(&room), &room.path("out.safetensors"));
    merge(&one).unwrap();
    let expected = merged(&room, &base("plain"), "plain").1;
    assert_eq!(oracle::read(&one.output), expected);
}

#[test]
fn a_failure_of_any_operation_leaves_no_half_result_of_a_torch_base() {
    let room = Room::new();
    for (name, output) in [("shards", "out"), ("deflated.pt", "out.safetensors")] {
        let options = Options {
            force: true,
            ..options(&base(name), &adapter(&room), &room.path(output))
        };
        fail_everywhere(&options, None);
    }
}

#[test]
fn a_folder_whose_only_weights_are_factors_is_an_adapter_and_no_base() {
    let room = Room::new();
    let loralib = |name: &str| fixture("formats/loralib").join(name);
    for name in ["pytorch_model.lora.bin", "pytorch_model.bin"] {
        let bytes = std::fs::read(loralib("lora_only.pt")).unwrap();
        let folder = room.write(&format!("{name}/{name}"), bytes);
        let folder = folder.parent().unwrap();
        let told = inspect(folder, &Default::default()).unwrap();
        assert_ne!(told.what, "checkpoint", "{name}");
        assert_eq!(told.format.as_deref(), Some("loralib"), "{name}");
        let refused = |base: &Path, adapter: &Path| {
            let options = options(base, adapter, &room.path("merged"));
            merge(&options).map(drop).unwrap_err()
        };
        assert_reason!(refused(folder, &adapter(&room)), Reason::BaseIsAdapter);
        let base = loralib("lora_only-base.safetensors");
        assert_reason!(refused(folder, &base), Reason::SwappedArguments);
        // The right way round only its alpha is missing.
        assert_reason!(refused(&base, folder), Reason::AlphaMissing);
    }
}
