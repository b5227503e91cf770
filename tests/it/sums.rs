//! Sums of modules of one method, and what they change without a weight.

use loratool::adapter::delta::Delta;
use loratool::adapter::{Layer, Module, Scale};
use loratool::formats::Found;
use loratool::linalg::truncated::Blocks;
use loratool::methods::METHODS;

use crate::goldens::cases;

/// All of Σ factor · change.
fn change(parts: &[(&Module, f64)]) -> Vec<f64> {
    let on = parts[0].0.geometry().expect("it tells its shape");
    let delta = Delta::of(parts, on).unwrap();
    let mut values = vec![0.0; delta.rows() * delta.columns()];
    delta.fill(0..delta.rows(), &mut values).unwrap();
    values
}

/// Modules of every golden that add to a weight and tell the shape of it.
fn modules() -> Vec<Module> {
    let mut all = Vec::new();
    for case in cases() {
        let found = Found::open(&case.folder.join("adapter")).unwrap();
        let Ok(adapter) = found.read(&Default::default()) else {
            continue;
        };
        all.extend(adapter.modules.into_iter().filter(|module| {
            let on = module.geometry();
            on.is_some_and(|on| Delta::of(&[(module, 1.0)], on).is_ok())
        }));
    }
    assert!(all.len() > 150, "{}", all.len());
    all
}

#[test]
fn a_sum_changes_a_weight_by_the_sum_of_the_changes() {
    let modules = modules();
    let mut seen = 0;
    for (first, second) in modules.iter().zip(modules.iter().skip(1)) {
        let alike = |module: &Module| {
            (
                module.method.name(),
                module.layer,
                module.method.shape(module),
            )
        };
        let mut second = second.clone();
        if alike(first) != alike(&second) {
            continue;
        }
        second.scale = Scale {
            value: 0.37,
            ..second.scale
        };
        for parts in [
            vec![(first, 0.7)],
            vec![(first, -1.5)],
            vec![(first, 0.7), (&second, -0.3)],
            vec![(first, 1.0), (first, 1.0), (&second, 2.0)],
            vec![(first, 1.0), (first, -1.0)],
        ] {
            let sum = first
                .method
                .sum(&parts)
                .unwrap()
                .expect("additive methods have sums");
            let (ours, wanted) = (change(&[(&sum, 1.0)]), change(&parts));
            let largest = wanted
                .iter()
                .fold(1e-30f64, |largest, value| largest.max(value.abs()));
            // Cancelled terms are as large as the parts.
            let scale = parts.iter().map(|part| change(&[(part.0, part.1)]));
            let scale = scale
                .flatten()
                .fold(largest, |largest, value| largest.max(value.abs()));
            for (a, b) in ours.iter().zip(&wanted) {
                assert!((a - b).abs() <= 1e-13 * scale, "{}: {a} {b}", first.path);
            }
            seen += 1;
        }
    }
    assert!(seen > 50, "{seen}");
}

#[test]
fn a_factor_alone_moves_no_bit_of_a_factor() {
    for module in modules()
        .iter()
        .filter(|module| module.method.rank(module).is_some())
    {
        let sum = module.method.sum(&[(module, 0.3)]).unwrap().unwrap();
        for ((role, tensor), (_, old)) in sum.parameters.iter().zip(&module.parameters) {
            assert_eq!(
                tensor.bytes().unwrap(),
                old.bytes().unwrap(),
                "{} {role:?}",
                module.path
            );
        }
        assert_eq!(sum.scale.value, 0.3 * module.scale.value);
        let (alpha, rank) = (sum.scale.alpha.unwrap(), sum.scale.rank.unwrap());
        assert!(
            (Scale::of(alpha, rank, sum.scale.root).value / sum.scale.value - 1.0).abs() < 1e-15
        );
    }
}

#[test]
fn factors_make_the_change_that_blocks_of_rows_make() {
    for module in &modules() {
        let on = module.geometry().unwrap();
        let parts = [(module, 0.8)];
        let Some((left, right)) = Delta::of(&parts, on).unwrap().factors().unwrap() else {
            assert!(module.method.rank(module).is_none(), "{}", module.path);
            continue;
        };
        let (ours, wanted) = (left.dot(&right), change(&parts));
        let largest = wanted
            .iter()
            .fold(0.0f64, |largest, value| largest.max(value.abs()));
        for (a, b) in ours.iter().zip(&wanted) {
            assert!((a - b).abs() <= 1e-12 * largest, "{}", module.path);
        }
    }
}

#[test]
fn a_module_with_zeros_behind_its_factors_changes_the_same_bits() {
    let mut seen = 0;
    for module in &modules() {
        let Some(rank) = module.method.rank(module) else {
            continue;
        };
        let wider = module.method.filled(module, rank + 3).unwrap();
        wider.method.check(&wider).unwrap();
        assert_eq!(wider.method.rank(&wider), Some(rank + 3));
        assert_eq!(wider.scale.value, module.scale.value);
        assert_eq!(
            change(&[(&wider, 1.0)]),
            change(&[(module, 1.0)]),
            "{}",
            module.path
        );
        seen += usize::from(module.layer == Layer::Embedding);
    }
    assert!(seen > 0);
}

#[test]
fn methods_without_sums_give_back_a_module_that_is_taken_once() {
    for case in cases() {
        let found = Found::open(&case.folder.join("adapter")).unwrap();
        let Ok(adapter) = found.read(&Default::default()) else {
            continue;
        };
        for module in &adapter.modules {
            let once = module.method.sum(&[(module, 1.0)]).unwrap();
            assert!(once.is_some(), "{}: {}", case.name, module.path);
        }
    }
    assert!(METHODS.len() > 3);
}
