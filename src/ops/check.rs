//! Whether a file may ship: inspection plus the laws. Made for CI, so nothing odd passes.

use std::path::Path;

use indexmap::IndexSet;
use serde::Serialize;

use super::inspect::{
    Conversion, Inspection, Opened, Options, Problem, of_checkpoint, of_tensors, open,
};
use super::merge::{self, Selection, fits};
use crate::adapter::scan::{self, Scan};
use crate::checkpoint::Variant;
use crate::error::{Error, Result};
use crate::formats::ReadOptions;
use crate::notice::{Notice, NoticeKind};
use crate::tensor::Tensor;

/// The verdict on a path.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Version of this schema.
    pub schema: u32,
    /// Whether nothing was found.
    pub clean: bool,
    /// The exit code: 0 clean, 1 odd but readable, otherwise that of the first error.
    pub exit_code: u8,
    /// Everything that was found, each once.
    pub findings: IndexSet<Finding>,
    /// What the path is, if it could be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspection: Option<Inspection>,
}

/// One thing that is wrong or odd.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Finding {
    /// Name of the notice or of the error's kind.
    pub kind: String,
    /// The file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The tensor, module, key or field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub item: Option<String>,
    /// The reason.
    pub text: String,
}

/// The exit code of files that can be read and are odd.
pub const ODD: u8 = 1;

/// Checks a file or folder; with a base, also that every module has its place there; with target formats,
/// also that each can say everything.
///
/// Never fails: what is wrong is a finding.
pub fn check(path: &Path, options: &Options) -> Verdict {
    let mut verdict = Verdict {
        schema: 1,
        clean: false,
        exit_code: 0,
        findings: IndexSet::new(),
        inspection: None,
    };
    if let Err(error) = verdict.collect(path, options) {
        verdict.error(&error);
    }
    verdict.clean = verdict.findings.is_empty();
    if verdict.exit_code == 0 && !verdict.clean {
        verdict.exit_code = ODD;
    }
    verdict
}

impl Verdict {
    fn collect(&mut self, path: &Path, options: &Options) -> Result<()> {
        match open(path)? {
            Opened::Checkpoint(checkpoint) => {
                let inspection = of_checkpoint(path, &checkpoint);
                self.notices(&inspection.notices);
                self.inspection = Some(inspection);
                for shard in &checkpoint.shards {
                    shard.file.verify()?;
                }
                let tensors: Vec<&Tensor> = checkpoint.tensors().collect();
                let scans = Scan::all(&tensors)?;
                let odd = tensors
                    .iter()
                    .zip(&scans)
                    .filter(|(_, scan)| scan.not_finite > 0);
                for (tensor, scan) in odd {
                    let text = format!("{} values are NaN or infinite", scan.not_finite);
                    let notice = Notice::new(NoticeKind::NotFinite, text).on(&*tensor.name);
                    self.notices(&[notice.in_file(tensor.input.path())]);
                }
                for input in checkpoint.inputs() {
                    input.verify_unchanged()?;
                }
            }
            Opened::Tensors(found) => {
                found.file.verify()?;
                let (inspection, adapter) = of_tensors(path, &found, options)?;
                let name = found.file.input.path().to_string_lossy().into_owned();
                let problem = inspection.problem.clone();
                let described: Vec<Notice> = inspection.notices.clone();
                let conversions = inspection.conversions.clone();
                self.inspection = Some(inspection);
                match problem {
                    Some(problem) => self.problem(&problem, &name),
                    None => self.notices(&described),
                }
                for conversion in &conversions {
                    self.conversion(conversion, &name);
                }
                if let Some(adapter) = adapter {
                    let tensors: Vec<&Tensor> = adapter.tensors().collect();
                    let scans = Scan::all(&tensors)?;
                    self.notices(&scan::notices(&adapter, &tensors, &scans));
                    if let Some(base) = &options.base {
                        self.fit(path, base, &options.read)?;
                    }
                }
                for input in found.inputs() {
                    input.verify_unchanged()?;
                }
            }
        }
        Ok(())
    }

    fn fit(&mut self, path: &Path, base: &Path, read: &ReadOptions) -> Result<()> {
        let options = merge::Options {
            base: base.to_owned(),
            variant: Variant::Any,
            adapters: vec![Selection {
                path: path.to_owned(),
                strength: 1.0,
                strength_for: Vec::new(),
            }],
            read: read.clone(),
            // Found already, with its own line.
            allow_nonfinite: true,
            ..merge::Options::default()
        };
        self.notices(&fits(&options)?);
        Ok(())
    }

    /// A target that cannot say everything is a finding; one whose names cannot be told, an error.
    fn conversion(&mut self, conversion: &Conversion, file: &str) {
        for loss in &conversion.losses {
            self.findings.insert(Finding {
                kind: "loss".to_owned(),
                file: Some(file.to_owned()),
                item: Some(loss.item.clone()),
                text: format!("{} cannot say it: {}", conversion.to, loss.text),
            });
        }
        if let Some(problem) = &conversion.problem {
            let problem = Problem {
                text: format!("to {}: {}", conversion.to, problem.text),
                ..problem.clone()
            };
            self.problem(&problem, file);
        }
    }

    fn notices(&mut self, notices: &[Notice]) {
        for notice in notices.iter().filter(|notice| notice.kind.is_finding()) {
            self.findings.insert(Finding {
                kind: notice.kind.to_string(),
                file: notice.file.clone(),
                item: notice.item.clone(),
                text: notice.text.clone(),
            });
        }
    }

    fn error(&mut self, error: &Error) {
        let file = error.file().map(|file| file.to_string_lossy().into_owned());
        let one = Finding {
            kind: error.kind().name().to_owned(),
            file: file.clone(),
            item: error.item().map(str::to_owned),
            text: error.cause(),
        };
        if error.cases().len() > 1 {
            let case = |case: &String| Finding {
                item: None,
                text: case.clone(),
                ..one.clone()
            };
            self.findings.extend(error.cases().iter().map(case));
        } else {
            let case = error
                .cases()
                .first()
                .map(|case| format!("{}: {case}", one.text));
            self.findings.insert(Finding {
                text: case.unwrap_or_else(|| one.text.clone()),
                ..one
            });
        }
        self.exit_code = error.kind().exit_code();
    }

    fn problem(&mut self, problem: &Problem, file: &str) {
        let one = Finding {
            kind: problem.kind.clone(),
            file: Some(file.to_owned()),
            item: None,
            text: problem.text.clone(),
        };
        self.findings.insert(one.clone());
        if problem.cases.len() > 1 {
            self.findings
                .extend(problem.cases.iter().map(|case| Finding {
                    text: case.clone(),
                    ..one.clone()
                }));
        }
        self.exit_code = problem.exit_code;
    }
}
