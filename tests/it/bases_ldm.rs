//! Single files of latent diffusion as bases, from a training and as safetensors.

use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::notice::NoticeKind;
use loratool::ops::merge::Report;
use serde_json::json;

use crate::hostile_support::{Room, tensors};
use crate::oracle::{self, Tensors};
use crate::support::{fixture, merge, options};

const UNET: &str = "model.diffusion_model.input_blocks.1.1.proj_in";
const TEXT: &str = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1";

fn adapter(room: &Room, module: &str) -> PathBuf {
    let name = |factor: &str| format!("base_model.model.{module}.{factor}.weight");
    let factors = tensors(&[(&name("lora_A"), &[2, 3]), (&name("lora_B"), &[4, 2])]);
    room.write(&format!("{module}/adapter_model.safetensors"), factors);
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 200_000}).to_string();
    room.write(&format!("{module}/adapter_config.json"), config);
    room.path(module)
}

fn merged(room: &Room, base: &Path, module: &str) -> (Report, Tensors) {
    let mut options = options(base, &adapter(room, module), &room.path("out.safetensors"));
    options.force = true;
    let report = merge(&options).unwrap();
    (report, oracle::read(&options.output))
}

#[test]
fn a_checkpoint_of_a_training_merges_to_the_tensors_of_its_safetensors() {
    let room = Room::new();
    let before = oracle::read(&fixture("bases/ldm.safetensors"));
    for module in [UNET, TEXT] {
        let (_, expected) = merged(&room, &fixture("bases/ldm.safetensors"), module);
        let (_, found) = merged(&room, &fixture("bases/ldm.ckpt"), module);
        assert_eq!(found, expected);
        // Average, VAE, integers and arrays of the scheduler are those of the base.
        let changed: Vec<&String> = expected
            .iter()
            .filter(|(name, tensor)| before[*name] != **tensor)
            .map(|(name, _)| name)
            .collect();
        assert_eq!(changed, [&format!("{module}.weight")]);
        assert_eq!(expected.len(), before.len());
    }
}

#[test]
fn the_averaged_copy_is_left_alone_and_that_is_told_where_it_matters() {
    let room = Room::new();
    for base in ["bases/ldm.safetensors", "bases/ldm.ckpt"] {
        for (module, count) in [(UNET, 1), (TEXT, 0)] {
            let (report, _) = merged(&room, &fixture(base), module);
            let kinds = report.notices.iter().map(|notice| notice.kind);
            let found = kinds.filter(|kind| *kind == NoticeKind::EmaCopy).count();
            assert_eq!(found, count, "{base}: {module}");
        }
    }
}

#[test]
fn the_state_of_a_training_is_read_as_numbers() {
    let file = TensorFile::open(fixture("bases/ldm.ckpt")).unwrap();
    for (key, value) in [
        ("callbacks.ModelCheckpoint.monitor", "val/loss"),
        ("callbacks.ModelCheckpoint.best_model_score", "0.1"),
        ("callbacks.ModelCheckpoint.current", "0.5"),
        ("callbacks.ModelCheckpoint.steps", "-3"),
    ] {
        let mut all = file.directory.metadata.iter();
        let found = all.find(|(name, _)| name == key).unwrap();
        assert_eq!(found.1, value, "{key}");
    }
}
