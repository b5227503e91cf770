//! The output is complete and new, or as it was: aliases, leftovers, failures at every step.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use loratool::checkpoint::sink::{Destination, Faults, Operation, Shape};
use loratool::ops::merge::{Control, Options, Report, plan};
use loratool::{Error, Kind, Reason, Result};

use crate::hostile_support::{
    Room, SMALL_CONFIG, assert_reason, names_in, small_adapter, small_base, tensors, tree,
};
use crate::support::{merge, options};

/// Inputs for a merge in a folder of their own: a base as a file and as a folder, and an adapter.
struct Job {
    room: Room,
}

impl Job {
    fn new() -> Self {
        let room = Room::new();
        room.write("base.safetensors", small_base());
        room.write("base/one.safetensors", tensors(&[("m.weight", &[4, 3])]));
        room.write("base/two.safetensors", tensors(&[("other.weight", &[2])]));
        room.write(
            "base/model.safetensors.index.json",
            r#"{"metadata": {}, "weight_map": {"m.weight": "one.safetensors", "other.weight": "two.safetensors"}}"#,
        );
        room.write("base/config.json", r#"{"model_type": "x"}"#);
        room.write("base/tokenizer.json", "{}");
        room.write("adapter/adapter_config.json", SMALL_CONFIG);
        room.write("adapter/adapter_model.safetensors", small_adapter());
        Job { room }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.room.path(name)
    }

    /// Options for the base as a folder, with force.
    fn folder(&self, output: impl AsRef<Path>) -> Options {
        Options {
            force: true,
            ..options(
                &self.path("base"),
                &self.path("adapter"),
                &self.room.root().join(output),
            )
        }
    }

    /// Options for the base as a file, with force.
    fn file(&self, output: impl AsRef<Path>) -> Options {
        Options {
            base: self.path("base.safetensors"),
            ..self.folder(output)
        }
    }

    /// The inputs and all else, byte for byte.
    fn everything(&self) -> Vec<(PathBuf, Vec<u8>)> {
        tree(self.room.root())
    }
}

/// The bytes of a complete result.
fn result_of(options: &Options) -> Vec<(PathBuf, Vec<u8>)> {
    let room = Room::new();
    let output = room.root().join(options.output.file_name().unwrap());
    let options = Options {
        output: output.clone(),
        ..options.clone()
    };
    merge(&options).unwrap();
    tree(&output)
}

fn is_folder(options: &Options) -> bool {
    options.base.is_dir()
}

/// Asserts that a merge is refused and that not one byte or name changed anywhere.
#[track_caller]
fn refused(job: &Job, options: &Options) -> Error {
    let before = job.everything();
    let error = merge(options).map(drop).unwrap_err();
    assert_eq!(job.everything(), before, "{error:?}");
    assert_eq!(error.kind(), Kind::Output, "{error:?}");
    assert_eq!(error.file(), Some(options.output.as_path()), "{error:?}");
    error
}

// ------------------------------------------------------------------ aliases

#[test]
fn an_output_that_is_an_input_is_refused_however_it_is_spelled() {
    let job = Job::new();
    job.room.folder("sub");
    for output in [
        "base",
        "base/",
        "base/.",
        "sub/../base",
        "base/../base",
        "./base",
        "adapter",
        "sub/../adapter",
    ] {
        let error = refused(&job, &job.folder(output));
        // Of an adapter the files are asked about first.
        assert_reason!(error, Reason::IsInput { .. } | Reason::ContainsInput { .. });
    }
    for output in [
        "base.safetensors",
        "sub/../base.safetensors",
        "adapter/adapter_model.safetensors",
    ] {
        let error = refused(&job, &job.file(output));
        assert_reason!(error, Reason::IsInput { .. });
    }
}

#[test]
#[cfg(unix)]
fn an_output_that_is_an_input_through_links_is_refused() {
    use std::os::unix::fs::symlink;
    let job = Job::new();
    let root = job.room.root();
    symlink(root, job.path("round")).unwrap();
    symlink("base", job.path("alias")).unwrap();
    symlink("base.safetensors", job.path("alias.safetensors")).unwrap();
    std::fs::hard_link(job.path("base.safetensors"), job.path("hard.safetensors")).unwrap();
    let before = std::fs::read(job.path("base.safetensors")).unwrap();
    for options in [
        job.folder("round/base"),
        job.folder("round/round/adapter"),
        job.folder("alias"),
        job.file("round/base.safetensors"),
        job.file("alias.safetensors"),
        job.file("hard.safetensors"),
        Options {
            base: job.path("alias"),
            ..job.folder("base")
        },
        Options {
            base: job.path("round/alias.safetensors"),
            ..job.file("base.safetensors")
        },
        Options {
            base: job.path("hard.safetensors"),
            ..job.file("base.safetensors")
        },
    ] {
        let error = merge(&options).map(drop).unwrap_err();
        // Of an adapter the files are asked about first.
        match options.output.ends_with("adapter") {
            true => assert_reason!(error, Reason::ContainsInput { .. }),
            false => assert_reason!(error, Reason::IsInput { .. }),
        }
        assert!(std::fs::symlink_metadata(&options.output).is_ok());
        assert_eq!(std::fs::read(job.path("base.safetensors")).unwrap(), before);
    }
}

#[test]
fn an_output_inside_an_input_is_refused() {
    let job = Job::new();
    job.room.folder("base/sub");
    for output in [
        "base/out",
        "base/sub/out",
        "adapter/out",
        "base/two.safetensors",
    ] {
        let error = refused(&job, &job.folder(output));
        assert_reason!(error, Reason::InsideInput { .. } | Reason::IsInput { .. });
    }
    // Beside a base that is one file there is room for the result.
    merge(&job.file("beside.safetensors")).unwrap();
}

#[test]
#[cfg(unix)]
fn an_output_inside_an_input_through_a_link_is_refused() {
    let job = Job::new();
    std::os::unix::fs::symlink("base", job.path("alias")).unwrap();
    let error = merge(&job.folder("alias/out")).map(drop).unwrap_err();
    assert_reason!(error, Reason::InsideInput { .. });
    assert!(!job.path("base/out").exists());
}

#[test]
fn an_output_that_contains_an_input_is_refused() {
    let job = Job::new();
    for name in ["base", "adapter"] {
        let inside = Path::new("outer/middle").join(name);
        std::fs::create_dir_all(job.path("outer/middle")).unwrap();
        std::fs::rename(job.path(name), job.path(inside.to_str().unwrap())).unwrap();
        // It looks like a checkpoint, so only the alias speaks against it.
        job.room.write("outer/model.safetensors", small_base());
        let mut options = job.folder("outer");
        if name == "base" {
            options.base = job.room.root().join(&inside);
        } else {
            options.adapters[0].path = job.room.root().join(&inside);
        }
        let error = refused(&job, &options);
        assert_reason!(error, Reason::ContainsInput { .. });
        std::fs::rename(job.path(inside.to_str().unwrap()), job.path(name)).unwrap();
    }
}

#[test]
#[cfg(unix)]
fn an_output_that_contains_what_an_input_links_to_is_refused() {
    use std::os::unix::fs::symlink;
    // The cache of the hub: the shards of a snapshot are links into `blobs`.
    let job = Job::new();
    let blobs = job.room.folder("blobs");
    job.room.write("blobs/model.safetensors", small_base());
    for shard in ["one.safetensors", "two.safetensors"] {
        let shard_path = job.path("base").join(shard);
        std::fs::rename(&shard_path, blobs.join(shard)).unwrap();
        symlink(blobs.join(shard), &shard_path).unwrap();
    }
    let before = tree(&blobs);
    let error = merge(&job.folder("blobs")).map(drop).unwrap_err();
    assert_reason!(error, Reason::ContainsInput { .. });
    assert_eq!(tree(&blobs), before);
}

#[test]
#[cfg(unix)]
fn an_output_that_holds_the_link_by_which_an_input_was_named_is_refused() {
    let job = Job::new();
    job.room.write("outer/model.safetensors", small_base());
    std::os::unix::fs::symlink("../base", job.path("outer/link")).unwrap();
    let options = Options {
        base: job.path("outer/link"),
        ..job.folder("outer")
    };
    let error = merge(&options).map(drop).unwrap_err();
    assert_reason!(error, Reason::ContainsInput { .. });
    assert!(job.path("outer/link").exists());
}

#[test]
fn a_file_that_belongs_to_the_base_is_no_output() {
    let job = Job::new();
    job.room.write("model.safetensors", small_base());
    job.room.write("config.json", "{}");
    let options = Options {
        base: job.path("model.safetensors"),
        ..job.folder("config.json")
    };
    assert_reason!(refused(&job, &options), Reason::IsInput { .. });
}

// ------------------------------------------------------------------ what is there already

#[test]
fn an_existing_output_is_replaced_only_by_force() {
    let job = Job::new();
    for options in [job.folder("out"), job.file("out.safetensors")] {
        merge(&options).unwrap();
        let careful = Options {
            force: false,
            ..options.clone()
        };
        assert_reason!(refused(&job, &careful), Reason::Exists);
        if is_folder(&options) {
            std::fs::write(options.output.join("stale.txt"), "old").unwrap();
        } else {
            std::fs::write(&options.output, "old").unwrap();
        }
        merge(&options).unwrap();
        assert_eq!(tree(&options.output), result_of(&options));
    }
    assert_eq!(
        job.room.names(),
        [
            "adapter",
            "base",
            "base.safetensors",
            "out",
            "out.safetensors"
        ]
    );
}

#[test]
fn force_replaces_no_folder_that_is_not_one_checkpoint() {
    let job = Job::new();
    for (name, files) in [
        ("notes", &["notes.txt"][..]),
        ("models", &["first.safetensors", "second.safetensors"]),
        ("deep", &["sub/model.safetensors"]),
        ("hidden", &[".profile"]),
    ] {
        for file in files {
            job.room.write(&format!("{name}/{file}"), "precious");
        }
        assert_reason!(refused(&job, &job.folder(name)), Reason::NotACheckpoint);
    }
    job.room.folder("empty");
    merge(&job.folder("empty")).unwrap();
}

#[test]
#[cfg(unix)]
fn nothing_is_written_through_a_link() {
    use std::os::unix::fs::symlink;
    let job = Job::new();
    job.room.write("elsewhere/model.safetensors", small_base());
    job.room.write("elsewhere.safetensors", "old");
    symlink("elsewhere", job.path("link")).unwrap();
    symlink("elsewhere.safetensors", job.path("link.safetensors")).unwrap();
    symlink("nowhere", job.path("broken")).unwrap();
    symlink("nowhere", job.path("broken.safetensors")).unwrap();
    let before = (tree(&job.path("elsewhere")), job.room.names());
    for options in [
        job.folder("link"),
        job.folder("broken"),
        job.file("link.safetensors"),
        job.file("broken.safetensors"),
    ] {
        for force in [true, false] {
            let options = Options {
                force,
                ..options.clone()
            };
            let error = merge(&options).map(drop).unwrap_err();
            assert_reason!(error, Reason::IsLink);
        }
    }
    assert_eq!((tree(&job.path("elsewhere")), job.room.names()), before);
}

#[test]
fn an_output_of_the_wrong_kind_is_refused() {
    let job = Job::new();
    job.room.write("file", "x");
    assert_reason!(
        refused(&job, &job.folder("file")),
        Reason::WrongKind {
            found: "a file",
            wanted: "a folder"
        }
    );
    job.room.write("folder.safetensors/model.safetensors", "x");
    assert_reason!(
        refused(&job, &job.file("folder.safetensors")),
        Reason::WrongKind {
            found: "a folder",
            wanted: "a file"
        }
    );
    #[cfg(unix)]
    {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let pipe = job.path("pipe.safetensors");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let error = merge(&job.file("pipe.safetensors")).map(drop).unwrap_err();
        assert_reason!(error, Reason::WrongKind { found, .. } if found.contains("pipe"));
    }
}

#[test]
fn an_output_without_a_folder_to_hold_it_or_without_a_name_is_refused() {
    let job = Job::new();
    for output in ["missing/out", "base.safetensors/out", "missing/../out"] {
        assert_reason!(refused(&job, &job.folder(output)), Reason::NoParent);
    }
    for output in ["base/..", "/"] {
        assert_reason!(refused(&job, &job.folder(output)), Reason::BadName);
    }
}

#[test]
#[cfg(unix)]
fn a_folder_that_cannot_be_written_to_is_refused_before_anything_is_computed() {
    use std::os::unix::fs::PermissionsExt;
    let job = Job::new();
    let locked = job.room.folder("locked");
    std::fs::set_permissions(&locked, PermissionsExt::from_mode(0o555)).unwrap();
    // Nothing is forbidden to root; the injected failures below stand in for it there.
    if File::create(locked.join("probe")).is_ok() {
        return;
    }
    let error = plan(&job.folder("locked/out")).map(drop).unwrap_err();
    assert_reason!(error, Reason::NotWritable);
    std::fs::set_permissions(&locked, PermissionsExt::from_mode(0o755)).unwrap();
}

#[test]
fn lack_of_space_is_noticed_before_anything_is_written() {
    let room = Room::new();
    let output = room.path("out");
    let check = Destination::check(&output, Shape::Folder, false, [], Faults::default());
    let destination = check.unwrap();
    destination.check_space(0).unwrap();
    assert_reason!(
        destination.check_space(u64::MAX).unwrap_err(),
        Reason::NoSpace {
            needed: u64::MAX,
            ..
        }
    );
    // A plan asks as well: a sparse base of 8 TiB, of which only the header is read.
    let job = Job::new();
    let size = 1u64 << 43;
    let header = format!(
        r#"{{"m.weight":{{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}},"big":{{"dtype":"U8","shape":[{size}],"data_offsets":[48,{}]}}}}"#,
        size + 48
    );
    let base = job.room.write(
        "sparse.safetensors",
        crate::hostile_support::file_of(&header, []),
    );
    let file = File::options().write(true).open(&base).unwrap();
    let length = 8 + header.len() as u64 + 48 + size;
    if file.set_len(length).is_err() || destination.check_space(size).is_ok() {
        return; // a file system without such files, or one with such room
    }
    let options = Options {
        base,
        ..job.file("out.safetensors")
    };
    assert_reason!(
        plan(&options).map(drop).unwrap_err(),
        Reason::NoSpace { .. }
    );
    assert!(!job.path("out.safetensors").exists());
}

#[test]
fn names_as_long_as_file_systems_allow_work() {
    let job = Job::new();
    let stem = "n".repeat(243);
    let names = [
        format!("{stem}.safetensors"),
        "n".repeat(255),
        "\u{e9}".repeat(127),
        format!("n{}", "\u{e9}".repeat(127)),
        "\u{6587}".repeat(85),
        format!("nn{}", "\u{1f980}".repeat(63)),
        "n".repeat(200),
        "n".repeat(201),
    ];
    let before = job.room.names();
    for name in &names {
        let options = match name.ends_with(".safetensors") {
            true => job.file(name),
            false => job.folder(name),
        };
        for _ in 0..2 {
            merge(&options).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        if options.output.is_dir() {
            std::fs::remove_dir_all(&options.output).unwrap();
        } else {
            std::fs::remove_file(&options.output).unwrap();
        }
        assert_eq!(job.room.names(), before);
    }
    let error = merge(&job.folder("n".repeat(256))).map(drop).unwrap_err();
    assert!(matches!(error.kind(), Kind::Io | Kind::Output), "{error:?}");
    assert_eq!(job.room.names(), before);
}

// ------------------------------------------------------------------ other runs, dead and alive

fn hidden(name: &str, end: &str) -> String {
    format!(".{name}.loratool-{end}")
}

#[test]
fn what_a_dead_run_left_is_swept_by_the_next() {
    for name in ["out", "out.safetensors"] {
        for shape in [Shape::File, Shape::Folder] {
            let job = Job::new();
            let options = match name {
                "out" => job.folder(name),
                _ => job.file(name),
            };
            job.room.write(&hidden(name, "lock"), "");
            match shape {
                Shape::File => job.room.write(&hidden(name, "tmp"), "half"),
                Shape::Folder => job
                    .room
                    .write(&format!("{}/one.safetensors", hidden(name, "tmp")), "half"),
            };
            merge(&options).unwrap();
            assert_eq!(tree(&options.output), result_of(&options));
            assert!(job.room.names().iter().all(|name| !name.starts_with('.')));
        }
    }
}

#[test]
fn an_output_that_a_dead_run_set_aside_is_put_back() {
    let job = Job::new();
    let options = job.folder("out");
    merge(&options).unwrap();
    let old = tree(&options.output);
    std::fs::rename(&options.output, job.path(&hidden("out", "old"))).unwrap();
    job.room
        .write(&format!("{}/x", hidden("out", "tmp")), "half");
    // Without force the run is refused, and the old output is where it was.
    let careful = Options {
        force: false,
        ..options.clone()
    };
    let error = merge(&careful).map(drop).unwrap_err();
    assert_reason!(error, Reason::Exists);
    assert_eq!(tree(&options.output), old);
    assert!(job.room.names().iter().all(|name| !name.starts_with('.')));
    // A copy that was set aside after the new one was in place is of no use any more.
    job.room.write(
        &format!("{}/model.safetensors", hidden("out", "old")),
        "older",
    );
    merge(&options).unwrap();
    assert_eq!(tree(&options.output), old);
    assert!(job.room.names().iter().all(|name| !name.starts_with('.')));
}

#[test]
#[cfg(unix)]
fn leftovers_that_are_links_are_removed_and_not_followed() {
    use std::os::unix::fs::symlink;
    let job = Job::new();
    job.room.write("precious/file", "x");
    symlink("precious", job.path(&hidden("out", "tmp"))).unwrap();
    merge(&job.folder("out")).unwrap();
    symlink("precious", job.path(&hidden("out", "old"))).unwrap();
    merge(&job.folder("out")).unwrap();
    assert_eq!(std::fs::read(job.path("precious/file")).unwrap(), b"x");
    // A lock that is a link would lock, or create, what it points to.
    symlink("created", job.path(&hidden("out", "lock"))).unwrap();
    let error = merge(&job.folder("out")).map(drop).unwrap_err();
    assert_reason!(error, Reason::Lock);
    assert!(!job.path("created").exists());
}

#[test]
fn an_output_that_another_run_is_writing_is_busy() {
    let job = Job::new();
    let options = job.folder("out");
    let lock = File::create(job.path(&hidden("out", "lock"))).unwrap();
    lock.lock().unwrap();
    job.room
        .write(&format!("{}/x", hidden("out", "tmp")), "of the other run");
    assert_reason!(refused(&job, &options), Reason::Busy);
    drop(lock);
    merge(&options).unwrap();
}

#[test]
fn of_two_runs_onto_one_output_one_is_complete_and_the_other_says_so() {
    let job = Job::new();
    for options in [job.folder("out"), job.file("out.safetensors")] {
        let loser: Mutex<Option<Error>> = Mutex::new(None);
        let during = |_, _| {
            let mut loser = loser.lock().unwrap();
            if loser.is_none() {
                *loser = Some(merge(&options).map(drop).unwrap_err());
            }
        };
        run(
            &options,
            &Control {
                progress: Some(&during),
                ..Control::default()
            },
        )
        .unwrap();
        assert_reason!(loser.into_inner().unwrap().unwrap(), Reason::Busy);
        assert_eq!(tree(&options.output), result_of(&options));
    }
    assert!(job.room.names().iter().all(|name| !name.starts_with('.')));
}

fn run(options: &Options, control: &Control<'_>) -> Result<Report> {
    plan(options)?.run(control)
}

// ------------------------------------------------------------------ failures at every step

/// Which operations fail.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failing {
    /// Only the one of this number.
    Only(usize),
    /// All from this number on, as on a disk that is full.
    From(usize),
}

/// Faults of this kind, and a record of the operations that were asked for.
fn faults(failing: Failing) -> (Faults, Arc<Mutex<Vec<Operation>>>) {
    let seen: Arc<Mutex<Vec<Operation>>> = Arc::default();
    let record = seen.clone();
    let fault = move |operation| {
        let mut record = record.lock().unwrap();
        let number = record.len();
        record.push(operation);
        let fails = match failing {
            Failing::Only(wanted) => number == wanted,
            Failing::From(first) => number >= first,
        };
        match fails {
            true => Err(io::Error::from(io::ErrorKind::StorageFull)),
            false => Ok(()),
        }
    };
    (Faults(Some(Arc::new(fault))), seen)
}

/// Runs with faults: the result, the operations, and the number of the one that moves into place.
pub(crate) fn faulty(options: &Options, failing: Failing) -> (Result<Report>, Vec<Operation>) {
    let (faults, seen) = faults(failing);
    let control = Control {
        faults,
        ..Control::default()
    };
    let result = run(options, &control);
    let seen = seen.lock().unwrap().clone();
    (result, seen)
}

/// Makes every operation of a merge fail in turn, over this old output or none.
pub(crate) fn fail_everywhere(options: &Options, old: Option<&[(PathBuf, Vec<u8>)]>) {
    let new = result_of(options);
    let (result, operations) = faulty(options, Failing::Only(usize::MAX));
    result.unwrap();
    for wanted in [
        Operation::Create,
        Operation::Write,
        Operation::Sync,
        Operation::Rename,
    ] {
        assert!(operations.contains(&wanted), "{operations:?}");
    }
    let renamed = operations
        .iter()
        .position(|operation| *operation == Operation::Rename)
        .unwrap();
    assert!(renamed < operations.len() - 1, "the folder is synced last");
    let parent = options.output.parent().unwrap();
    let reset = || {
        let _ = std::fs::remove_dir_all(&options.output);
        let _ = std::fs::remove_file(&options.output);
        for (path, bytes) in old.into_iter().flatten() {
            let path = match path.as_os_str().is_empty() {
                true => options.output.clone(),
                false => options.output.join(path),
            };
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
    };
    for failing in (0..operations.len()).flat_map(|n| [Failing::Only(n), Failing::From(n)]) {
        reset();
        let before = names_in(parent);
        let (result, seen) = faulty(options, failing);
        let error = result.map(drop).unwrap_err();
        // Files are created by one thread and written by another: where both fail, either may tell.
        let (number, failed) = match failing {
            Failing::Only(number) => (number, &seen[number..=number]),
            Failing::From(number) => (number, &seen[number..]),
        };
        let told = match error.reason() {
            Reason::Create => Operation::Create,
            Reason::Write => Operation::Write,
            Reason::Sync => Operation::Sync,
            Reason::Rename => Operation::Rename,
            _ => panic!("{failing:?}: {error:?}"),
        };
        assert!(failed.contains(&told), "{failing:?}: {error:?}");
        assert!(
            error.file().unwrap().starts_with(&options.output),
            "the hidden name is nobody's business: {error}"
        );
        assert!(std::error::Error::source(&error).is_some(), "{error:?}");
        if number <= renamed {
            assert_eq!(names_in(parent), before, "{failing:?}: {error:?}");
            if let Some(old) = old {
                assert_eq!(tree(&options.output), old, "{failing:?}: {error:?}");
            }
        } else {
            // Only the last sync follows: the result is whole, what failed is its durability.
            assert!(error.hint().unwrap().contains("complete"), "{error:?}");
            assert_eq!(tree(&options.output), new, "{failing:?}");
            let names = names_in(parent);
            assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
        }
        let again = Options {
            force: true,
            ..options.clone()
        };
        run(&again, &Control::default()).unwrap();
        assert_eq!(tree(&options.output), new, "{failing:?}");
    }
}

#[test]
fn a_failure_of_any_operation_leaves_no_output_where_there_was_none() {
    let job = Job::new();
    for force in [true, false] {
        for options in [job.folder("out"), job.file("out.safetensors")] {
            let options = Options { force, ..options };
            let absent = || {
                let _ = std::fs::remove_dir_all(&options.output);
                let _ = std::fs::remove_file(&options.output);
            };
            absent();
            fail_everywhere(&options, None);
            absent();
        }
    }
}

#[test]
fn a_failure_of_any_operation_leaves_the_old_output_as_it_was() {
    let job = Job::new();
    let before = job.everything();
    let old = [
        (PathBuf::from("model.safetensors"), b"the old one".to_vec()),
        (PathBuf::from("sub/notes.txt"), b"more".to_vec()),
    ];
    fail_everywhere(&job.folder("out"), Some(&old));
    let old = [(PathBuf::new(), b"the old one".to_vec())];
    fail_everywhere(&job.file("out.safetensors"), Some(&old));
    std::fs::remove_dir_all(job.path("out")).unwrap();
    std::fs::remove_file(job.path("out.safetensors")).unwrap();
    assert_eq!(job.everything(), before, "an input was changed");
}

#[test]
fn every_file_is_synced_before_the_rename_and_the_folder_after() {
    let job = Job::new();
    let options = job.folder("out");
    let (result, operations) = faulty(&options, Failing::Only(usize::MAX));
    result.unwrap();
    let count = |wanted| operations.iter().filter(|o| **o == wanted).count();
    let files = names_in(&options.output).len();
    // One folder and its files are created; each of them is synced, and then the folder above.
    assert_eq!(count(Operation::Create), files + 1);
    assert_eq!(count(Operation::Sync), files + 2);
    assert_eq!(count(Operation::Rename), 1);
    let end = &operations[operations.len() - 3..];
    assert_eq!(end, [Operation::Sync, Operation::Rename, Operation::Sync]);
}

// ------------------------------------------------------------------ during the run

/// Runs with something done at the n-th report of progress, and says whether it was reached.
fn disturbed(options: &Options, at: usize, disturb: &(dyn Fn() + Sync)) -> (Result<Report>, bool) {
    let calls = AtomicUsize::new(0);
    let progress = |_, _| {
        if calls.fetch_add(1, Ordering::Relaxed) == at {
            disturb();
        }
    };
    let result = run(
        options,
        &Control {
            progress: Some(&progress),
            ..Control::default()
        },
    );
    (result, calls.into_inner() > at)
}

#[test]
fn a_run_that_is_stopped_at_any_moment_leaves_nothing() {
    let job = Job::new();
    for options in [job.folder("out"), job.file("out.safetensors")] {
        let before = job.everything();
        for at in 0.. {
            let cancel = Arc::new(AtomicBool::new(false));
            let calls = AtomicUsize::new(0);
            let progress = |done, total| {
                assert!(done <= total);
                if calls.fetch_add(1, Ordering::Relaxed) == at {
                    cancel.store(true, Ordering::Relaxed);
                }
            };
            let control = Control {
                progress: Some(&progress),
                cancel: cancel.clone(),
                ..Control::default()
            };
            match run(&options, &control) {
                Err(error) => {
                    assert_reason!(error, Reason::Stopped);
                    assert_eq!(job.everything(), before, "stopped at {at}");
                }
                Ok(_) => {
                    // The last report comes when everything is done.
                    assert!(at >= 3 && calls.into_inner() == at + 1, "{at}");
                    break;
                }
            }
        }
        assert_eq!(tree(&options.output), result_of(&options));
    }
}

#[test]
fn a_run_that_is_stopped_before_it_begins_leaves_nothing() {
    let job = Job::new();
    let before = job.everything();
    let control = Control {
        cancel: Arc::new(AtomicBool::new(true)),
        ..Control::default()
    };
    let error = run(&job.folder("out"), &control).map(drop).unwrap_err();
    assert_reason!(error, Reason::Stopped);
    assert_eq!(job.everything(), before);
}

#[test]
fn an_input_that_changes_during_the_run_is_noticed_and_nothing_is_published() {
    let inputs = [
        "base/one.safetensors",
        "base/two.safetensors",
        "base/model.safetensors.index.json",
        "base/config.json",
        "base/tokenizer.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ];
    let touch = |path: &Path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
    };
    let grow = |path: &Path| {
        let file = File::options().append(true).open(path).unwrap();
        io::Write::write_all(&mut &file, b" ").unwrap();
    };
    // The same bytes and times, but another file.
    let replace = |path: &Path| {
        let copy = path.with_extension("copy");
        std::fs::copy(path, &copy).unwrap();
        let times = std::fs::metadata(path).unwrap().modified().unwrap();
        let file = File::options().write(true).open(&copy).unwrap();
        file.set_modified(times).unwrap();
        std::fs::rename(&copy, path).unwrap();
    };
    let remove = |path: &Path| std::fs::remove_file(path).unwrap();
    let disturbances: [&(dyn Fn(&Path) + Sync); 4] = [&touch, &grow, &replace, &remove];
    for input in inputs {
        for (number, disturb) in disturbances.into_iter().enumerate() {
            let job = Job::new();
            let path = job.path(input);
            let before = job.room.names();
            let (result, _) = disturbed(&job.folder("out"), 0, &|| disturb(&path));
            let error = result.map(drop).unwrap_err();
            assert_eq!(error.kind(), Kind::Changed, "{input}, {number}: {error:?}");
            assert_eq!(error.file(), Some(path.as_path()), "{error:?}");
            assert_eq!(job.room.names(), before);
        }
    }
}

#[test]
fn a_change_at_any_moment_before_the_end_is_noticed() {
    let job = Job::new();
    let base = job.path("base/two.safetensors");
    let mut at = 0;
    loop {
        let seconds = std::time::Duration::from_secs(at as u64 + 1);
        let touch = || {
            let file = File::options().write(true).open(&base).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + seconds).unwrap();
        };
        let (result, reached) = disturbed(&job.folder("out"), at, &touch);
        assert!(reached);
        match result {
            Err(error) => assert_reason!(error, Reason::InputChanged),
            // The last report comes behind the last look.
            Ok(_) => break,
        }
        assert!(!job.path("out").exists());
        at += 1;
    }
    assert!(at > 3);
}

#[test]
fn an_output_that_appears_during_the_run_is_left_alone() {
    for force in [false, true] {
        let job = Job::new();
        let options = Options {
            force,
            ..job.folder("out")
        };
        let appear = || drop(job.room.write("out/somebody.txt", "else"));
        let (result, _) = disturbed(&options, 0, &appear);
        let error = result.map(drop).unwrap_err();
        match force {
            false => assert_reason!(error, Reason::Appeared),
            true => assert_reason!(error, Reason::NotACheckpoint),
        }
        assert_eq!(names_in(&options.output), ["somebody.txt"]);
        assert!(job.room.names().iter().all(|name| !name.starts_with('.')));
    }
    let job = Job::new();
    let options = Options {
        force: false,
        ..job.file("out.safetensors")
    };
    let appear = || drop(job.room.write("out.safetensors", "else"));
    let (result, _) = disturbed(&options, 0, &appear);
    assert_reason!(result.map(drop).unwrap_err(), Reason::Appeared);
    assert_eq!(std::fs::read(&options.output).unwrap(), b"else");
}

#[test]
#[cfg(unix)]
fn an_adapter_that_is_cut_while_it_is_mapped_is_an_error_and_not_a_death() {
    loratool::mapped::guard_against_truncation();
    let job = Job::new();
    let before = job.room.names();
    for (length, input) in [
        (0, "adapter/adapter_model.safetensors"),
        (100, "adapter/adapter_model.safetensors"),
        (0, "base/one.safetensors"),
    ] {
        let job = Job::new();
        let path = job.path(input);
        let planned = plan(&job.folder("out")).unwrap();
        // After the plan has mapped and scanned it, before the run reads the factors.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(length).unwrap();
        let error = planned.run(&Control::default()).map(drop).unwrap_err();
        assert_eq!(error.kind(), Kind::Changed, "{error:?}");
        assert_eq!(error.file(), Some(path.as_path()));
        assert_eq!(job.room.names(), before);
    }
}
