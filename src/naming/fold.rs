//! Long lists of names, folded for people.

use std::collections::BTreeMap;

/// Folds names that differ only in one number: `model.layers.{0..15}.mlp.down_proj`.
///
/// The order of the first appearances is kept.
///
/// ```
/// let names = ["h.0.c_fc", "h.1.c_fc", "h.2.c_fc", "wte"];
/// assert_eq!(loratool::naming::fold::fold(&names), ["h.{0..2}.c_fc", "wte"]);
/// ```
pub fn fold<S: AsRef<str>>(names: &[S]) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for name in names {
        let (pattern, number) = first_number(name.as_ref());
        let numbers = groups.entry(pattern.clone()).or_insert_with(|| {
            order.push(pattern);
            Vec::new()
        });
        numbers.extend(number);
    }
    order
        .into_iter()
        .map(|pattern| match groups[&pattern].as_slice() {
            [] => pattern,
            numbers => pattern.replacen('\0', &ranges(numbers), 1),
        })
        .collect()
}

/// The kind of a layer: its path with `*` for every number.
///
/// ```
/// assert_eq!(loratool::naming::fold::kind("h.0.experts.3.c_fc"), "h.*.experts.*.c_fc");
/// ```
pub fn kind(name: &str) -> String {
    let is_number =
        |segment: &str| !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit());
    let segments = name
        .split('.')
        .map(|segment| if is_number(segment) { "*" } else { segment });
    segments.collect::<Vec<_>>().join(".")
}

/// The name with its first all-digit segment replaced by a NUL, and that number.
fn first_number(name: &str) -> (String, Option<usize>) {
    let mut number = None;
    let segments: Vec<&str> = name
        .split('.')
        .map(|segment| match segment.parse::<usize>() {
            Ok(found) if number.is_none() && found.to_string() == segment => {
                number = Some(found);
                "\0"
            }
            _ => segment,
        })
        .collect();
    (segments.join("."), number)
}

fn ranges(numbers: &[usize]) -> String {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for number in sorted {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => parts.push((number, number)),
        }
    }
    let text = |(start, end): &(usize, usize)| match start == end {
        true => start.to_string(),
        false => format!("{start}..{end}"),
    };
    match parts.as_slice() {
        [(start, end)] if start == end => start.to_string(),
        parts => format!(
            "{{{}}}",
            parts.iter().map(text).collect::<Vec<_>>().join(",")
        ),
    }
}
