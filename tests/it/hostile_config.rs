//! Configurations of PEFT that are refused, each by the name of its field, within a second.

use std::path::Path;

use loratool::adapter::Adapter;
use loratool::formats::{Found, ReadOptions};
use loratool::notice::NoticeKind;
use loratool::{Error, Reason, Result};

use crate::hostile_support::{
    Room, SMALL_CONFIG, assert_printable, assert_reason, small_adapter, small_base, tensors,
    within_a_second,
};
use crate::support::{merge, options};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

fn read_folder(folder: &Path, allowed: &[&str]) -> Result<Adapter> {
    let options = ReadOptions {
        allow_unknown_config: allowed.iter().map(|name| (*name).to_owned()).collect(),
        ..ReadOptions::default()
    };
    let folder = folder.to_owned();
    within_a_second(move || Found::open(&folder)?.read(&options))
}

/// Reads an adapter of these files.
fn read(config: impl AsRef<[u8]>, weights: impl AsRef<[u8]>) -> Result<Adapter> {
    let room = Room::new();
    room.write(CONFIG, config);
    room.write(WEIGHTS, weights);
    read_folder(room.root(), &[])
}

/// Reads the small adapter with this configuration.
fn configured(config: impl AsRef<[u8]>) -> Result<Adapter> {
    read(config, small_adapter())
}

/// The small configuration with more fields, which may repeat its own.
fn with(fields: &str) -> String {
    let object: Vec<&str> = ["peft_type", "r", "lora_alpha"]
        .into_iter()
        .filter(|name| !fields.contains(&format!("\"{name}\"")))
        .collect();
    let own: String = object
        .iter()
        .map(|name| match *name {
            "peft_type" => "\"peft_type\": \"LORA\", ",
            "r" => "\"r\": 2, ",
            _ => "\"lora_alpha\": 4, ",
        })
        .collect();
    format!("{{{own}{fields}}}")
}

/// The error of a configuration, which must name the file.
fn refused(config: impl AsRef<[u8]>) -> Error {
    let error = configured(config).unwrap_err();
    let file = error.file().and_then(Path::file_name);
    assert_eq!(file, Some(CONFIG.as_ref()), "{error:?}");
    assert_printable(&error);
    error
}

/// Asserts that a field with this value is of the wrong type.
fn assert_wrong(field: &str, value: &str) {
    let error = refused(with(&format!("\"{field}\": {value}")));
    assert_reason!(error, Reason::FieldType { .. });
    assert_eq!(error.item(), Some(field), "{value}");
}

#[test]
fn the_small_adapter_of_these_tests_is_accepted() {
    let adapter = configured(SMALL_CONFIG).unwrap();
    assert_eq!(adapter.modules.len(), 1);
    assert!(adapter.notices.is_empty(), "{:?}", adapter.notices);
}

#[test]
fn each_field_that_cannot_be_merged_is_refused_by_name_and_harmless_when_vacant() {
    let cases = [
        ("use_qalora", "true", "QA-LoRA"),
        ("alora_invocation_tokens", "[1, 2]", "activated"),
        ("arrow_config", r#"{"top_k": 3}"#, "Arrow"),
        ("kasa_config", r#"{"beta": 1}"#, "KaSA"),
        ("use_bdlora", r#"{"nblocks": 2}"#, "block-diagonal"),
        (
            "target_parameters",
            r#"["experts.gate_up_proj"]"#,
            "bare parameters",
        ),
    ];
    for (name, value, words) in cases {
        let error = refused(with(&format!("\"{name}\": {value}")));
        assert_reason!(
            error,
            Reason::ConfigField { field, why, .. } if field == name && why.contains(words)
        );
        for vacant in ["null", "false", "[]", "{}", "\"\""] {
            configured(with(&format!("\"{name}\": {vacant}"))).unwrap();
        }
    }
}

#[test]
fn each_initialisation_that_changes_the_base_is_refused_with_its_reason() {
    let cases = [
        ("pissa", "PiSSA"),
        ("PiSSA", "PiSSA"),
        ("pissa_niter_16", "PiSSA"),
        ("olora", "OLoRA"),
        ("corda", "training data"),
        ("lora_ga", "training data"),
        ("loftq", "LoftQ"),
        ("something new", "unknown"),
        ("", "unknown"),
    ];
    for (name, words) in cases {
        let error = refused(with(&format!("\"init_lora_weights\": \"{name}\"")));
        assert_reason!(
            error,
            Reason::Initialisation { value, why } if value == name && why.contains(words)
        );
        assert!(error.hint().is_some_and(|hint| hint.contains("PEFT")));
    }
    for value in ["3", "[]", "{}", "0.5"] {
        assert_wrong("init_lora_weights", value);
    }
    for harmless in [
        "true",
        "false",
        "null",
        "\"gaussian\"",
        "\"eva\"",
        "\"orthogonal\"",
        "\"mica\"",
        "\"Gaussian\"",
    ] {
        configured(with(&format!("\"init_lora_weights\": {harmless}"))).unwrap();
    }
}

#[test]
fn unknown_fields_are_refused_all_at_once_unless_they_are_allowed() {
    let config = with(r#""twist": 3, "bend": "x", "quiet": null, "calm": false"#);
    let error = refused(&config);
    assert_reason!(
        error,
        Reason::UnknownConfigField { field, value } if field == "twist" && value == "3"
    );
    assert_eq!(error.cases(), ["twist: 3", "bend: \"x\""]);
    let room = Room::new();
    room.write(CONFIG, &config);
    room.write(WEIGHTS, small_adapter());
    let error = read_folder(room.root(), &["twist"]).unwrap_err();
    assert_reason!(error, Reason::UnknownConfigField { field, .. } if field == "bend");
    let adapter = read_folder(room.root(), &["twist", "bend"]).unwrap();
    let unknown = adapter
        .notices
        .iter()
        .filter(|notice| notice.kind == NoticeKind::UnknownField);
    let mut items: Vec<_> = unknown.map(|notice| notice.item.clone().unwrap()).collect();
    items.sort();
    assert_eq!(items, ["bend", "calm", "quiet", "twist"]);
}

#[test]
fn a_field_that_is_refused_is_not_accepted_by_being_allowed() {
    let room = Room::new();
    room.write(CONFIG, with("\"use_qalora\": true"));
    room.write(WEIGHTS, small_adapter());
    let error = read_folder(room.root(), &["use_qalora"]).unwrap_err();
    assert_reason!(error, Reason::ConfigField { .. });
}

#[test]
fn numbers_that_json_does_not_have_are_refused() {
    for value in [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "0x10",
        "1.",
    ] {
        for field in ["r", "lora_alpha"] {
            let error = refused(with(&format!("\"{field}\": {value}")));
            assert_reason!(error, Reason::NotJson { problem } if problem.contains("line 1"));
        }
    }
}

#[test]
fn ranks_that_are_no_positive_whole_number_are_refused() {
    for value in [
        "0",
        "-1",
        "-0",
        "0.5",
        "2.5",
        "1e10",
        "1e300",
        "9223372036854775807",
        "\"2\"",
        "null",
        "true",
        "[2]",
        "{}",
    ] {
        assert_wrong("r", value);
    }
    let error = refused(r#"{"peft_type": "LORA", "lora_alpha": 4}"#);
    assert_reason!(error, Reason::FieldMissing { field: "r" });
    configured(with("\"r\": 2.0")).unwrap();
}

#[test]
fn alphas_that_are_no_number_are_refused_and_negative_ones_are_noticed() {
    for value in ["\"4\"", "null", "true", "[]", "{}"] {
        assert_wrong("lora_alpha", value);
    }
    let error = refused(r#"{"peft_type": "LORA", "r": 2}"#);
    assert_reason!(
        error,
        Reason::FieldMissing {
            field: "lora_alpha"
        }
    );
    let adapter = configured(with("\"lora_alpha\": -4")).unwrap();
    assert!(
        adapter
            .notices
            .iter()
            .any(|n| n.kind == NoticeKind::NegativeAlpha)
    );
    configured(with("\"lora_alpha\": 0.5")).unwrap();
}

#[test]
fn flags_and_lists_of_another_type_are_refused() {
    for flag in ["use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"] {
        for value in ["\"true\"", "1", "0", "[]", "{}"] {
            assert_wrong(flag, value);
        }
    }
    for value in ["3", "true", "[]"] {
        assert_wrong("bias", value);
        assert_wrong("peft_type", value);
    }
    for value in ["3", "\"lm_head\"", "[1]", "[null]", "{}"] {
        assert_wrong("modules_to_save", value);
    }
    for value in ["3", "[1]", "{}", "true"] {
        assert_wrong("feedforward_modules", value);
    }
    for map in ["rank_pattern", "alpha_pattern"] {
        for value in [
            "3",
            "[]",
            "\"m\"",
            r#"{"m": "2"}"#,
            r#"{"m": null}"#,
            r#"{"x+": []}"#,
        ] {
            assert_wrong(map, value);
        }
    }
}

#[test]
fn another_bias_and_another_method_are_refused_by_name() {
    let error = refused(with("\"bias\": \"some\""));
    assert_reason!(error, Reason::ConfigField { field, .. } if field == "bias");
    for method in ["LOHA", "VERA", "lora", ""] {
        let error = refused(with(&format!("\"peft_type\": \"{method}\"")));
        assert_reason!(error, Reason::Method { name } if name == method);
        assert_eq!(error.item(), Some("peft_type"));
    }
    let error = refused(with("\"peft_type\": \"PROMPT_TUNING\""));
    assert_reason!(error, Reason::InputVectors { what } if what == "PROMPT_TUNING");
    for value in ["true", "[1]", "[false, false]"] {
        let error = refused(with(&format!("\"enable_lora\": {value}")));
        assert_reason!(error, Reason::FieldType { .. });
    }
}

#[test]
fn replications_and_token_indices_of_another_form_are_refused() {
    for value in [
        "3",
        "{}",
        "\"0:2\"",
        "[0, 2]",
        "[[0]]",
        "[[0, 1, 2]]",
        "[[2, 1]]",
        "[[-1, 1]]",
        "[[0, 1.0]]",
        "[[0, 1e30]]",
        "[[0, \"1\"]]",
        "[[0, 1], null]",
    ] {
        assert_wrong("layer_replication", value);
    }
    for value in [
        "3",
        "\"1\"",
        "[-1]",
        "[1.5]",
        "[\"1\"]",
        "[null]",
        "{\"m\": 3}",
        "{\"m\": [-1]}",
    ] {
        assert_wrong("trainable_token_indices", value);
    }
    for value in ["[1, 2, 1]", "{\"m\": [7, 7]}"] {
        let error = refused(with(&format!("\"trainable_token_indices\": {value}")));
        assert_reason!(error, Reason::FieldValue { problem } if problem.contains("twice"));
        assert_eq!(error.item(), Some("trainable_token_indices"));
    }
}

#[test]
fn keys_that_appear_twice_are_refused_wherever_they_are() {
    for (config, name) in [
        (r#"{"r": 2, "lora_alpha": 4, "r": 4}"#, "r"),
        (r#"{"r": 2, "lora_alpha": 4, "\u0072": 4}"#, "r"),
        (
            r#"{"r": 2, "lora_alpha": 4, "rank_pattern": {"m": 1, "m": 2}}"#,
            "m",
        ),
        (
            r#"{"r": 2, "lora_alpha": 4, "megatron_config": [{"a": 1, "a": 1}]}"#,
            "a",
        ),
    ] {
        assert_reason!(refused(config), Reason::DuplicateKey { key } if key == name);
    }
}

#[test]
fn texts_that_are_no_json_object_are_refused() {
    for text in [
        "",
        " ",
        "{",
        "{}}",
        "{\"r\": 2,}",
        "nul",
        "\u{feff}\u{feff}{}",
        "{'r': 2}",
    ] {
        assert_reason!(refused(text), Reason::NotJson { .. });
    }
    for text in ["[]", "3", "null", "\"{}\""] {
        assert_reason!(refused(text), Reason::NotAnObject);
    }
    assert_reason!(refused(b"{\"r\": \"\xff\"}"), Reason::NotUtf8 { at: 7 });
    let marked = b"\xef\xbb\xbf{\"r\": \"\xff\"}";
    assert_reason!(refused(marked), Reason::NotUtf8 { at: 10 });
    assert_reason!(refused("{\"r\": \"\u{1}\"}"), Reason::NotJson { .. });
    assert_reason!(refused(r#"{"r": "\ud800"}"#), Reason::NotJson { .. });
}

#[test]
fn a_byte_order_mark_is_accepted() {
    configured(format!("\u{feff}{SMALL_CONFIG}")).unwrap();
}

#[test]
fn deep_nesting_and_many_values_are_refused() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = open.repeat(100_000) + "1" + &close.repeat(100_000);
        let error = refused(with(&format!("\"x\": {deep}")));
        assert_reason!(error, Reason::TooDeep { limit: 128 });
    }
    let many = format!("\"target_modules\": [{}0]", "0,".repeat(200_000));
    assert_reason!(refused(with(&many)), Reason::TooMany { what: "values", .. });
}

#[test]
fn a_configuration_larger_than_the_limit_is_refused_unread() {
    let room = Room::new();
    let file = std::fs::File::create(room.path(CONFIG)).unwrap();
    file.set_len((64 << 20) + 1).unwrap();
    room.write(WEIGHTS, small_adapter());
    let error = read_folder(room.root(), &[]).unwrap_err();
    assert_reason!(error, Reason::FileTooLarge { .. });
    assert_eq!(error.file(), Some(room.path(CONFIG).as_path()));
}

#[test]
#[cfg(unix)]
fn a_configuration_that_is_there_but_cannot_be_opened_is_never_taken_for_absent() {
    let room = Room::new();
    room.write(WEIGHTS, small_adapter());
    let missing = read_folder(room.root(), &[]).unwrap_err();
    assert_reason!(missing, Reason::NoAdapterConfig);
    std::os::unix::fs::symlink("nowhere", room.path(CONFIG)).unwrap();
    let error = read_folder(room.root(), &[]).unwrap_err();
    assert_reason!(error, Reason::Open);
    assert_eq!(error.file(), Some(room.path(CONFIG).as_path()));
    std::fs::remove_file(room.path(CONFIG)).unwrap();
    room.folder(CONFIG);
    assert_reason!(
        read_folder(room.root(), &[]).unwrap_err(),
        Reason::NotARegularFile { .. }
    );
}

#[test]
fn twenty_thousand_plain_patterns_are_read_and_more_are_refused() {
    let patterns = |count: usize| {
        let entries: Vec<String> = (0..count)
            .map(|n| format!("\"model.layers.{n}.q_proj\": 2"))
            .collect();
        with(&format!("\"rank_pattern\": {{{}}}", entries.join(",")))
    };
    configured(patterns(20_000)).unwrap();
    for count in [20_001, 100_000] {
        let error = refused(patterns(count));
        assert_reason!(
            error,
            Reason::TooMany {
                what: "patterns",
                limit: 20_000
            }
        );
        assert_eq!(error.item(), Some("rank_pattern"));
    }
}

#[test]
fn more_regular_expressions_than_the_limit_are_refused() {
    let entries: Vec<String> = (0..501).map(|n| format!("\"x+{n}\": 2")).collect();
    let error = refused(with(&format!(
        "\"alpha_pattern\": {{{}}}",
        entries.join(",")
    )));
    assert_reason!(
        error,
        Reason::TooMany {
            what: "regular expressions",
            limit: 500
        }
    );
    assert_eq!(error.item(), Some("alpha_pattern"));
}

#[test]
fn more_patterns_with_look_around_than_the_limit_are_refused() {
    let patterns = |count: usize| {
        let entries: Vec<String> = (0..count).map(|n| format!("\"(?!y)x+{n}\": 2")).collect();
        with(&format!("\"rank_pattern\": {{{}}}", entries.join(",")))
    };
    configured(patterns(20)).unwrap();
    let error = refused(patterns(21));
    assert_reason!(error, Reason::TooMany { limit: 20, .. });
    assert_eq!(error.item(), Some("rank_pattern"));
}

#[test]
fn patterns_that_do_not_compile_are_refused() {
    let deep = "(".repeat(8000) + &")".repeat(8000);
    for pattern in [
        "(",
        ")",
        "[",
        "*",
        "\\",
        "(?P=none)",
        "(?i",
        "a)|(?:b",
        "a)(b",
        &deep,
    ] {
        let json = serde_json::Value::from(pattern);
        for fields in [
            format!("\"rank_pattern\": {{{json}: 2}}"),
            format!("\"alpha_pattern\": {{{json}: 2}}"),
            format!("\"feedforward_modules\": {json}"),
        ] {
            let error = refused(with(&fields));
            assert_reason!(
                error,
                Reason::BadPattern { .. } | Reason::PatternTooLarge { .. }
            );
            assert!(fields.contains(error.item().unwrap()), "{error}");
        }
    }
}

#[test]
fn patterns_that_would_explode_are_refused_or_cost_linear_time() {
    for pattern in [
        "(a{1000}){1000}".to_owned(),
        "((a{100}){100}){100}".to_owned(),
        "\\\\w{5000}".to_owned(),
        "a|".repeat(8193),
    ] {
        let error = refused(with(&format!("\"rank_pattern\": {{\"{pattern}\": 2}}")));
        assert_reason!(error, Reason::PatternTooLarge { .. });
        assert_eq!(error.item(), Some("rank_pattern"));
    }
    // Exponential in a backtracking engine.
    let path = "a".repeat(2000);
    let names = [
        format!("base_model.model.{path}.lora_A.weight"),
        format!("base_model.model.{path}.lora_B.weight"),
    ];
    let weights = tensors(&[(&names[0], &[2, 3]), (&names[1], &[4, 2])]);
    read(with("\"rank_pattern\": {\"(a+)+b\": 3}"), weights).unwrap();
}

#[test]
fn look_around_that_takes_too_many_steps_is_an_error_and_never_no_match() {
    let path = "x".repeat(60);
    let names = [
        format!("base_model.model.{path}.lora_A.weight"),
        format!("base_model.model.{path}.lora_B.weight"),
    ];
    let weights = tensors(&[(&names[0], &[2, 3]), (&names[1], &[4, 2])]);
    for field in ["rank_pattern", "alpha_pattern"] {
        let config = with(&format!("\"{field}\": {{\"(?=x)(x+x+)+y\": 2}}"));
        let error = read(config, &weights).unwrap_err();
        assert_reason!(error, Reason::TooManyPatternSteps { .. });
        assert_eq!(error.item(), Some(field));
        assert!(error.file().unwrap().ends_with(CONFIG), "{error}");
    }
    let name = format!("base_model.model.{path}.ia3_l");
    let config = r#"{"peft_type": "IA3", "feedforward_modules": "(?=x)(x+x+)+y"}"#;
    let error = read(config, tensors(&[(&name, &[1, 1])])).unwrap_err();
    assert_reason!(error, Reason::TooManyPatternSteps { .. });
    assert_eq!(error.item(), Some("feedforward_modules"));
    assert!(error.file().unwrap().ends_with(CONFIG), "{error}");
}

#[test]
fn a_rank_pattern_that_gives_no_whole_number_is_refused_where_it_matches() {
    for value in ["0", "-2", "1.5", "1e12"] {
        let error = refused(with(&format!("\"rank_pattern\": {{\"m\": {value}}}")));
        assert_reason!(error, Reason::FieldValue { .. });
        assert_eq!(error.item(), Some("rank_pattern"));
    }
    configured(with("\"rank_pattern\": {\"elsewhere\": 0}")).unwrap();
}

#[test]
fn several_adapters_in_one_file_are_refused_with_their_names() {
    let weights = tensors(&[
        ("base_model.model.m.lora_A.one.weight", &[2, 3]),
        ("base_model.model.n.lora_A.two.weight", &[2, 3]),
    ]);
    let error = read(SMALL_CONFIG, weights).unwrap_err();
    assert_reason!(error, Reason::FieldValue { problem } if problem.ends_with("one, two"));
    assert!(error.file().unwrap().ends_with(WEIGHTS));
}

#[test]
fn keys_that_are_not_understood_are_refused_and_listed_all() {
    let names = [
        "base_model.model.m.lora_E",
        "base_model.model.m.hada_w1_a",
        "base_model.model.m.lora_A.a.b.weight",
        "base_model.model.m.lora_magnitude_vector",
        "base_model.model.m.ia3_l",
    ];
    let mut all: Vec<(&str, &[usize])> = vec![
        ("base_model.model.m.lora_A.weight", &[2, 3]),
        ("base_model.model.m.lora_B.weight", &[4, 2]),
    ];
    all.extend(names.map(|name| (name, &[2usize, 2][..])));
    let error = read(SMALL_CONFIG, tensors(&all)).unwrap_err();
    assert_reason!(error, Reason::UnknownKeys { count: 5 });
    for name in names {
        assert!(error.cases().iter().any(|case| case == name), "{name}");
    }
    assert!(error.file().unwrap().ends_with(WEIGHTS));
}

#[test]
fn a_missing_factor_is_refused_for_every_module_that_lacks_one() {
    let weights = tensors(&[
        ("base_model.model.m.lora_A.weight", &[2, 3]),
        ("base_model.model.n.lora_B.weight", &[4, 2]),
    ]);
    let error = read(SMALL_CONFIG, weights).unwrap_err();
    assert_reason!(error, Reason::RoleMissing { .. });
    assert_eq!(error.cases().len(), 2, "{error:?}");
}

/// The error of merging an adapter of these files into a base of these tensors.
fn unmerged(config: &str, weights: Vec<u8>, base: Vec<u8>) -> Error {
    let room = Room::new();
    room.write("adapter/adapter_config.json", config);
    room.write("adapter/adapter_model.safetensors", weights);
    let base = room.write("base.safetensors", base);
    let (adapter, output) = (room.path("adapter"), room.path("out.safetensors"));
    let before = room.names();
    let error = within_a_second(move || merge(&options(&base, &adapter, &output)).map(drop));
    assert_eq!(room.names(), before, "something was left behind");
    error.unwrap_err()
}

#[test]
fn the_small_adapter_fits_the_small_base() {
    let room = Room::new();
    room.write("adapter/adapter_config.json", SMALL_CONFIG);
    room.write("adapter/adapter_model.safetensors", small_adapter());
    let base = room.write("base.safetensors", small_base());
    merge(&options(
        &base,
        &room.path("adapter"),
        &room.path("out.safetensors"),
    ))
    .unwrap();
}

#[test]
fn token_indices_beyond_the_embedding_are_refused() {
    let weights = || {
        tensors(&[(
            "base_model.model.embed.token_adapter.trainable_tokens_delta",
            &[2, 3],
        )])
    };
    let base = || tensors(&[("embed.weight", &[8, 3])]);
    let config = |indices: &str| with(&format!("\"trainable_token_indices\": {indices}"));
    let error = unmerged(&config("[1, 8]"), weights(), base());
    assert_reason!(error, Reason::TokenRow { row: 8, rows: 8 });
    let error = unmerged(&config("[1, 9223372036854775807]"), weights(), base());
    assert_reason!(error, Reason::TokenRow { .. });
    for indices in ["[1]", "[1, 2, 3]", "[]"] {
        let error = unmerged(&config(indices), weights(), base());
        assert_reason!(error, Reason::TokenCount { rows: 2, .. });
    }
    let error = unmerged(&config("{\"elsewhere\": [1, 2]}"), weights(), base());
    assert_reason!(error, Reason::UnknownKeys { count: 1 });
}

#[test]
fn layer_replication_beyond_the_base_is_refused() {
    let weights = || {
        tensors(&[
            ("base_model.model.layers.0.m.lora_A.weight", &[2, 3]),
            ("base_model.model.layers.0.m.lora_B.weight", &[4, 2]),
        ])
    };
    let base = || {
        tensors(&[
            ("layers.0.m.weight", &[4, 3]),
            ("layers.1.m.weight", &[4, 3]),
        ])
    };
    let config = |ranges: &str| with(&format!("\"layer_replication\": {ranges}"));
    for ranges in ["[[0, 3]]", "[[0, 9223372036854775807]]", "[[0, 1], [5, 6]]"] {
        let error = unmerged(&config(ranges), weights(), base());
        assert_reason!(error, Reason::ReplicationRange { layers: 2, .. });
        assert_eq!(error.item(), Some("layer_replication"));
    }
    let many = format!("[{}[0, 1]]", "[0, 2],".repeat(6000));
    let error = unmerged(&config(&many), weights(), base());
    assert_reason!(error, Reason::TooMany { what: "layers", .. });
}
