//! Names that a conversion must not give in silence: of another family than the model's, of another part, or such
//! that nothing reads them again.

use std::path::{Path, PathBuf};

use loratool::formats::Found;
use loratool::notice::{Notice, NoticeKind};
use loratool::ops::convert::{self, Options, Report};
use loratool::ops::merge::Control;
use loratool::{Error, Kind};
use safetensors::Dtype;

use crate::oracle::{self, Stored};
use crate::support::{fixture, write_base};

/// Converts into the folder `out` of a room.
fn converted(room: &Path, options: Options) -> Result<Report, Error> {
    let output = room.join("out");
    convert::plan(&Options { output, ..options })?.run(&Control::default())
}

fn to(adapter: PathBuf, to: &str) -> Options {
    Options {
        adapter,
        to: to.to_owned(),
        ..Options::default()
    }
}

/// A file of kohya with factors of rank 2 for some modules.
fn kohya(room: &Path, modules: &[&str]) -> PathBuf {
    let keys = modules.iter().flat_map(|module| {
        [("down", [2, 4]), ("up", [4, 2])]
            .map(|(end, shape)| (format!("{module}.lora_{end}.weight"), shape))
    });
    let keys: Vec<(String, [usize; 2])> = keys.collect();
    let tensors: Vec<(&str, Stored)> = keys
        .iter()
        .map(|(key, shape)| (key.as_str(), Stored::of(Dtype::F32, shape, &[0.5; 8])))
        .collect();
    write_base(&room.join("adapter"), None, &tensors);
    room.join("adapter/model.safetensors")
}

fn names(room: &Path, file: &str) -> Vec<String> {
    oracle::read(&room.join("out").join(file))
        .into_keys()
        .collect()
}

const TEXT: &str = "text_model_encoder_layers_0_self_attn_q_proj";

#[test]
fn a_family_that_contradicts_the_names_is_refused() {
    for (target, family) in [("kohya", "sd1"), ("comfyui", "sdxl"), ("peft", "sd1")] {
        let room = tempfile::tempdir().unwrap();
        let options = Options {
            family: Some(family.to_owned()),
            ..to(fixture("formats/flux/diffusers.safetensors"), target)
        };
        let error = converted(room.path(), options).expect_err("it must be refused");
        assert_eq!(error.kind(), Kind::Unresolved, "{target}: {error:?}");
        assert!(!error.cases().is_empty());
    }
}

#[test]
fn a_base_of_another_family_than_the_adapter_is_refused() {
    let flux = fixture("formats/flux");
    for (adapter, base) in [
        (
            fixture("lycoris/unet_attn/kohya.safetensors"),
            flux.join("base.safetensors"),
        ),
        (
            flux.join("kohya.safetensors"),
            fixture("lycoris/unet_attn/unet.safetensors"),
        ),
    ] {
        for target in ["peft", "comfyui", "diffusers"] {
            let room = tempfile::tempdir().unwrap();
            let options = Options {
                base: Some(base.clone()),
                ..to(adapter.clone(), target)
            };
            let error = converted(room.path(), options).expect_err("it must be refused");
            assert_eq!(error.kind(), Kind::Usage, "{target}: {error:?}");
            assert!(error.to_string().contains("the base is of "), "{error}");
        }
    }
}

#[test]
fn the_first_of_two_text_encoders_has_its_number_in_kohya() {
    let room = tempfile::tempdir().unwrap();
    let modules = ["lora_te1_", "lora_te2_"].map(|prefix| format!("{prefix}{TEXT}"));
    let file = kohya(room.path(), &modules.each_ref().map(String::as_str));
    converted(room.path(), to(file, "kohya")).unwrap();
    let names = names(room.path(), "adapter.safetensors");
    for module in &modules {
        assert!(
            names.iter().any(|name| name.starts_with(module)),
            "{names:?}"
        );
    }
}

#[test]
fn the_configuration_in_a_file_of_diffusers_fits_text_encoders_of_every_transformers() {
    let room = tempfile::tempdir().unwrap();
    let adapter = kohya(room.path(), &[&format!("lora_te_{TEXT}")]);
    converted(room.path(), to(adapter, "diffusers")).unwrap();
    let file = room.path().join("out/pytorch_lora_weights.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let module = "encoder.layers.0.self_attn.q_proj";
    // diffusers itself takes the name of the wrapper from keys where the model has none.
    let key = format!("text_encoder.text_model.{module}.lora_A.weight");
    assert!(header.get(&key).is_some(), "{header}");
    let text = header["__metadata__"]["lora_adapter_metadata"].as_str();
    let config: serde_json::Value = serde_json::from_str(text.unwrap()).unwrap();
    let targets = &config["text_encoder.target_modules"];
    assert_eq!(targets, &serde_json::json!([module]));
}

#[test]
fn a_prefix_that_nothing_can_be_written_behind_is_refused() {
    for (target, prefix) in [("kohya", "_"), ("kohya", "a.b_"), ("peft", "lycoris_")] {
        let room = tempfile::tempdir().unwrap();
        let options = Options {
            prefix: Some(prefix.to_owned()),
            ..to(kohya(room.path(), &[&format!("lora_te_{TEXT}")]), target)
        };
        let error = converted(room.path(), options).expect_err("it must be refused");
        assert_eq!(error.kind(), Kind::Usage, "{target} {prefix}: {error:?}");
        assert!(error.to_string().contains("prefix"), "{error}");
    }
}

#[test]
fn parts_of_a_pipeline_in_one_adapter_of_peft_are_told() {
    let unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let text = format!("lora_te_{TEXT}");
    for (modules, told) in [(vec![unet], 0), (vec![&text], 0), (vec![unet, &text], 1)] {
        let room = tempfile::tempdir().unwrap();
        let report = converted(room.path(), to(kohya(room.path(), &modules), "peft")).unwrap();
        let few = |notice: &&Notice| notice.kind == NoticeKind::LoadedByFew;
        assert_eq!(
            report.notices.iter().filter(few).count(),
            told,
            "{modules:?}"
        );
    }
    let room = tempfile::tempdir().unwrap();
    let both = [text, format!("lora_te2_{TEXT}")];
    let file = kohya(room.path(), &both.each_ref().map(String::as_str));
    let error = converted(room.path(), to(file, "peft")).expect_err("it must be refused");
    assert_eq!(error.kind(), Kind::Output, "{error:?}");
    assert!(error.hint().is_some_and(|hint| hint.contains("--only")));
}

#[test]
fn a_layer_of_one_name_in_both_layouts_is_not_ambiguous() {
    for (family, layer) in [
        ("qwen-image", "img_in"),
        ("qwen-image", "transformer_blocks.0.attn.to_q"),
        ("sd3", "context_embedder"),
        ("lumina2", "x_embedder"),
        ("ltx", "caption_projection.linear_1"),
        ("z-image", "context_refiner.0.feed_forward.w1"),
    ] {
        let room = tempfile::tempdir().unwrap();
        let module = format!("lora_unet_{}", layer.replace('.', "_"));
        let options = Options {
            family: Some(family.to_owned()),
            ..to(kohya(room.path(), &[&module]), "comfyui")
        };
        converted(room.path(), options).unwrap_or_else(|error| panic!("{family}: {error:?}"));
        let names = names(room.path(), "adapter.safetensors");
        let key = format!("diffusion_model.{layer}.lora_up.weight");
        assert!(names.contains(&key), "{family}: {names:?}");
    }
}

#[test]
fn old_names_of_a_text_encoder_alone_are_recognised() {
    let room = tempfile::tempdir().unwrap();
    let file = kohya(room.path(), &[&format!("lora_te_{TEXT}")]);
    converted(room.path(), to(file, "diffusers-old")).unwrap();
    let found = Found::open(&room.path().join("out")).unwrap();
    assert_eq!(
        found.format().map(|format| format.id()),
        Some("diffusers-old")
    );
    let adapter = found.read(&Default::default()).unwrap();
    let paths: Vec<&str> = adapter.modules.iter().map(|module| &*module.path).collect();
    assert_eq!(
        paths,
        ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    );
}
