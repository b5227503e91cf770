//! Names that aim at the terminal of whoever looks.

use std::path::Path;

use loratool::formats::{Found, ReadOptions};
use loratool::notice::{Notice, NoticeKind};
use loratool::ops::merge::{Report, plan};
use loratool::{Error, Reason, printable, printable_json};

use crate::hostile_support::{
    Room, SMALL_CONFIG, assert_clean, assert_printable, file_of, small_adapter, small_base, tensors,
};
use crate::support::options;

/// Escape sequences, line breaks, bidirectional marks, invisible characters: names of an attacker.
const FOUL: &[&str] = &[
    "\u{1b}[2J\u{1b}[31mred",
    "\u{1b}]0;title\u{7}",
    "\u{1b}]8;;https://example.org\u{1b}\\link",
    "line\nerror: forged",
    "back\rspace\u{8}\u{7f}",
    "tab\tnul\0",
    "csi\u{9b}31m",
    "next\u{85}line",
    "rtl\u{202e}gnp.exe",
    "isolate\u{2066}x\u{2069}",
    "zero\u{200b}width\u{200d}joiner\u{feff}",
    "soft\u{ad}hyphen",
    "separator\u{2028}paragraph\u{2029}",
];

/// A file of tensors with one name and any shape and offsets.
fn one(name: &str, rest: &str, data: usize) -> Vec<u8> {
    let name = serde_json::Value::from(name);
    file_of(format!("{{{name}:{rest}}}"), vec![0; data])
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Asserts that an error shows no foul character, shows the rest, and still ends with its reason.
fn assert_safe(error: &Error) {
    assert_printable(error);
    let reason = printable(&error.reason().to_string()).into_owned();
    assert!(error.to_string().contains(&reason), "{error:?}");
    assert_clean(&format!("{:?}", error.reason()));
    if let Some(hint) = error.hint() {
        assert_clean(hint);
    }
    // One line, whatever the names hold: a second one would be a forged message.
    assert!(!error.to_string().contains('\n'), "{error}");
    let lines = format!("{error:?}").lines().count();
    assert_eq!(lines, 1 + error.cases().len(), "{error:?}");
}

fn assert_notice_safe(notice: &Notice) {
    assert_clean(&notice.to_string());
    assert!(!notice.to_string().contains('\n'), "{notice}");
    assert_clean(&format!("{notice:?}"));
    assert!(!format!("{notice:?}").contains('\n'), "{notice:?}");
}

fn read(folder: &Path) -> loratool::Result<loratool::adapter::Adapter> {
    Found::open(folder)?.read(&ReadOptions::default())
}

#[test]
fn foul_tensor_names_are_escaped_in_every_refusal_of_a_file() {
    for foul in FOUL {
        let room = Room::new();
        let sound = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        let name = quoted(foul);
        for bytes in [
            one(foul, &sound.replace("[0,1]", "[1,0]"), 1),
            one(foul, &sound.replace("[0,1]", "[0,9]"), 1),
            one(foul, &sound.replace("[1]", "[2]"), 1),
            one(foul, &sound.replace("U8", foul), 1),
            file_of(format!("{{{name}:{sound},{name}:{sound}}}"), [0]),
            file_of(format!("{{{name}:{sound},\"\":{sound}}}"), [0]),
            file_of(format!("{{{name}:{sound},\"~~~~\":{sound}}}"), [0]),
            file_of(
                format!("{{\"__metadata__\":{{{name}:\"\",{name}:\"\"}}}}"),
                [],
            ),
            file_of(format!("{{\"a\":{{{name}:1}}}}"), []),
        ] {
            let path = room.write("x.safetensors", bytes);
            let error = loratool::containers::TensorFile::open(path).map(drop);
            assert_safe(&error.unwrap_err());
        }
    }
}

#[test]
fn foul_keys_of_an_adapter_are_escaped_in_errors_and_notices() {
    for foul in FOUL {
        let room = Room::new();
        room.write("adapter_config.json", SMALL_CONFIG);
        let unknown = format!("base_model.model.{foul}.hada_w1_a");
        room.write("adapter_model.safetensors", tensors(&[(&unknown, &[2, 2])]));
        let error = read(room.root()).unwrap_err();
        assert!(matches!(error.reason(), Reason::UnknownKeys { .. }));
        assert_safe(&error);
        let alone = format!("base_model.model.{foul}.lora_A.weight");
        room.write("adapter_model.safetensors", tensors(&[(&alone, &[2, 2])]));
        assert_safe(&read(room.root()).unwrap_err());
        let named = format!("base_model.model.m.lora_A.{foul}.weight");
        let other = "base_model.model.m.lora_B.other.weight";
        room.write(
            "adapter_model.safetensors",
            tensors(&[(&named, &[2, 2]), (other, &[2, 2])]),
        );
        assert_safe(&read(room.root()).unwrap_err());
        // A whole tensor of that name is accepted, and noticed as odd.
        let whole = format!("base_model.model.{foul}.weight");
        room.write("adapter_model.safetensors", tensors(&[(&whole, &[2, 2])]));
        let adapter = read(room.root()).unwrap();
        let odd = |notice: &&Notice| notice.kind == NoticeKind::OddName;
        assert_eq!(adapter.notices.iter().filter(odd).count(), 1, "{foul:?}");
        adapter.notices.iter().for_each(assert_notice_safe);
    }
}

#[test]
fn foul_words_in_a_configuration_are_escaped() {
    for foul in FOUL {
        let word = quoted(foul);
        let fields = [
            format!("\"peft_type\": {word}"),
            format!("\"bias\": {word}"),
            format!("\"init_lora_weights\": {word}"),
            format!("\"kasa_config\": {word}"),
            format!("\"unknown\": {word}"),
            format!("{word}: 1"),
            format!("{word}: 1, {word}: 2"),
            format!("\"rank_pattern\": {{{}: 2}}", quoted(&format!("({foul}"))),
            format!("\"feedforward_modules\": {}", quoted(&format!("({foul}"))),
            word.to_string(),
        ];
        for field in fields {
            let room = Room::new();
            room.write("adapter_model.safetensors", small_adapter());
            room.write(
                "adapter_config.json",
                format!("{{\"r\": 2, \"lora_alpha\": 4, {field}}}"),
            );
            assert_safe(&read(room.root()).unwrap_err());
        }
        // Where it is accepted it comes back in a notice.
        let room = Room::new();
        room.write("adapter_model.safetensors", small_adapter());
        let config = format!(
            "{{\"r\": 2, \"lora_alpha\": 4, {word}: null, \"base_model_name_or_path\": {}}}",
            quoted(&format!("{foul}-4bit"))
        );
        room.write("adapter_config.json", config);
        let adapter = read(room.root()).unwrap();
        assert_eq!(adapter.notices.len(), 2);
        adapter.notices.iter().for_each(assert_notice_safe);
    }
}

#[test]
#[cfg(unix)]
fn foul_file_names_are_escaped() {
    for foul in FOUL.iter().filter(|foul| !foul.contains(['\0', '/'])) {
        let room = Room::new();
        let path = room.write(&format!("{foul}.safetensors"), "x");
        let error = loratool::containers::TensorFile::open(&path).map(drop);
        assert_safe(&error.unwrap_err());
        let missing = room.path(&format!("{foul}-missing"));
        assert_safe(
            &loratool::mapped::Input::open(missing)
                .map(drop)
                .unwrap_err(),
        );
        // An output is named by the user, but may come from a script that did not look.
        let folder = room.folder(foul);
        let error = plan(&options(&folder, &folder, &room.path("out"))).map(drop);
        assert_safe(&error.unwrap_err());
    }
    use std::os::unix::ffi::OsStrExt;
    let room = Room::new();
    let bytes = std::ffi::OsStr::from_bytes(b"not\xffutf8\x1b[2J");
    std::fs::write(room.root().join(bytes), "x").unwrap();
    let error = loratool::containers::TensorFile::open(room.root().join(bytes)).map(drop);
    assert_safe(&error.unwrap_err());
}

#[test]
fn foul_names_in_an_index_are_escaped() {
    for foul in FOUL {
        let word = quoted(foul);
        for map in [
            format!("{{\"a\": {word}}}"),
            format!("{{{word}: \"one.safetensors\"}}"),
            format!("{{{word}: 1}}"),
            format!("{{{word}: \"x\", {word}: \"y\"}}"),
        ] {
            let room = Room::new();
            room.write("one.safetensors", small_base());
            room.write(
                "model.safetensors.index.json",
                format!("{{\"weight_map\": {map}}}"),
            );
            let error = loratool::checkpoint::Checkpoint::open(room.root()).map(drop);
            assert_safe(&error.unwrap_err());
        }
        // A stray tensor of that name is accepted, and noticed.
        let room = Room::new();
        room.write("one.safetensors", tensors(&[("a", &[1]), (foul, &[1])]));
        room.write(
            "model.safetensors.index.json",
            "{\"weight_map\": {\"a\": \"one.safetensors\"}}",
        );
        let base = loratool::checkpoint::Checkpoint::open(room.root()).unwrap();
        assert_eq!(base.notices.len(), 1);
        base.notices.iter().for_each(assert_notice_safe);
    }
}

#[test]
fn foul_names_are_escaped_when_adapter_and_base_do_not_meet() {
    for foul in FOUL {
        let room = Room::new();
        let base = room.write("base.safetensors", tensors(&[(foul, &[4, 3])]));
        room.write("adapter/adapter_config.json", SMALL_CONFIG);
        let names = ["A", "B"].map(|f| format!("base_model.model.{foul}.lora_{f}.weight"));
        let weights = tensors(&[(&names[0], &[2, 3]), (&names[1], &[4, 2])]);
        room.write("adapter/adapter_model.safetensors", weights);
        let options = options(&base, &room.path("adapter"), &room.path("out.safetensors"));
        assert_safe(&plan(&options).map(drop).unwrap_err());
        // With such a module in the base the merge goes on, and its report is JSON with the true name.
        let weight = format!("{foul}.weight");
        room.write("base.safetensors", tensors(&[(&weight, &[4, 3])]));
        let report: Report = plan(&options).unwrap().report();
        report.notices.iter().for_each(assert_notice_safe);
        let odd = |notice: &&Notice| notice.kind == NoticeKind::OddName;
        assert!(report.notices.iter().any(|notice| odd(&notice)));
        let json = serde_json::to_string_pretty(&report).unwrap();
        let json = printable_json(&json);
        assert_clean(&json);
        let back: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert!(back.to_string().contains(quoted(foul).trim_matches('"')));
    }
}

#[test]
fn a_name_of_any_length_leaves_the_reason_in_sight() {
    let name = "n".repeat(4096);
    let room = Room::new();
    let bytes = one(
        &name,
        r#"{"dtype":"U8","shape":[2],"data_offsets":[0,1]}"#,
        1,
    );
    let error = loratool::containers::TensorFile::open(room.write("x", bytes)).map(drop);
    let error = error.unwrap_err();
    assert!(
        error.to_string().ends_with(&error.reason().to_string()),
        "{error}"
    );
    // Neither does a long value make an endless line.
    let room = Room::new();
    room.write("adapter_model.safetensors", small_adapter());
    let config = format!(
        "{{\"r\": 2, \"lora_alpha\": 4, \"kasa_config\": \"{}\"}}",
        "v".repeat(1 << 20)
    );
    room.write("adapter_config.json", config);
    let error = read(room.root()).unwrap_err();
    assert!(error.to_string().len() < 10_000);
    assert!(error.to_string().contains("kasa_config"));
}

#[test]
fn printable_escapes_what_acts_and_leaves_the_rest() {
    for plain in [
        "model.layers.0.q_proj",
        "gewicht-ä.文",
        "a b",
        "\\u{1b}",
        "🦀",
        "e\u{301}",
        "",
    ] {
        assert_eq!(printable(plain), plain);
        assert!(matches!(printable(plain), std::borrow::Cow::Borrowed(_)));
    }
    assert_eq!(printable("\u{1b}[2J"), "\\u{1b}[2J");
    assert_eq!(printable("a\nb\tc\0"), "a\\u{a}b\\u{9}c\\u{0}");
    // Controls, and everything that Unicode calls ignorable by default: it has no shape of its own.
    let ranges: &[(u32, u32)] = &[
        (0x0, 0x1f),
        (0x7f, 0x9f),
        (0xad, 0xad),
        (0x34f, 0x34f),
        (0x61c, 0x61c),
        (0x115f, 0x1160),
        (0x17b4, 0x17b5),
        (0x180b, 0x180f),
        (0x200b, 0x200f),
        (0x2028, 0x202e),
        (0x2060, 0x206f),
        (0x3164, 0x3164),
        (0xfe00, 0xfe0f),
        (0xfeff, 0xfeff),
        (0xffa0, 0xffa0),
        (0xfff0, 0xfffb),
        (0x1bca0, 0x1bca3),
        (0x1d173, 0x1d17a),
        (0xe0000, 0xe0fff),
    ];
    for number in 0..=0x10_ffff {
        let Some(character) = char::from_u32(number) else {
            continue;
        };
        let foul = ranges
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&number));
        let expected = match foul {
            true => format!("\\u{{{number:x}}}"),
            false => character.to_string(),
        };
        assert_eq!(printable(&character.to_string()), expected);
    }
}

#[test]
fn json_that_is_printable_has_the_same_value() {
    for number in 0..=0x10_ffff {
        let Some(character) = char::from_u32(number) else {
            continue;
        };
        let value = serde_json::json!({ character.to_string(): [format!("a{character}b")] });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = printable_json(&text);
        assert_eq!(printable(&shown.replace('\n', "")), shown.replace('\n', ""));
        if shown != text {
            assert_eq!(
                serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
                value
            );
        }
    }
}

#[test]
fn printable_cuts_after_4096_characters_and_never_inside_one() {
    for character in ["a", "ä", "文", "🦀"] {
        let long = character.repeat(5000);
        let shown = printable(&long);
        assert_eq!(shown.chars().count(), 4097);
        assert!(shown.ends_with('…'));
        let whole = character.repeat(4096);
        assert_eq!(printable(&whole), whole);
    }
}
