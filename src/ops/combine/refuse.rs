//! Which layers cannot be combined in a way, and why.

use super::join::{Layer, Part};
use super::layer::Way;
use crate::adapter::{BiasUse, Order};
use crate::error::Result;

/// Why a layer cannot be combined in a way, if so.
pub(super) fn refused(
    layer: &Layer,
    way: Way,
    lambda: f64,
    ranked: bool,
) -> Result<Option<String>> {
    let Way::Recipe(recipe) = way else {
        return Ok(None);
    };
    let sequential = |part: &&Part| part.module.method.order() == Order::Sequential;
    let name = |part: &Part| part.module.method.name();
    if recipe.on_changes.is_some() {
        return Ok(not_blended(layer));
    }
    let parts = taken(layer);
    if parts.len() > 1
        && let Some(part) = parts.iter().copied().find(sequential)
    {
        let why = "its change depends on the weight, so that several do not add up";
        return Ok(Some(format!("{}: {why}", name(part))));
    }
    if is_mixed(&parts) {
        let ranks = parts
            .iter()
            .all(|part| part.module.method.rank(&part.module).is_some());
        return Ok(match not_blended(layer) {
            None if !ranked && !ranks => {
                Some("of several methods, which have no rank together: --rank says one".to_owned())
            }
            other => other,
        });
    }
    if let [part] = parts.as_slice()
        && !part.module.method.ignores_strength()
        && part
            .module
            .method
            .sum(&[(&part.module, part.strength * lambda)])?
            .is_none()
    {
        let why = "has no place for a strength without its base";
        return Ok(Some(format!("{} {why}", name(part))));
    }
    Ok(None)
}

/// Why the changes of a layer cannot be put together as matrices.
fn not_blended(layer: &Layer) -> Option<String> {
    layer.parts.iter().find_map(|part| {
        let (module, method) = (&part.module, part.module.method);
        if method.order() == Order::Sequential {
            return Some(format!(
                "{}: its change depends on the weight",
                method.name()
            ));
        }
        if method.bias(module) != BiasUse::No {
            return Some("it changes a bias, which only a sum of one method does".to_owned());
        }
        match method.shape(module) {
            Some(shape) if shape.len() > 1 => None,
            _ => Some("it is not a matrix".to_owned()),
        }
    })
}

/// The parts that count.
pub(super) fn taken(layer: &Layer) -> Vec<&Part> {
    layer
        .parts
        .iter()
        .filter(|part| part.strength != 0.0)
        .collect()
}

pub(super) fn is_mixed(parts: &[&Part]) -> bool {
    let names = parts.iter().map(|part| part.module.method.name());
    let mut others = names.skip(1);
    parts
        .first()
        .is_some_and(|first| others.any(|name| name != first.module.method.name()))
}
