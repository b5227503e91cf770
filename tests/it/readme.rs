//! The tables of README.md and docs/formats.md against the list of formats.

use std::collections::BTreeSet;

use loratool::formats::FORMATS;
use loratool::ops::convert;

fn text(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(path).unwrap()
}

/// What stands in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn readme_says_of_each_format_whether_it_is_written() {
    let readme = text("README.md");
    let start = readme.find("| format (`--to`) |").expect("the table");
    let rows = readme[start..].lines().skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let (mut written, mut others) = (BTreeSet::new(), BTreeSet::new());
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, format, _read, _merge, _convert, write, _] = cells[..] else {
            panic!("{row}");
        };
        let known = |name: &&str| FORMATS.iter().any(|format| format.id() == *name);
        let all = match write {
            "–" => &mut others,
            _ => &mut written,
        };
        all.extend(quoted(format).filter(known));
    }
    let targets: BTreeSet<&str> = convert::targets().map(|format| format.id()).collect();
    assert_eq!(written, targets);
    assert!(others.is_disjoint(&targets), "{others:?}");
}

#[test]
fn the_table_of_formats_has_the_name_of_each() {
    let formats = text("docs/formats.md");
    let start = formats
        .find("| format | recognised by |")
        .expect("the table");
    let rows = formats[start..].lines().skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let cells: Vec<String> = rows
        .filter_map(|row| row.split('|').nth(1))
        .map(|cell| cell.replace(['[', ']'], ""))
        .collect();
    for format in FORMATS {
        // Cells say `[name](page) (what tells it from others)`.
        let name: String = format.name().chars().take_while(|c| *c != '(').collect();
        let found = cells.iter().any(|cell| cell.contains(name.trim()));
        assert!(found, "{}: {cells:?}", format.name());
    }
}
