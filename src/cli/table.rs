//! Lines of a table in which each stands for the layers of one kind.

/// Layers by their kind, in the order in which the kinds come first.
pub(super) fn kinds<T>(layers: &[T], path: impl Fn(&T) -> &str) -> Vec<(String, Vec<&T>)> {
    let mut kinds: Vec<(String, Vec<&T>)> = Vec::new();
    for layer in layers {
        let kind = loratool::naming::fold::kind(path(layer));
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, group)) => group.push(layer),
            None => kinds.push((kind, vec![layer])),
        }
    }
    kinds
}

/// A number that all have, or the range.
pub(super) fn numbers(values: impl Iterator<Item = usize> + Clone) -> String {
    let (least, most) = (values.clone().min().unwrap_or(0), values.max().unwrap_or(0));
    match least == most {
        true => least.to_string(),
        false => format!("{least} to {most}"),
    }
}

/// A share that all have, or the range.
pub(super) fn shares(values: impl Iterator<Item = f64>) -> String {
    let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    match percent(low) == percent(high) {
        true => percent(low),
        false => format!("{} to {}", percent(low), percent(high)),
    }
}

/// A share of 1.
pub(super) fn percent(share: f64) -> String {
    match share * 100.0 {
        0.0 => "0 %".to_owned(),
        small if small < 0.01 => format!("{small:.1e} %"),
        some if some < 10.0 => format!("{some:.2} %"),
        many => format!("{many:.1} %"),
    }
}
