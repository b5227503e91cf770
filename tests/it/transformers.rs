//! Names of transformers 4 (in files) and 5 (in memory), and of models with and without their heads, as
//! the library itself writes them (`fixtures/make_transformers.py`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::hostile_support::Room;
use crate::oracle::{Stored, read};
use crate::support::{Random, fixture, merge, options, write_adapter, write_base};

type Tensors = BTreeMap<String, Stored>;

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn shape(value: &Value) -> Vec<usize> {
    value["shape"]
        .as_array()
        .unwrap()
        .iter()
        .map(size)
        .collect()
}

fn random(random: &mut Random, shape: &[usize]) -> Stored {
    let values = random.floats(shape.iter().product());
    Stored::of(loratool::tensor::DType::F32, shape, &values)
}

/// A model of the list.
struct Model<'a>(&'a Value);

/// Who calls the layers so.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Names {
    Files,
    Memory,
    /// In files, without the head and the prefix.
    Bare,
}

impl Model<'_> {
    fn files(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.0["files"].as_object().unwrap().iter()
    }

    /// Whether there is such a list of names.
    fn has(&self, names: Names) -> bool {
        names != Names::Bare || self.0["bare"].is_array()
    }

    fn bare(&self, name: &str) -> Option<String> {
        let prefix = self.0["prefix"].as_str()?;
        let short = name.strip_prefix(&format!("{prefix}.")).unwrap_or(name);
        let all = self.0["bare"].as_array()?;
        all.iter()
            .any(|known| known == short)
            .then(|| short.to_owned())
    }

    /// The same tensors under other names.
    fn named(&self, tensors: &Tensors, names: Names) -> Tensors {
        let mut all = Tensors::new();
        for (name, told) in self.files() {
            let tensor = &tensors[name];
            match names {
                Names::Files => drop(all.insert(name.clone(), tensor.clone())),
                Names::Bare => all.extend(self.bare(name).map(|name| (name, tensor.clone()))),
                Names::Memory => match told["memory"].as_array() {
                    None => drop(all.insert(name.clone(), tensor.clone())),
                    Some(parts) => into_memory(&mut all, tensor, parts),
                },
            }
        }
        all
    }

    /// The modules that a layer of the files is, and which of its rows each has.
    fn modules(&self, name: &str, told: &Value, names: Names) -> Vec<(String, Range<usize>)> {
        let rows = shape(told)[0];
        let parts = told["memory"].as_array();
        let found = match (names, parts) {
            (Names::Files, _) | (Names::Memory, None) => vec![(name.to_owned(), 0..rows)],
            (Names::Bare, _) => self
                .bare(name)
                .map(|name| (name, 0..rows))
                .into_iter()
                .collect(),
            // A stack of experts is no module.
            (Names::Memory, Some(parts)) if parts[0].get("expert").is_some() => Vec::new(),
            (Names::Memory, Some(parts)) => {
                let mut at = 0;
                let part = |part: &Value| {
                    let start = at;
                    at += shape(part)[0];
                    (part["name"].as_str().unwrap().to_owned(), start..at)
                };
                parts.iter().map(part).collect()
            }
        };
        let path = |name: String| name.strip_suffix(".weight").unwrap().to_owned();
        found
            .into_iter()
            .map(|(name, rows)| (path(name), rows))
            .collect()
    }

    /// Writes an adapter for every matrix that is a module under these names, and under those of `homes`;
    /// in the words of `words`. Returns how many layers of the files it changes.
    fn write(&self, folder: &Path, modules: Names, homes: Names, words: Names) -> usize {
        let (mut tensors, mut layers) = (Vec::new(), 0);
        let gpt2 = self.0["model_type"] == "gpt2";
        for (number, (name, told)) in self.files().enumerate() {
            let shape = shape(told);
            let is_module = |names| !self.modules(name, told, names).is_empty();
            let (true, [outer, inner]) = (name.ends_with(".weight"), &*shape) else {
                continue;
            };
            if !is_module(modules) || (homes == Names::Bare && self.bare(name).is_none()) {
                continue;
            }
            // GPT-2's Conv1D has its inputs first.
            let conv = gpt2 && name.contains(".c_");
            let (outputs, inputs) = if conv { (inner, outer) } else { (outer, inner) };
            let numbers = &mut Random(number as u64);
            let down = random(numbers, &[2, *inputs]);
            let up = random(numbers, &[*outputs, 2]);
            layers += 1;
            for (path, rows) in self.modules(name, told, words) {
                let rows = if conv { 0..*outputs } else { rows };
                let key = |factor: &str| format!("base_model.model.{path}.lora_{factor}.weight");
                let part = Stored {
                    shape: vec![rows.len(), 2],
                    bytes: up.bytes[rows.start * 8..rows.end * 8].to_vec(),
                    ..up.clone()
                };
                tensors.extend([(key("A"), down.clone()), (key("B"), part)]);
            }
        }
        let config = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 3 });
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| (&**name, tensor.clone()))
            .collect();
        write_adapter(folder, &config, &tensors);
        layers
    }
}

/// Lays a tensor of a file into the tensors in memory that it is made of.
fn into_memory(all: &mut Tensors, tensor: &Stored, parts: &[Value]) {
    let row = tensor.bytes.len() / tensor.shape.first().copied().unwrap_or(1);
    let mut at = 0;
    for part in parts {
        let shape = shape(part);
        let whole = || Stored {
            dtype: tensor.dtype,
            shape: shape.clone(),
            bytes: vec![0; 4 * shape.iter().product::<usize>()],
        };
        let name = part["name"].as_str().unwrap().to_owned();
        let target = all.entry(name).or_insert_with(whole);
        let (start, count) = match part["expert"].as_u64() {
            Some(expert) => {
                let rows = &part["rows"][0];
                let first = expert as usize * shape[1] + size(&rows[0]);
                (first * row, (size(&rows[1]) - size(&rows[0])) * row)
            }
            None => (0, target.bytes.len()),
        };
        target.bytes[start..start + count].copy_from_slice(&tensor.bytes[at..at + count]);
        at += count;
    }
    assert_eq!(at, tensor.bytes.len());
}

fn write(folder: &Path, model_type: &str, tensors: &Tensors) {
    let config = json!({ "model_type": model_type });
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (&**name, tensor.clone()))
        .collect();
    write_base(folder, Some(&config), &tensors);
}

#[test]
fn adapters_merge_alike_under_the_names_of_transformers_4_and_5_with_and_without_a_head() {
    let text = std::fs::read(fixture("families/transformers.json")).unwrap();
    let all: Value = serde_json::from_slice(&text).unwrap();
    let models = all["models"].as_object().unwrap();
    assert!(models.len() >= 22);
    for (name, model) in models {
        let model_type = model["model_type"].as_str().unwrap();
        let model = Model(model);
        let room = Room::new();
        let numbers = &mut Random(3);
        let base: Tensors = model
            .files()
            .map(|(name, told)| (name.clone(), random(numbers, &shape(told))))
            .collect();
        let all = [Names::Files, Names::Memory, Names::Bare];
        for names in all {
            write(
                &room.path(&format!("{names:?}")),
                model_type,
                &model.named(&base, names),
            );
        }
        let merged = |home: Names, adapter: &str| {
            let output = room.path("merged");
            let mut options = options(
                &room.path(&format!("{home:?}")),
                &room.path(adapter),
                &output,
            );
            options.force = true;
            merge(&options).unwrap_or_else(|e| panic!("{name}: {adapter} on {home:?}: {e:?}"));
            read(&output.join("model.safetensors"))
        };
        for words in all.into_iter().filter(|names| model.has(*names)) {
            for home in all.into_iter().filter(|names| model.has(*names)) {
                // What both can say, in the words of the files.
                let layers = model.write(&room.path("plain"), words, home, Names::Files);
                model.write(&room.path("adapter"), words, home, words);
                assert!(layers >= 5, "{name}: {layers}");
                let expected = merged(Names::Files, "plain");
                let changed = expected
                    .iter()
                    .filter(|(name, tensor)| base[*name] != **tensor);
                assert_eq!(changed.count(), layers, "{name}");
                let found = merged(home, "adapter");
                for (tensor, expected) in model.named(&expected, home) {
                    assert!(
                        found[&tensor] == expected,
                        "{name}: {words:?} on {home:?}: {tensor}"
                    );
                }
            }
        }
    }
}
