//! Indices that lie about their shards, and folders that are laid out oddly.

use std::path::Path;

use loratool::checkpoint::Checkpoint;
use loratool::notice::NoticeKind;
use loratool::{Error, Reason};

use crate::hostile_support::{Room, assert_printable, assert_reason, tensors, within_a_second};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// A folder with two sound shards, `a` in the first and `b` in the second, and this index.
fn room_with(index: impl AsRef<[u8]>) -> Room {
    let room = Room::new();
    room.write("base/one.safetensors", tensors(&[("a", &[2])]));
    room.write("base/two.safetensors", tensors(&[("b", &[3])]));
    room.write(&format!("base/{INDEX}"), index);
    room
}

fn map(entries: &[(&str, &str)]) -> String {
    let map: serde_json::Map<String, serde_json::Value> = entries
        .iter()
        .map(|(tensor, shard)| ((*tensor).to_owned(), (*shard).into()))
        .collect();
    serde_json::json!({"metadata": {"total_size": 20}, "weight_map": map}).to_string()
}

const BOTH: &[(&str, &str)] = &[("a", "one.safetensors"), ("b", "two.safetensors")];

/// Opens a folder within a second.
fn open(folder: &Path) -> loratool::Result<Checkpoint> {
    let folder = folder.to_owned();
    within_a_second(move || Checkpoint::open(folder))
}

fn refused(room: &Room) -> Error {
    let error = open(&room.path("base")).map(drop).unwrap_err();
    assert_printable(&error);
    assert!(error.file().unwrap().starts_with(room.path("base")));
    error
}

/// The refusal of an index, which must be named.
fn refused_index(index: impl AsRef<[u8]>) -> Error {
    let room = room_with(index);
    let error = refused(&room);
    assert!(error.file().unwrap().ends_with(INDEX), "{error}");
    error
}

#[test]
fn an_index_that_agrees_with_its_shards_is_accepted() {
    let room = room_with(map(BOTH));
    let base = open(&room.path("base")).unwrap();
    assert!(base.notices.is_empty());
    assert_eq!(base.shards.len(), 2);
    assert_eq!(base.tensor("b").unwrap().shape, [3]);
    // Without the metadata, with a mark in front, and with other fields.
    for index in [
        r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#.to_owned(),
        format!("\u{feff}{}", map(BOTH)),
        map(BOTH).replacen('{', r#"{"more": [1], "#, 1),
        map(BOTH).replace(r#"{"total_size":20}"#, "null"),
    ] {
        assert!(open(&room_with(index).path("base")).is_ok());
    }
}

#[test]
fn shards_outside_the_folder_are_never_opened() {
    let secret = Room::new();
    let outside = secret.write("outside.safetensors", tensors(&[("a", &[2])]));
    let outside = outside.to_str().unwrap();
    let long = "n".repeat(256);
    for name in [
        "../outside.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        outside,
        "sub/one.safetensors",
        "./one.safetensors",
        "one.safetensors/",
        "..\\outside.safetensors",
        "sub\\one.safetensors",
        "C:one.safetensors",
        "one.safetensors:stream",
        "one.safetensors\0",
        "one\n.safetensors",
        "one\u{1b}[2J.safetensors",
        "one\u{202e}.safetensors",
        "one\u{200b}.safetensors",
        "file:///etc/passwd",
        "https://example.org/one.safetensors",
        &long,
    ] {
        let room = room_with(map(&[("a", name), ("b", "two.safetensors")]));
        // What the names could reach, were they followed.
        room.write("outside.safetensors", tensors(&[("a", &[2])]));
        room.write("base/sub/one.safetensors", tensors(&[("a", &[2])]));
        let error = refused(&room);
        assert_reason!(error, Reason::ShardName { name: found } if found == name);
        assert!(error.file().unwrap().ends_with(INDEX), "{error}");
        assert_eq!(error.item(), Some("a"));
    }
}

#[test]
fn a_shard_that_is_missing_is_refused_by_name() {
    let error = refused_index(map(&[("a", "one.safetensors"), ("b", "three.safetensors")]));
    assert_reason!(error, Reason::ShardMissing { name } if name == "three.safetensors");
}

#[test]
fn a_shard_that_is_no_file_of_tensors_is_refused_by_its_own_name() {
    let entries = [("a", "one.safetensors"), ("b", "three.safetensors")];
    let room = room_with(map(&entries));
    let shard = room.write(
        "base/three.safetensors",
        "version https://git-lfs.github.com/spec/v1",
    );
    let error = refused(&room);
    assert_reason!(error, Reason::LfsPointer);
    assert_eq!(error.file(), Some(shard.as_path()));
    std::fs::remove_file(&shard).unwrap();
    room.folder("base/three.safetensors");
    assert_reason!(refused(&room), Reason::NotARegularFile { what: "a folder" });
    // An index that names itself.
    let error = refused(&room_with(map(&[("a", INDEX), ("b", "two.safetensors")])));
    assert_reason!(error, Reason::Json);
}

#[test]
fn tensors_that_their_shard_does_not_hold_are_refused_and_listed_all() {
    let error = refused_index(map(&[
        ("a", "two.safetensors"),
        ("b", "two.safetensors"),
        ("c", "one.safetensors"),
    ]));
    assert_reason!(error, Reason::NotInShard { shard } if shard == "two.safetensors");
    assert_eq!(error.item(), Some("a"));
    assert_eq!(error.cases(), ["a: two.safetensors", "c: one.safetensors"]);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let room = room_with(map(BOTH));
    room.write("base/two.safetensors", tensors(&[("a", &[2]), ("b", &[3])]));
    let error = refused(&room);
    assert_reason!(
        error,
        Reason::TwoShards { first, second }
            if first == "one.safetensors" && second == "two.safetensors"
    );
    assert_eq!(error.item(), Some("a"));
}

#[test]
fn a_tensor_that_the_index_leaves_out_is_noticed() {
    let room = room_with(map(BOTH));
    room.write(
        "base/two.safetensors",
        tensors(&[("b", &[3]), ("stray", &[1])]),
    );
    let base = open(&room.path("base")).unwrap();
    let [notice] = base.notices.as_slice() else {
        panic!("{:?}", base.notices);
    };
    assert_eq!(notice.kind, NoticeKind::Contradiction);
    assert_eq!(notice.item.as_deref(), Some("stray"));
    assert!(notice.file.as_ref().unwrap().ends_with(INDEX));
}

#[test]
fn both_layouts_at_once_are_refused() {
    let room = room_with(map(BOTH));
    room.write(&format!("base/{SINGLE}"), tensors(&[("a", &[2])]));
    let error = refused(&room);
    assert_reason!(error, Reason::BothLayouts { .. });
    assert_eq!(error.file(), Some(room.path("base").as_path()));
    // One file that an index names as its shard is one layout.
    let room = Room::new();
    room.write(&format!("base/{SINGLE}"), tensors(&[("a", &[2])]));
    room.write(&format!("base/{INDEX}"), map(&[("a", SINGLE)]));
    assert!(open(&room.path("base")).is_ok());
}

#[test]
fn keys_that_appear_twice_in_an_index_are_refused() {
    for (index, twice) in [
        (
            r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors","a":"two.safetensors"}}"#,
            "a",
        ),
        (
            r#"{"weight_map":{"a":"one.safetensors","\u0061":"one.safetensors"}}"#,
            "a",
        ),
        (
            r#"{"weight_map":{"a":"one.safetensors"},"weight_map":{"b":"two.safetensors"}}"#,
            "weight_map",
        ),
        (
            r#"{"metadata":{"total_size":1,"total_size":2},"weight_map":{}}"#,
            "total_size",
        ),
    ] {
        assert_reason!(refused_index(index), Reason::DuplicateKey { key } if key == twice);
    }
}

#[test]
fn an_index_of_another_form_is_refused() {
    assert_reason!(
        refused_index("{}"),
        Reason::FieldMissing {
            field: "weight_map"
        }
    );
    for (index, item) in [
        (r#"{"weight_map": []}"#, "weight_map"),
        (r#"{"weight_map": null}"#, "weight_map"),
        (r#"{"weight_map": "one.safetensors"}"#, "weight_map"),
        (r#"{"weight_map": {"a": 1}}"#, "a"),
        (r#"{"weight_map": {"a": ["one.safetensors"]}}"#, "a"),
        (r#"{"weight_map": {"a": null}}"#, "a"),
        (r#"{"metadata": 3, "weight_map": {}}"#, "metadata"),
    ] {
        let error = refused_index(index);
        assert_reason!(error, Reason::FieldType { .. });
        assert_eq!(error.item(), Some(item));
    }
    assert_reason!(refused_index("[]"), Reason::NotAnObject);
    assert_reason!(refused_index(""), Reason::NotJson { .. });
    assert_reason!(refused_index(b"{\"\xff\"}"), Reason::NotUtf8 { at: 2 });
    let deep = format!("{{\"x\":{}", "[".repeat(100_000));
    assert_reason!(refused_index(deep), Reason::TooDeep { limit: 128 });
    let error = refused(&room_with(r#"{"weight_map": {}}"#));
    assert_reason!(error, Reason::NoTensors);
}

#[test]
fn an_index_with_more_values_than_the_limit_is_refused() {
    let entries: Vec<String> = (0..1_000_001).map(|n| format!("\"{n}\":\"s\"")).collect();
    let index = format!("{{\"weight_map\":{{{}}}}}", entries.join(","));
    assert_reason!(
        refused_index(index),
        Reason::TooMany {
            what: "values",
            limit: 1_000_000
        }
    );
}

#[test]
fn an_index_with_many_stray_tensors_and_statements_is_read_in_linear_time() {
    use crate::support::{merge, options};
    let names: Vec<String> = (0..30_000).map(|n| format!("t{n}")).collect();
    let mut all: Vec<(&str, &[usize])> =
        names.iter().map(|n| (n.as_str(), &[0usize][..])).collect();
    all.push(("m.weight", &[4, 3]));
    let room = Room::new();
    room.write("base/one.safetensors", tensors(&all));
    let statements: Vec<String> = (0..100_000).map(|n| format!("\"s{n}\":1")).collect();
    room.write(
        &format!("base/{INDEX}"),
        format!(
            r#"{{"metadata":{{{}}},"weight_map":{{"m.weight":"one.safetensors"}}}}"#,
            statements.join(",")
        ),
    );
    room.write(
        "adapter/adapter_config.json",
        crate::hostile_support::SMALL_CONFIG,
    );
    room.write(
        "adapter/adapter_model.safetensors",
        crate::hostile_support::small_adapter(),
    );
    let (base, adapter, output) = (room.path("base"), room.path("adapter"), room.path("out"));
    let index = output.join(INDEX);
    within_a_second(move || merge(&options(&base, &adapter, &output)).map(drop)).unwrap();
    let text = std::fs::read_to_string(index).unwrap();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap();
    // What the index left out stays out of it; what it stated is kept.
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 1);
    assert_eq!(index["metadata"].as_object().unwrap().len(), 100_001);
}

#[test]
fn a_folder_without_weights_is_refused_by_what_it_holds_instead() {
    let room = Room::new();
    room.folder("base");
    assert_reason!(refused(&room), Reason::NoCheckpoint);
    room.write("base/tf_model.h5", "x");
    assert_reason!(
        refused(&room),
        Reason::OtherCheckpoint { found } if found == "tf_model.h5"
    );
    room.write("base/adapter_config.json", "{}");
    assert_reason!(refused(&room), Reason::BaseIsAdapter);
}

#[test]
#[cfg(unix)]
fn the_cache_of_the_hub_with_its_links_is_accepted() {
    use std::os::unix::fs::symlink;
    let room = Room::new();
    let snapshot = room.folder("models--a--b/snapshots/0123");
    for (blob, name, bytes) in [
        ("11", "one.safetensors", tensors(&[("a", &[2])])),
        ("22", "two.safetensors", tensors(&[("b", &[3])])),
        ("33", INDEX, map(BOTH).into_bytes()),
        ("44", "config.json", b"{\"model_type\": \"x\"}".to_vec()),
    ] {
        room.write(&format!("models--a--b/blobs/{blob}"), bytes);
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    let base = open(&snapshot).unwrap();
    assert_eq!(base.tensor("b").unwrap().shape, [3]);
    assert!(base.config().is_some());
    // The folder itself may be a link as well.
    let link = room.path("link");
    symlink(&snapshot, &link).unwrap();
    assert!(open(&link).is_ok());
}

#[test]
#[cfg(unix)]
fn a_link_without_its_target_is_an_error_and_never_a_missing_file() {
    use std::os::unix::fs::symlink;
    for name in [INDEX, "config.json", "two.safetensors"] {
        let room = room_with(map(BOTH));
        let broken = room.path("base").join(name);
        let _ = std::fs::remove_file(&broken);
        symlink("../../blobs/0123", &broken).unwrap();
        let error = refused(&room);
        assert_reason!(error, Reason::Open);
        assert_eq!(error.file(), Some(broken.as_path()));
    }
    // An index that cannot be read must not leave the one file beside it as the model.
    let room = Room::new();
    room.write(&format!("base/{SINGLE}"), tensors(&[("a", &[2])]));
    symlink("nowhere", room.path("base").join(INDEX)).unwrap();
    assert_reason!(refused(&room), Reason::Open);
}
