//! The map of the library, kept true: who may know of whom, who may print, who may say `unsafe`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Every room, and the rooms it may know. What is not listed is forbidden.
const MAY_KNOW: &[(&str, &[&str])] = &[
    (
        "ops",
        &[
            "adapter",
            "checkpoint",
            "containers",
            "error",
            "formats",
            "json",
            "linalg",
            "mapped",
            "methods",
            "naming",
            "notice",
            "pattern",
            "printable",
            "tensor",
        ],
    ),
    (
        "formats",
        &[
            "adapter",
            "containers",
            "error",
            "json",
            "mapped",
            "methods",
            "naming",
            "notice",
            "pattern",
            "printable",
            "tensor",
        ],
    ),
    ("methods", &["adapter", "error", "linalg", "tensor"]),
    (
        "adapter",
        &["error", "linalg", "naming", "notice", "tensor"],
    ),
    (
        "checkpoint",
        &[
            "containers",
            "error",
            "json",
            "mapped",
            "notice",
            "printable",
            "tensor",
        ],
    ),
    ("containers", &["error", "json", "mapped", "tensor"]),
    ("naming", &["error"]),
    ("linalg", &["error", "tensor"]),
    ("tensor", &["error", "mapped"]),
    ("json", &["error", "mapped"]),
    ("pattern", &["error"]),
    ("mapped", &["error"]),
    ("notice", &["printable"]),
    ("error", &["printable"]),
    ("printable", &[]),
];

/// Names that the crate's root gives on, and their rooms.
const REEXPORTED: &[(&str, &str)] = &[
    ("Error", "error"),
    ("Kind", "error"),
    ("Reason", "error"),
    ("Result", "error"),
    ("printable", "printable"),
    ("printable_json", "printable"),
];

/// Every source file below `src`, by its path there.
fn sources() -> BTreeMap<String, String> {
    fn walk(folder: &Path, root: &Path, found: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, root, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap();
                let name = name.to_str().unwrap().replace('\\', "/");
                found.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    walk(&root, &root, &mut found);
    assert!(found.len() > 20, "{:?}", found.keys());
    found
}

/// The code of a file: no comments and no texts, whose words are not code.
fn code(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if let Some(length) = text_length(rest) {
            code.push_str("\"\"");
            rest = &rest[length..];
        } else if rest.starts_with("'\"'") || rest.starts_with("b'\"'") {
            rest = &rest[rest.find("\"'").unwrap() + 2..];
        } else if rest.starts_with("'\\") {
            let end = rest[2..].char_indices().skip(1).find(|(_, c)| *c == '\'');
            rest = &rest[2 + end.unwrap().0 + 1..];
        } else {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    code
}

/// The length of the string literal that a piece of code starts with.
fn text_length(code: &str) -> Option<usize> {
    if let Some(raw) = code.strip_prefix('r') {
        let marks = raw.chars().take_while(|c| *c == '#').count();
        let body = raw[marks..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(marks));
        return Some(1 + marks + 1 + body.find(&end)? + end.len());
    }
    let body = code.strip_prefix('"')?;
    let mut escaped = false;
    let end = body.char_indices().find(|(_, c)| {
        let ends = *c == '"' && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    })?;
    Some(1 + end.0 + 1)
}

/// The paths behind every `crate::` and `loratool::`, one for each leaf of a group in braces.
fn paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for root in ["crate::", "loratool::"] {
        for (at, _) in code.match_indices(root) {
            let whole = code[..at].chars().next_back();
            if !whole.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                leaves(&code[at + root.len()..], "", &mut found);
            }
        }
    }
    found
}

/// Reads one tree of a `use`, and returns what follows it.
fn leaves<'a>(code: &'a str, above: &str, found: &mut Vec<String>) -> &'a str {
    let code = code.trim_start();
    if let Some(mut rest) = code.strip_prefix('{') {
        loop {
            rest = leaves(rest, above, found).trim_start();
            match rest.strip_prefix(',') {
                Some(more) if !more.trim_start().starts_with('}') => rest = more,
                Some(more) => return more.trim_start().strip_prefix('}').unwrap_or(""),
                None => return rest.strip_prefix('}').unwrap_or(rest),
            }
        }
    }
    let end = code
        .find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*')
        .unwrap_or(code.len());
    let path = match above {
        "" => code[..end].to_owned(),
        above => format!("{above}::{}", &code[..end]),
    };
    match code[end..].strip_prefix("::") {
        Some(rest) => leaves(rest, &path, found),
        None => {
            found.push(path);
            &code[end..]
        }
    }
}

/// The room of a path behind `crate::`.
fn room_of(path: &str) -> &str {
    let first = path.split("::").next().unwrap_or("");
    let known = REEXPORTED
        .iter()
        .find(|(name, _)| *name == path && first == path);
    known.map_or(first, |(_, room)| room)
}

/// The room of a file.
fn room_of_file(name: &str) -> &str {
    let room = name.split('/').next().unwrap();
    room.strip_suffix(".rs").unwrap_or(room)
}

#[test]
fn the_reader_of_this_test_understands_paths() {
    let text = r##"
        // crate::comment
        use crate::a::{b, c::{self, d}, e::*,};
        use crate::{f, g::h as i};
        fn x(y: crate::j::K) { let z = "crate::text \" crate::more"; mycrate::no(); }
        let q = ['"', '\'', '\\', b'"']; r#"crate::raw " crate::raw"#; crate::l();
        loratool::m::n
    "##;
    let mut found = paths(&code(text));
    found.sort();
    assert_eq!(
        found,
        [
            "a::b",
            "a::c::d",
            "a::c::self",
            "a::e::*",
            "f",
            "g::h",
            "j::K",
            "l",
            "m::n"
        ]
    );
}

#[test]
fn arrows_between_rooms_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = MAY_KNOW.iter().copied().collect();
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for (name, source) in sources() {
        let from = room_of_file(&name);
        if ["lib", "main", "cli"].contains(&from) {
            continue;
        }
        let may_know = allowed.get(from);
        let may_know = may_know.unwrap_or_else(|| panic!("`{from}` is not in the map above"));
        for path in paths(&code(&source)) {
            let to = room_of(&path);
            seen.insert((from.to_owned(), to.to_owned()));
            if to != from && !may_know.contains(&to) {
                wrong.push(format!("{name} knows crate::{path}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    for arrow in [
        ("ops", "formats"),
        ("formats", "methods"),
        ("methods", "adapter"),
    ] {
        assert!(
            seen.contains(&(arrow.0.to_owned(), arrow.1.to_owned())),
            "{arrow:?}"
        );
    }
}

#[test]
fn the_map_of_rooms_has_no_circle() {
    let allowed: BTreeMap<&str, &[&str]> = MAY_KNOW.iter().copied().collect();
    // Rooms whose every arrow leads to a room that is done are done; a circle never is.
    let mut done: BTreeSet<&str> = BTreeSet::new();
    while done.len() < allowed.len() {
        let next: Vec<&str> = allowed
            .iter()
            .filter(|(room, below)| {
                !done.contains(*room) && below.iter().all(|below| done.contains(below))
            })
            .map(|(room, _)| *room)
            .collect();
        let open: Vec<_> = allowed
            .keys()
            .filter(|room| !done.contains(*room))
            .collect();
        assert!(!next.is_empty(), "a circle among {open:?}");
        done.extend(next);
    }
}

#[test]
fn verbs_and_command_line_name_no_method_and_no_format() {
    let mut checked = 0;
    let sources = sources();
    let modules: BTreeSet<&str> = sources
        .keys()
        .filter_map(|name| name.strip_prefix("formats/"))
        .filter_map(|name| name.split(['/', '.']).next())
        .collect();
    assert!(modules.contains("peft") && modules.contains("kohya"));
    for (name, source) in &sources {
        if !["ops", "cli", "main"].contains(&room_of_file(name)) {
            continue;
        }
        checked += 1;
        for path in paths(&code(source)) {
            // The table of methods, never one of them.
            let named = room_of(&path) == "methods" && path != "methods::METHODS";
            assert!(!named, "{name}: {path}");
            let mut parts = path.split("::");
            if parts.next() == Some("formats") {
                // A trait, a type, a table or what chooses from it; never the module of one spelling.
                let part = parts.next().unwrap_or("self");
                assert!(!modules.contains(part), "{name}: {path}");
            }
        }
    }
    assert!(checked > 5);
}

/// Whether a word stands alone in a piece of code.
fn says(code: &str, word: &str) -> bool {
    let part_of_a_name = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        !part_of_a_name(code[..at].chars().next_back())
            && !part_of_a_name(code[at + word.len()..].chars().next())
    })
}

#[test]
fn only_the_room_of_devices_names_the_library_that_drives_them() {
    let mut found = BTreeSet::new();
    for (name, source) in sources() {
        let code = code(&source);
        let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
        if words.into_iter().any(|word| word.starts_with("candle")) {
            found.insert(name);
        }
    }
    let room = ["linalg/device/candle.rs", "linalg/device/mod.rs"];
    assert_eq!(found, room.map(str::to_owned).into());
}

#[test]
fn unsafe_code_exists_in_three_rooms_only_and_each_use_states_its_contract() {
    let rooms = ["mapped.rs", "checkpoint/system.rs", "linalg/lanes.rs"];
    let mut found = Vec::new();
    for (name, source) in sources() {
        if !says(&code(&source), "unsafe") {
            continue;
        }
        let head: String = source
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect();
        assert!(
            head.contains("one of the three rooms"),
            "{name} does not say so"
        );
        let lines: Vec<&str> = source.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if says(&code(line), "unsafe {") || code(line).contains("unsafe fn ") {
                let before = &lines[number.saturating_sub(16)..number];
                let stated = before
                    .iter()
                    .any(|line| line.contains("SAFETY:") || line.contains("# Safety"));
                assert!(stated, "{name}:{}: {line}", number + 1);
            }
        }
        found.push(name);
    }
    found.sort_by_key(|name| rooms.iter().position(|room| room == name));
    assert_eq!(found, rooms);
}

#[test]
fn only_the_command_line_prints_reads_the_environment_or_ends_the_process() {
    let printing = [
        "println!",
        "eprintln!",
        "print!",
        "eprint!",
        "dbg!",
        "stdout",
        "stderr",
    ];
    let others = [
        "env::var",
        "env::vars",
        "env::args",
        "process::exit",
        "stdin",
    ];
    for (name, source) in sources() {
        if ["cli", "main"].contains(&room_of_file(&name)) {
            continue;
        }
        let code = code(&source);
        for word in printing.iter().chain(&others) {
            let found = code.match_indices(word).any(|(at, _)| {
                let before = code[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
            });
            assert!(!found, "{name} says {word}");
        }
    }
}

#[test]
fn nothing_in_the_library_speaks_to_a_network_or_starts_a_process() {
    for (name, source) in sources() {
        let code = code(&source);
        for word in [
            "std::net",
            "TcpStream",
            "UdpSocket",
            "UnixStream",
            "Command::new",
            "reqwest",
        ] {
            // `clap` has a type of that name, which starts nothing.
            let harmless = word == "Command::new" && name.starts_with("cli");
            assert!(harmless || !code.contains(word), "{name} says {word}");
        }
    }
    // Some providers of LAPACK and BLAS download sources while they build; each has a feature that asks for it.
    let crates = crates_without(&["ndarray-linalg", "intel-mkl-src"]);
    assert!(crates.len() > 50, "{crates:?}");
    for name in [
        "tokio",
        "hyper",
        "reqwest",
        "ureq",
        "curl",
        "native-tls",
        "rustls",
        "socket2",
    ] {
        assert!(!crates.contains(name), "{name}");
    }
}

/// Every crate that `Cargo.lock` says the package may need, but for some and what only they need.
fn crates_without(left_out: &[&str]) -> BTreeSet<String> {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    let lock = std::fs::read_to_string(lock).unwrap();
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        // `name = "…"`, and lines of `"…"` or `"… version"` for what it needs; of two versions all count.
        let name = package.split('"').nth(1).unwrap();
        let list = package
            .split_once("dependencies = [")
            .map_or("", |(_, rest)| rest);
        let list = list.split('"').skip(1).step_by(2);
        let names = list.map(|entry| entry.split(' ').next().unwrap());
        needs.entry(name).or_default().extend(names);
    }
    for name in left_out {
        assert!(needs.contains_key(name), "{name} is not needed any more");
    }
    let mut found = BTreeSet::new();
    let mut next = vec!["loratool"];
    while let Some(name) = next.pop() {
        if !left_out.contains(&name) && found.insert(name.to_owned()) {
            next.extend(&needs[name]);
        }
    }
    found
}
