//! Names of real adapters of image models, in every layout of the base that they may meet.
//!
//! The lists are shared beside the project and not part of it. Every size is divided by 64, which leaves
//! the proportions of FLUX.1 as they are; ranks become 1 or 2.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use loratool::formats::{Found, ReadOptions};
use loratool::ops::merge::plan;
use loratool::{Kind, Reason};
use safetensors::Dtype;

use crate::hostile_support::Room;
use crate::oracle::{self, Stored};
use crate::support::{Random, merge, options, write_base, write_safetensors};

/// A layer of FLUX.1: diffusers' name, the original name, outputs and inputs in 64ths. Layers that share
/// an original name lie in it one after the other.
const FLUX: &[(&str, &str, usize, usize)] = &[
    (
        "transformer_blocks.*.attn.to_q",
        "double_blocks.*.img_attn.qkv",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.to_k",
        "double_blocks.*.img_attn.qkv",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.to_v",
        "double_blocks.*.img_attn.qkv",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.add_q_proj",
        "double_blocks.*.txt_attn.qkv",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.add_k_proj",
        "double_blocks.*.txt_attn.qkv",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.add_v_proj",
        "double_blocks.*.txt_attn.qkv",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.to_out.0",
        "double_blocks.*.img_attn.proj",
        48,
        48,
    ),
    (
        "transformer_blocks.*.attn.to_add_out",
        "double_blocks.*.txt_attn.proj",
        48,
        48,
    ),
    (
        "transformer_blocks.*.ff.net.0.proj",
        "double_blocks.*.img_mlp.0",
        192,
        48,
    ),
    (
        "transformer_blocks.*.ff.net.2",
        "double_blocks.*.img_mlp.2",
        48,
        192,
    ),
    (
        "transformer_blocks.*.ff_context.net.0.proj",
        "double_blocks.*.txt_mlp.0",
        192,
        48,
    ),
    (
        "transformer_blocks.*.ff_context.net.2",
        "double_blocks.*.txt_mlp.2",
        48,
        192,
    ),
    (
        "transformer_blocks.*.norm1.linear",
        "double_blocks.*.img_mod.lin",
        288,
        48,
    ),
    (
        "transformer_blocks.*.norm1_context.linear",
        "double_blocks.*.txt_mod.lin",
        288,
        48,
    ),
    (
        "single_transformer_blocks.*.attn.to_q",
        "single_blocks.*.linear1",
        48,
        48,
    ),
    (
        "single_transformer_blocks.*.attn.to_k",
        "single_blocks.*.linear1",
        48,
        48,
    ),
    (
        "single_transformer_blocks.*.attn.to_v",
        "single_blocks.*.linear1",
        48,
        48,
    ),
    (
        "single_transformer_blocks.*.proj_mlp",
        "single_blocks.*.linear1",
        192,
        48,
    ),
    (
        "single_transformer_blocks.*.proj_out",
        "single_blocks.*.linear2",
        48,
        240,
    ),
    (
        "single_transformer_blocks.*.norm.linear",
        "single_blocks.*.modulation.lin",
        144,
        48,
    ),
    ("x_embedder", "img_in", 48, 1),
    ("context_embedder", "txt_in", 48, 64),
    (
        "time_text_embed.timestep_embedder.linear_1",
        "time_in.in_layer",
        48,
        4,
    ),
    (
        "time_text_embed.timestep_embedder.linear_2",
        "time_in.out_layer",
        48,
        48,
    ),
    (
        "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.in_layer",
        48,
        4,
    ),
    (
        "time_text_embed.guidance_embedder.linear_2",
        "guidance_in.out_layer",
        48,
        48,
    ),
    (
        "time_text_embed.text_embedder.linear_1",
        "vector_in.in_layer",
        48,
        12,
    ),
    (
        "time_text_embed.text_embedder.linear_2",
        "vector_in.out_layer",
        48,
        48,
    ),
    ("proj_out", "final_layer.linear", 1, 48),
    ("norm_out.linear", "final_layer.adaLN_modulation.1", 96, 48),
];

/// Norms of FLUX.1 under both names.
const NORMS: &[(&str, &str)] = &[
    (
        "transformer_blocks.*.attn.norm_q.weight",
        "double_blocks.*.img_attn.norm.query_norm.scale",
    ),
    (
        "transformer_blocks.*.attn.norm_k.weight",
        "double_blocks.*.img_attn.norm.key_norm.scale",
    ),
    (
        "transformer_blocks.*.attn.norm_added_q.weight",
        "double_blocks.*.txt_attn.norm.query_norm.scale",
    ),
    (
        "transformer_blocks.*.attn.norm_added_k.weight",
        "double_blocks.*.txt_attn.norm.key_norm.scale",
    ),
    (
        "single_transformer_blocks.*.attn.norm_q.weight",
        "single_blocks.*.norm.query_norm.scale",
    ),
    (
        "single_transformer_blocks.*.attn.norm_k.weight",
        "single_blocks.*.norm.key_norm.scale",
    ),
];

/// Layers of CLIP-L and of T5's encoder.
const TEXT: &[(&str, usize, usize)] = &[
    (
        "text_encoder.text_model.encoder.layers.*.self_attn.q_proj",
        12,
        12,
    ),
    (
        "text_encoder.text_model.encoder.layers.*.self_attn.k_proj",
        12,
        12,
    ),
    (
        "text_encoder.text_model.encoder.layers.*.self_attn.v_proj",
        12,
        12,
    ),
    (
        "text_encoder.text_model.encoder.layers.*.self_attn.out_proj",
        12,
        12,
    ),
    ("text_encoder.text_model.encoder.layers.*.mlp.fc1", 48, 12),
    ("text_encoder.text_model.encoder.layers.*.mlp.fc2", 12, 48),
    (
        "text_encoder_2.encoder.block.*.layer.0.SelfAttention.q",
        64,
        64,
    ),
    (
        "text_encoder_2.encoder.block.*.layer.0.SelfAttention.k",
        64,
        64,
    ),
    (
        "text_encoder_2.encoder.block.*.layer.0.SelfAttention.v",
        64,
        64,
    ),
    (
        "text_encoder_2.encoder.block.*.layer.0.SelfAttention.o",
        64,
        64,
    ),
    (
        "text_encoder_2.encoder.block.*.layer.1.DenseReluDense.wi_0",
        160,
        64,
    ),
    (
        "text_encoder_2.encoder.block.*.layer.1.DenseReluDense.wi_1",
        160,
        64,
    ),
    (
        "text_encoder_2.encoder.block.*.layer.1.DenseReluDense.wo",
        64,
        160,
    ),
];

/// Layers of Anima and Qwen-Image that the lists name.
const OTHERS: &[(&str, usize, usize)] = &[
    ("blocks.*.cross_attn.q_proj", 32, 32),
    ("blocks.*.cross_attn.k_proj", 32, 32),
    ("blocks.*.cross_attn.v_proj", 32, 32),
    ("blocks.*.cross_attn.output_proj", 32, 32),
    ("blocks.*.self_attn.q_proj", 32, 32),
    ("blocks.*.self_attn.k_proj", 32, 32),
    ("blocks.*.self_attn.v_proj", 32, 32),
    ("blocks.*.self_attn.output_proj", 32, 32),
    ("blocks.*.mlp.layer1", 128, 32),
    ("blocks.*.mlp.layer2", 32, 128),
    ("blocks.*.adaln_modulation_cross_attn.1", 32, 32),
    ("transformer_blocks.*.attn.to_q", 48, 48),
    ("transformer_blocks.*.attn.to_k", 48, 48),
];

/// Number of blocks of a kind.
fn blocks(name: &str) -> usize {
    match name {
        name if !name.contains('*') => 1,
        name if name.starts_with("single_") => 38,
        name if name.starts_with("text_encoder.") => 12,
        name if name.starts_with("text_encoder_2.") => 24,
        name if name.starts_with("blocks.") => 1,
        _ => 19,
    }
}

type Shapes = BTreeMap<String, Vec<usize>>;

/// A layer of every block, with a bias.
fn layer(shapes: &mut Shapes, name: &str, outputs: usize, inputs: usize) {
    for block in 0..blocks(name) {
        let name = name.replacen('*', &block.to_string(), 1);
        let weight = shapes
            .entry(format!("{name}.weight"))
            .or_insert(vec![0, inputs]);
        weight[0] += outputs;
        shapes.entry(format!("{name}.bias")).or_insert(vec![0])[0] += outputs;
    }
}

/// FLUX.1 with its text encoders; the transformer in one of its layouts.
fn flux(original: bool) -> Shapes {
    let mut shapes = Shapes::new();
    for (hub, other, outputs, inputs) in FLUX {
        let name = if original { other } else { hub };
        layer(&mut shapes, name, *outputs, *inputs);
    }
    for (hub, other) in NORMS {
        let name = if original { other } else { hub };
        for block in 0..blocks(name) {
            shapes.insert(name.replacen('*', &block.to_string(), 1), vec![2]);
        }
    }
    for (name, outputs, inputs) in TEXT {
        layer(&mut shapes, name, *outputs, *inputs);
    }
    shapes
}

fn others() -> Shapes {
    let mut shapes = Shapes::new();
    for (name, outputs, inputs) in OTHERS {
        layer(&mut shapes, name, *outputs, *inputs);
    }
    shapes
}

/// Writes tensors of random numbers.
fn write(path: &Path, shapes: impl IntoIterator<Item = (String, Vec<usize>)>) {
    let mut random = Random(11);
    let tensors: Vec<(String, Stored)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = random.floats(shape.iter().product());
            (name, Stored::of(Dtype::F32, &shape, &values))
        })
        .collect();
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(n, t)| (n.as_str(), t.clone()))
        .collect();
    write_safetensors(path, &tensors);
}

fn lists() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/real-adapters/key-lists");
    if folder.is_dir() {
        return Some(folder);
    }
    println!("skipped: ../shared/real-adapters/key-lists is not there");
    None
}

/// An adapter with the names of a list, and shapes in 64ths.
fn adapter(folder: &Path, list: &str, room: &Room) -> PathBuf {
    let shapes = std::fs::read(folder.join(format!("{list}.json"))).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_slice(&shapes).unwrap();
    let small = |size: usize| (size / 64).max(1);
    let scaled = |shape: Vec<usize>| shape.into_iter().map(small).collect();
    let path = room.folder(list).join("adapter.safetensors");
    if shapes
        .keys()
        .any(|name| name.starts_with("base_model.model."))
    {
        let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1}"#;
        std::fs::write(path.with_file_name("adapter_config.json"), config).unwrap();
    }
    write(
        &path,
        shapes
            .into_iter()
            .map(|(name, shape)| (name, scaled(shape))),
    );
    path
}

/// Every list, its format, the number of its modules, and whether it is for FLUX.1.
const LISTS: &[(&str, &str, usize, bool)] = &[
    ("anima_lora_kohya_format", "kohya", 11, false),
    (
        "anima_lora_peft_format",
        "ComfyUI (original model names)",
        6,
        false,
    ),
    ("flux_control_lora_format", "BFL control LoRA", 466, true),
    ("flux_dora_onetrainer_format", "OneTrainer", 506, true),
    (
        "flux_lora_aitoolkit_format",
        "ComfyUI (original model names)",
        228,
        true,
    ),
    ("flux_lora_diffusers_base_model_format", "PEFT", 381, true),
    (
        "flux_lora_diffusers_format",
        "diffusers (PEFT names)",
        494,
        true,
    ),
    ("flux_lora_kohya_format", "kohya", 304, true),
    ("flux_lora_kohya_with_te1_format", "kohya", 376, true),
    (
        "qwen_image_lora_diffusers_format",
        "diffusers (PEFT names)",
        3,
        false,
    ),
];

/// Lists of a method that is not read.
const REFUSED: &[(&str, &str)] = &[
    ("anima_lora_lokr_format", "LoKr"),
    ("flux_lokr_bfl_format", "LoKr"),
];

#[test]
fn every_key_list_is_read_and_finds_its_places_in_every_layout() {
    let Some(folder) = lists() else { return };
    let room = Room::new();
    let bases = [
        ("original", flux(true)),
        ("hub", flux(false)),
        ("others", others()),
    ];
    for (name, shapes) in bases {
        write(&room.path(&format!("{name}.safetensors")), shapes);
    }
    for (list, format, modules, is_flux) in LISTS {
        let path = adapter(&folder, list, &room);
        let found = Found::open(&path).unwrap();
        assert_eq!(found.format().map(|f| f.name()), Some(*format), "{list}");
        let read = found.read(&ReadOptions::default());
        let read = read.unwrap_or_else(|error| panic!("{list}: {error:?}"));
        assert_eq!(read.modules.len(), *modules, "{list}");
        let bases: &[&str] = if *is_flux {
            &["original", "hub"]
        } else {
            &["others"]
        };
        for base in bases {
            let base = room.path(&format!("{base}.safetensors"));
            let out = room.path("out.safetensors");
            let plan = plan(&options(&base, &path, &out));
            let report = plan.unwrap_or_else(|e| panic!("{list}: {e:?}")).report();
            let placed: BTreeSet<&str> = report.modules.iter().map(|m| &*m.path).collect();
            assert_eq!(placed.len(), *modules, "{list}");
            assert!(report.left_out.is_empty(), "{list}");
        }
    }
}

#[test]
fn key_lists_of_other_methods_are_refused_by_the_method() {
    let Some(folder) = lists() else { return };
    let room = Room::new();
    for (list, method) in REFUSED {
        let path = adapter(&folder, list, &room);
        let error = Found::open(&path).unwrap().read(&ReadOptions::default());
        let error = error.map(drop).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{list}");
        let is_it = matches!(error.reason(), Reason::Method { name } if name == method);
        assert!(is_it, "{list}: {error}");
    }
}

#[test]
fn no_key_list_is_forgotten() {
    let Some(folder) = lists() else { return };
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let name = name.trim_end_matches(".json");
        let read = LISTS.iter().any(|(list, ..)| *list == name);
        let refused = REFUSED.iter().any(|(list, _)| *list == name);
        assert!(read || refused, "{name} is tested nowhere");
    }
}

/// Layers that are adapted below: diffusers' name, outputs, inputs.
const ADAPTED: &[(&str, usize, usize)] = &[
    ("transformer_blocks.1.attn.to_q", 48, 48),
    ("transformer_blocks.1.attn.to_k", 48, 48),
    ("transformer_blocks.1.attn.to_v", 48, 48),
    ("transformer_blocks.1.attn.to_out.0", 48, 48),
    ("single_transformer_blocks.2.attn.to_q", 48, 48),
    ("single_transformer_blocks.2.attn.to_k", 48, 48),
    ("single_transformer_blocks.2.attn.to_v", 48, 48),
    ("single_transformer_blocks.2.proj_out", 48, 240),
];

/// How a format names the layers that are adapted, and their factors; a layer without a name is the next
/// part of the layer before it.
struct Spelled {
    format: &'static str,
    metadata: &'static str,
    names: &'static [&'static str],
    down: &'static str,
    up: &'static str,
}

const NAMES_OF_DIFFUSERS: &[&str] = &[
    "transformer.transformer_blocks.1.attn.to_q",
    "transformer.transformer_blocks.1.attn.to_k",
    "transformer.transformer_blocks.1.attn.to_v",
    "transformer.transformer_blocks.1.attn.to_out.0",
    "transformer.single_transformer_blocks.2.attn.to_q",
    "transformer.single_transformer_blocks.2.attn.to_k",
    "transformer.single_transformer_blocks.2.attn.to_v",
    "transformer.single_transformer_blocks.2.proj_out",
];

const SPELLED: &[Spelled] = &[
    Spelled {
        format: "diffusers (PEFT names)",
        metadata: "",
        names: NAMES_OF_DIFFUSERS,
        down: ".lora_A.weight",
        up: ".lora_B.weight",
    },
    Spelled {
        format: "ai-toolkit",
        metadata: "ai-toolkit",
        names: NAMES_OF_DIFFUSERS,
        down: ".lora_A.weight",
        up: ".lora_B.weight",
    },
    Spelled {
        format: "kohya",
        metadata: "ai-toolkit",
        names: &[
            "lora_unet_transformer_blocks_1_attn_to_q",
            "lora_unet_transformer_blocks_1_attn_to_k",
            "lora_unet_transformer_blocks_1_attn_to_v",
            "lora_unet_double_blocks_1_img_attn_proj",
            "lora_unet_single_transformer_blocks_2_attn_to_q",
            "lora_unet_single_transformer_blocks_2_attn_to_k",
            "lora_unet_single_transformer_blocks_2_attn_to_v",
            "lora_unet_single_blocks_2_linear2",
        ],
        down: ".lora_down.weight",
        up: ".lora_up.weight",
    },
    Spelled {
        format: "ComfyUI (original model names)",
        metadata: "",
        names: &[
            "diffusion_model.transformer_blocks.1.attn.to_q",
            "diffusion_model.transformer_blocks.1.attn.to_k",
            "diffusion_model.transformer_blocks.1.attn.to_v",
            "diffusion_model.double_blocks.1.img_attn.proj",
            "diffusion_model.single_transformer_blocks.2.attn.to_q",
            "diffusion_model.single_transformer_blocks.2.attn.to_k",
            "diffusion_model.single_transformer_blocks.2.attn.to_v",
            "diffusion_model.single_blocks.2.linear2",
        ],
        down: ".lora_down.weight",
        up: ".lora_up.weight",
    },
    Spelled {
        format: "OneTrainer",
        metadata: "",
        names: &[
            "lora_transformer_transformer_blocks_1_attn_to_q",
            "lora_transformer_transformer_blocks_1_attn_to_k",
            "lora_transformer_transformer_blocks_1_attn_to_v",
            "lora_transformer_transformer_blocks_1_attn_to_out_0",
            "lora_transformer_single_transformer_blocks_2_attn_to_q",
            "lora_transformer_single_transformer_blocks_2_attn_to_k",
            "lora_transformer_single_transformer_blocks_2_attn_to_v",
            "lora_transformer_single_transformer_blocks_2_proj_out",
        ],
        down: ".lora_down.weight",
        up: ".lora_up.weight",
    },
    Spelled {
        format: "OMI",
        metadata: "",
        names: &[
            "transformer.double_blocks.1.img_attn.qkv.0",
            "transformer.double_blocks.1.img_attn.qkv.1",
            "transformer.double_blocks.1.img_attn.qkv.2",
            "transformer.double_blocks.1.img_attn.proj",
            "transformer.single_blocks.2.linear1.0",
            "transformer.single_blocks.2.linear1.1",
            "transformer.single_blocks.2.linear1.2",
            "transformer.single_blocks.2.linear2",
        ],
        down: ".lora_down.weight",
        up: ".lora_up.weight",
    },
    Spelled {
        format: "XLabs FLUX",
        metadata: "",
        names: &[
            "double_blocks.1.processor.qkv_lora1",
            "",
            "",
            "double_blocks.1.processor.proj_lora1",
            "single_blocks.2.processor.qkv_lora",
            "",
            "",
            "single_blocks.2.processor.proj_lora",
        ],
        down: ".down.weight",
        up: ".up.weight",
    },
];

impl Spelled {
    /// The same numbers under these names. Query, key and value have one down factor, so that they can
    /// be one layer; a name that is left out goes on with the layer before it.
    fn write(&self, path: &Path) {
        let mut random = Random(5);
        let mut tensors: Vec<(String, Vec<f64>, [usize; 2])> = Vec::new();
        let mut shared: Vec<f64> = Vec::new();
        for (index, (name, outputs, inputs)) in ADAPTED.iter().enumerate() {
            if !(name.ends_with("to_k") || name.ends_with("to_v")) {
                shared = random.floats(2 * inputs);
            }
            let up = random.floats(outputs * 2);
            match self.names[index] {
                "" => {
                    let (_, values, shape) = tensors.last_mut().unwrap();
                    values.extend(up);
                    shape[0] += outputs;
                }
                name => {
                    tensors.push((format!("{name}{}", self.down), shared.clone(), [2, *inputs]));
                    tensors.push((format!("{name}{}", self.up), up, [*outputs, 2]));
                }
            }
        }
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        let software = serde_json::json!({"software": self.metadata});
        header.insert("__metadata__".to_owned(), software);
        for (name, values, shape) in tensors {
            let stored = Stored::of(Dtype::F32, &shape, &values);
            let start = data.len();
            data.extend(stored.bytes);
            let entry = serde_json::json!({
                "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()],
            });
            header.insert(name, entry);
        }
        let header = serde_json::Value::from(header).to_string();
        std::fs::write(path, crate::hostile_support::file_of(header, data)).unwrap();
    }
}

#[test]
fn the_same_numbers_give_the_same_bytes_however_they_are_spelled() {
    let room = Room::new();
    for original in [true, false] {
        let base = room.path("base.safetensors");
        let shapes = flux(original).into_iter();
        // Two blocks of each kind, and the third of the single ones.
        write(
            &base,
            shapes.filter(|(name, _)| name.contains(".1.") || name.contains(".2.")),
        );
        let mut first = None;
        for spelled in SPELLED {
            let path = room.path("adapter.safetensors");
            spelled.write(&path);
            let format = Found::open(&path).unwrap().format().map(|f| f.name());
            assert_eq!(format, Some(spelled.format));
            let out = room.path(&format!("{}.safetensors", spelled.format));
            let options = options(&base, &path, &out);
            let options = loratool::ops::merge::Options {
                force: true,
                ..options
            };
            merge(&options).unwrap_or_else(|error| panic!("{}: {error:?}", spelled.format));
            let merged = oracle::read(&out);
            let changed = oracle::read(&base)
                .iter()
                .filter(|(n, t)| merged[*n] != **t)
                .count();
            assert_eq!(changed, if original { 4 } else { 8 }, "{}", spelled.format);
            let first = first.get_or_insert_with(|| merged.clone());
            assert!(*first == merged, "{}", spelled.format);
        }
    }
}

fn f32s(shape: &[usize], values: &[f64]) -> Stored {
    Stored::of(Dtype::F32, shape, values)
}

fn values(stored: &Stored) -> Vec<f32> {
    let bytes = stored.bytes.chunks_exact(4);
    bytes
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

#[test]
fn a_control_adapter_replaces_norms_adds_to_biases_and_widens_the_input() {
    let room = Room::new();
    for (layer, norm, wide) in [
        (
            "double_blocks.0.img_attn.proj",
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "img_in",
        ),
        (
            "transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.0.attn.norm_k.weight",
            "x_embedder",
        ),
    ] {
        let base = room.path("base.safetensors");
        let name = |suffix: &str| format!("{layer}.{suffix}");
        let (weight, bias) = (name("weight"), name("bias"));
        let (wide, wide_bias) = (format!("{wide}.weight"), format!("{wide}.bias"));
        write_safetensors(
            &base,
            &[
                (&weight, f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0])),
                (&bias, f32s(&[2], &[1.0, 1.0])),
                (norm, f32s(&[2], &[1.0, 1.0])),
                (&wide, f32s(&[2, 1], &[5.0, 6.0])),
                (&wide_bias, f32s(&[2], &[0.0, 0.0])),
            ],
        );
        let path = room.path("adapter.safetensors");
        write_safetensors(
            &path,
            &[
                (
                    "double_blocks.0.img_attn.proj.lora_A.weight",
                    f32s(&[1, 2], &[1.0, 0.0]),
                ),
                (
                    "double_blocks.0.img_attn.proj.lora_B.weight",
                    f32s(&[2, 1], &[10.0, 20.0]),
                ),
                (
                    "double_blocks.0.img_attn.proj.lora_B.bias",
                    f32s(&[2], &[2.0, 4.0]),
                ),
                (
                    "double_blocks.0.img_attn.norm.key_norm.scale",
                    f32s(&[2], &[7.0, 8.0]),
                ),
                ("img_in.lora_A.weight", f32s(&[1, 2], &[1.0, 2.0])),
                ("img_in.lora_B.weight", f32s(&[2, 1], &[2.0, 4.0])),
            ],
        );
        let mut options = options(&base, &path, &room.path("out.safetensors"));
        (options.adapters[0].strength, options.force) = (0.5, true);
        let report = merge(&options).unwrap();
        let merged = oracle::read(&options.output);
        assert_eq!(values(&merged[&weight]), [6.0, 2.0, 13.0, 4.0]);
        assert_eq!(values(&merged[&bias]), [2.0, 3.0]);
        assert_eq!(values(&merged[norm]), [7.0, 8.0], "whatever the strength");
        assert_eq!(merged[&wide].shape, [2, 2]);
        assert_eq!(values(&merged[&wide]), [6.0, 2.0, 8.0, 4.0]);
        let told = |word: &str| report.notices.iter().any(|n| n.text.contains(word));
        assert!(told("widened with zeros") && told("does not apply"));
    }
}

#[test]
fn a_shape_that_a_weight_cannot_be_widened_to_is_refused() {
    let room = Room::new();
    let base = room.path("base.safetensors");
    write_safetensors(&base, &[("img_in.weight", f32s(&[2, 2], &[1.0; 4]))]);
    let integers = |sizes: &[i64]| Stored {
        dtype: Dtype::I64,
        shape: vec![sizes.len()],
        bytes: sizes.iter().flat_map(|size| size.to_le_bytes()).collect(),
    };
    let path = room.path("adapter.safetensors");
    let out = room.path("out.safetensors");
    let refused = |shape: Stored| {
        write_safetensors(&path, &[("diffusion_model.img_in.reshape_weight", shape)]);
        plan(&options(&base, &path, &out)).map(drop).unwrap_err()
    };
    for sizes in [
        &[2, 1][..],
        &[2],
        &[2, 2, 1],
        &[1 << 20, 1 << 20],
        &[1 << 40, 1 << 40],
    ] {
        let error = refused(integers(sizes));
        assert!(
            matches!(error.reason(), Reason::PaddedShape { .. }),
            "{error}"
        );
    }
    for shape in [
        integers(&[2, -1]),
        integers(&[0, 2]),
        integers(&[2; 9]),
        f32s(&[2], &[2.0; 2]),
    ] {
        assert_eq!(
            refused(shape).item(),
            Some("diffusion_model.img_in.reshape_weight")
        );
    }
}

#[test]
fn embeddings_and_notes_in_an_adapter_are_set_aside_with_a_notice() {
    let room = Room::new();
    let path = room.path("adapter.safetensors");
    for (down, up) in [
        ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"),
        (
            "diffusion_model.a.lora_A.weight",
            "diffusion_model.a.lora_B.weight",
        ),
    ] {
        write_safetensors(
            &path,
            &[
                (down, f32s(&[1, 2], &[1.0; 2])),
                (up, f32s(&[2, 1], &[1.0; 2])),
                ("bundle_emb.cat.clip_l", f32s(&[1, 2], &[1.0; 2])),
                ("_aux.step", f32s(&[1], &[1.0])),
            ],
        );
        let adapter = Found::open(&path)
            .unwrap()
            .read(&ReadOptions::default())
            .unwrap();
        assert_eq!((adapter.modules.len(), adapter.unused.len()), (1, 2));
        for name in ["bundle_emb.cat.clip_l", "_aux.step"] {
            let told = |notice: &&loratool::notice::Notice| notice.item.as_deref() == Some(name);
            assert_eq!(adapter.notices.iter().filter(told).count(), 1, "{name}");
        }
    }
}

#[test]
fn the_configuration_of_a_widened_denoiser_follows() {
    let room = Room::new();
    for (config, expected) in [
        (r#"{"in_channels": 1, "out_channels": null}"#, (2, Some(1))),
        (r#"{"in_channels": 1, "out_channels": 3}"#, (2, Some(3))),
        (r#"{"in_channels": 4}"#, (4, None)),
    ] {
        let base = room.path("base");
        let config = serde_json::from_str(config).unwrap();
        let weight = [("x_embedder.weight", f32s(&[2, 1], &[5.0, 6.0]))];
        write_base(&base, Some(&config), &weight);
        let path = room.path("adapter.safetensors");
        let shape = Stored {
            dtype: Dtype::I32,
            shape: vec![2],
            bytes: [2i32, 2]
                .iter()
                .flat_map(|size| size.to_le_bytes())
                .collect(),
        };
        write_safetensors(&path, &[("diffusion_model.img_in.reshape_weight", shape)]);
        let mut options = options(&base, &path, &room.path("out"));
        options.force = true;
        merge(&options).unwrap();
        let merged = oracle::read(&options.output.join("model.safetensors"));
        assert_eq!(values(&merged["x_embedder.weight"]), [5.0, 0.0, 6.0, 0.0]);
        let config = oracle::json(&options.output.join("config.json"));
        let number = |field: &str| config[field].as_i64();
        assert_eq!(
            (number("in_channels").unwrap(), number("out_channels")),
            expected
        );
    }
}

#[test]
fn a_conversion_lists_what_other_formats_cannot_say_of_a_control_adapter() {
    use loratool::ops::convert;
    let room = Room::new();
    let path = room.path("adapter.safetensors");
    let factors = |name: &str| {
        [
            format!("{name}.lora_A.weight"),
            format!("{name}.lora_B.weight"),
        ]
    };
    let [down, up] = factors("img_in");
    let [other_down, other_up] = factors("double_blocks.0.img_attn.proj");
    write_safetensors(
        &path,
        &[
            (&down, f32s(&[1, 2], &[1.0, 2.0])),
            (&up, f32s(&[48, 1], &[2.0; 48])),
            (&other_down, f32s(&[1, 48], &[1.0; 48])),
            (&other_up, f32s(&[48, 1], &[1.0; 48])),
            (
                "double_blocks.0.img_attn.norm.key_norm.scale",
                f32s(&[2], &[7.0, 8.0]),
            ),
        ],
    );
    for to in ["peft", "diffusers"] {
        let options = convert::Options {
            adapter: path.clone(),
            to: to.to_owned(),
            output: room.path("out"),
            allow_losses: true,
            ..convert::Options::default()
        };
        let plan = convert::plan(&options).unwrap_or_else(|error| panic!("{to}: {error:?}"));
        let losses = &plan.report().losses;
        let lost = |word: &str| losses.iter().any(|loss| loss.text.contains(word));
        assert!(
            lost("widened") && lost("replaced weight"),
            "{to}: {losses:?}"
        );
    }
}
