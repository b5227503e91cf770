//! One layer: its modules become one, exactly or by a fit, in the type that is asked for.

use super::compat::Row;
use super::join::Layer;
use super::recipes::{Changes, Recipe, Tuning, blended};
use super::refuse::{is_mixed, taken};
use super::report::Fit;
use crate::adapter::delta::Delta;
use crate::adapter::fit::Change;
use crate::adapter::{Geometry, Module, Order};
use crate::error::{Error, Reason, Result};
use crate::linalg::truncated::{Blocks, Rank, Settings, Truncation, product_square, truncated};
use crate::methods::METHODS;
use crate::ops::extract::Proved;
use crate::tensor::{Float, narrowed, typed};

/// How layers are combined.
#[derive(Clone, Copy)]
pub(super) enum Way {
    /// A way of our own.
    Recipe(&'static Recipe),
    /// The numbers of another tool.
    Peer(&'static Row),
}

/// What all layers have in common.
pub(super) struct Task<'a> {
    pub(super) way: Way,
    pub(super) tuning: &'a Tuning,
    /// The type of the factors.
    pub(super) dtype: Float,
    /// The rank of the result of a peer.
    pub(super) peer_rank: usize,
}

/// A module, and how well it says what it should; nothing where it is the sum.
pub(super) struct Made {
    pub(super) module: Module,
    pub(super) fit: Option<Fit>,
}

impl Task<'_> {
    /// Combines a layer at a rank, or exactly where none is asked for; nothing where strengths leave nothing.
    pub(super) fn made(
        &self,
        layer: &Layer,
        rank: Option<Rank>,
        settings: &Settings<'_>,
    ) -> Result<Option<Made>> {
        let at = |rank| Settings { rank, ..*settings };
        let on_changes = match self.way {
            Way::Peer(row) => {
                let module = self.rounded((row.make)(layer, row, self, settings)?)?;
                return Ok(Some(Made { module, fit: None }));
            }
            Way::Recipe(recipe) => recipe.on_changes,
        };
        if on_changes.is_some() || is_mixed(&taken(layer)) {
            let wanted = rank.unwrap_or_else(|| Rank::Fixed(sum_of_ranks(layer)));
            return self.with_change(layer, |change, on, shape| {
                self.fitted(layer, change, (on, shape), &at(wanted))
                    .map(Some)
            });
        }
        let Some(sum) = self.sum(layer)? else {
            return Ok(None);
        };
        match rank {
            Some(rank) if is_longer(&sum, rank) => self.shortened(sum, &at(rank)).map(Some),
            _ => Ok(Some(Made {
                module: self.lazily(sum),
                fit: None,
            })),
        }
    }

    /// The singular values of a layer; nothing where it has no ranks to choose.
    pub(super) fn spectrum(
        &self,
        layer: &Layer,
        settings: &Settings<'_>,
    ) -> Result<Option<(Vec<f64>, usize)>> {
        let found = |difference: &dyn Blocks| {
            let cost = difference.rows() + difference.columns();
            Ok(Some((truncated(difference, settings)?.spectrum, cost)))
        };
        let Way::Recipe(recipe) = self.way else {
            return Ok(None);
        };
        if recipe.on_changes.is_some() || is_mixed(&taken(layer)) {
            return self.with_change(layer, |change, _, _| found(change));
        }
        match self.sum(layer)? {
            Some(sum) if is_longer(&sum, Rank::Fixed(0)) => {
                let on = geometry(&sum)?;
                found(&Delta::of(&[(&sum, 1.0)], on)?)
            }
            _ => Ok(None),
        }
    }

    /// Σ strength · change, of one method.
    fn sum(&self, layer: &Layer) -> Result<Option<Module>> {
        let parts = taken(layer);
        let terms = parts.iter().map(|part| {
            let by = match part.module.method.ignores_strength() {
                true => 1.0,
                false => part.strength * self.tuning.lambda,
            };
            (&part.module, by)
        });
        let terms: Vec<(&Module, f64)> = terms.collect();
        let Some(first) = parts.first() else {
            return Ok(None);
        };
        let sum = first.module.method.sum(&terms)?;
        let none = || {
            let case = format!(
                "{}: {} has no sum of these",
                layer.name(),
                first.module.method.name()
            );
            Error::new(Reason::NotCombined { count: 1 }).with_cases(vec![case])
        };
        sum.ok_or_else(none).map(Some)
    }

    /// Gives the changes of a layer, put together, with how they lie and in which shape.
    fn with_change<T>(
        &self,
        layer: &Layer,
        take: impl FnOnce(&dyn Blocks, Geometry, &[usize]) -> Result<T>,
    ) -> Result<T> {
        // Of several shapes of one layer the one that tells the kernel.
        let shapes = layer
            .parts
            .iter()
            .map(|part| (part, part.module.method.shape(&part.module)));
        let longest = shapes.max_by_key(|(_, shape)| shape.as_ref().map_or(0, Vec::len));
        let Some((part, Some(shape))) = longest else {
            let method = layer.parts[0].module.method.name();
            let what = "a layer without its weight";
            return Err(layer.parts[0]
                .module
                .error(Reason::MethodOnTarget { method, what }));
        };
        let on = geometry(&part.module)?;
        if on
            .rows
            .checked_mul(on.columns)
            .is_none_or(|count| count > LARGEST)
        {
            let (what, limit) = ("elements in one layer", LARGEST);
            return Err(part.module.error(Reason::TooMany { what, limit }));
        }
        let pair = match self.way {
            Way::Recipe(recipe) => recipe.on_changes,
            Way::Peer(_) => None,
        };
        let Some(pair) = pair else {
            let parts = taken(layer);
            let terms = parts
                .iter()
                .map(|part| (&part.module, part.strength * self.tuning.lambda));
            let terms: Vec<(&Module, f64)> = terms.collect();
            return take(&Delta::of(&terms, on)?, on, &shape);
        };
        let deltas = layer
            .parts
            .iter()
            .map(|part| Delta::of(&[(&part.module, 1.0)], on));
        let deltas: Vec<Delta<'_>> = deltas.collect::<Result<_>>()?;
        let parts = deltas.iter().zip(&layer.parts);
        let changes = Changes {
            parts: parts
                .map(|(delta, part)| (delta as &dyn Blocks, part.strength, part.adapter))
                .collect(),
            whole: layer.whole,
            name: layer.name(),
        };
        let whole = blended(&changes, pair, self.tuning);
        take(&whole.map_err(|e| e.on(layer.name()))?, on, &shape)
    }

    /// A module that is fitted to a change.
    fn fitted(
        &self,
        layer: &Layer,
        difference: &dyn Blocks,
        (geometry, shape): (Geometry, &[usize]),
        settings: &Settings<'_>,
    ) -> Result<Made> {
        let method = METHODS.iter().copied().find(|method| method.fits());
        let method = method.ok_or_else(|| {
            Error::new(Reason::NotFitted {
                method: "any method",
            })
        })?;
        let change = Change {
            difference,
            sides: None,
            geometry,
            shape,
            settings: *settings,
            alpha: None,
        };
        let fitted = method.fit(&change).map_err(|e| e.on(layer.name()))?;
        let like = &layer.parts[0].module;
        let mut parameters = Vec::new();
        for (role, shape, values) in fitted.parameters {
            let bytes = narrowed(self.dtype, &values).map_err(|e| e.on(layer.name()))?;
            let source = &like.parameters[0].1;
            parameters.push((role, source.holding(self.dtype.dtype(), shape, bytes)));
        }
        let module = Module::new(
            like.path.clone(),
            method,
            parameters,
            fitted.scale,
            like.layer,
        )?;
        let module = module.spelled(like.spelling);
        self.measured(module, difference, geometry, &fitted.truncation, settings)
    }

    /// A module of a smaller rank.
    fn shortened(&self, sum: Module, settings: &Settings<'_>) -> Result<Made> {
        let on = geometry(&sum)?;
        let delta = Delta::of(&[(&sum, 1.0)], on)?;
        let mut found = truncated(&delta, settings).map_err(|e| e.on(&*sum.path))?;
        // A module has a rank, also where there is nothing to say.
        if found.values.is_empty() {
            found.fill(1);
        }
        let Some(module) = sum.method.of_triplets(&sum, &mut found) else {
            let module = self.lazily(sum);
            return Ok(Made { module, fit: None });
        };
        self.measured(self.rounded(module)?, &delta, on, &found, settings)
    }

    /// Tells what a module leaves of a change.
    fn measured(
        &self,
        module: Module,
        difference: &dyn Blocks,
        on: Geometry,
        found: &Truncation,
        settings: &Settings<'_>,
    ) -> Result<Made> {
        let left = left_of(difference, &module, on, settings)?;
        let (proof, excess) = Proved::of(found.proof);
        let square = found.square;
        let fit = Fit {
            norm: square.sqrt(),
            energy: found.energy(),
            residual: if square > 0.0 {
                (left / square).sqrt()
            } else {
                0.0
            },
            reached: found.reached,
            proof,
            excess,
        };
        Ok(Made {
            module,
            fit: Some(fit),
        })
    }

    /// The module in the type that is asked for, with its values in memory.
    fn rounded(&self, mut module: Module) -> Result<Module> {
        for (_, tensor) in &mut module.parameters {
            let bytes = narrowed(self.dtype, &tensor.to_f64()?);
            let bytes = bytes.map_err(|e| e.on(&*module.path))?;
            *tensor = tensor.holding(self.dtype.dtype(), tensor.shape.clone(), bytes);
        }
        Ok(module)
    }

    /// The module in the type that is asked for, when its values are.
    fn lazily(&self, mut module: Module) -> Module {
        for (_, tensor) in &mut module.parameters {
            *tensor = typed(tensor, Some(self.dtype));
        }
        module
    }
}

/// Most elements of a change that is formed; the largest weight of a published model has 2³¹.
const LARGEST: usize = 1 << 36;

/// How a module lies on the weight that it is made for.
pub(super) fn geometry(module: &Module) -> Result<Geometry> {
    module.geometry().ok_or_else(|| {
        let (method, what) = (module.method.name(), "a layer without its weight");
        module.error(Reason::MethodOnTarget { method, what })
    })
}

/// The rank of all parts together.
fn sum_of_ranks(layer: &Layer) -> usize {
    let ranks = layer
        .parts
        .iter()
        .filter_map(|part| part.module.method.rank(&part.module));
    ranks.sum::<usize>().max(1)
}

/// Whether a module has a rank that may be shortened, and a longer one than is asked for.
fn is_longer(module: &Module, rank: Rank) -> bool {
    let own = module
        .method
        .rank(module)
        .filter(|_| module.method.order() == Order::Additive);
    own.is_some_and(|own| rank.most(usize::MAX) < own || !matches!(rank, Rank::Fixed(_)))
}

/// ‖difference − what the module adds‖²: by factors where both have some, otherwise block by block.
fn left_of(
    difference: &dyn Blocks,
    module: &Module,
    on: Geometry,
    settings: &Settings<'_>,
) -> Result<f64> {
    use ndarray::{Axis, concatenate};
    let own = Delta::of(&[(module, -1.0)], on)?;
    if let Some((left, right)) = difference.factors()? {
        let Some((own_left, own_right)) = own.factors()? else {
            return Ok(0.0);
        };
        let side = |axis, a: &ndarray::Array2<f64>, b: &ndarray::Array2<f64>| {
            concatenate(Axis(axis), &[a.view(), b.view()]).expect("both are of one layer")
        };
        return product_square(
            side(1, &left, &own_left),
            side(0, &right, &own_right),
            settings,
        );
    }
    use rayon::prelude::*;
    let squares = super::sparsify::pieces(difference)
        .into_par_iter()
        .map(|rows| {
            let mut values = vec![0.0; rows.len() * difference.columns()];
            let mut other = values.clone();
            difference.fill(rows.clone(), &mut values)?;
            own.fill(rows, &mut other)?;
            let left = values.iter().zip(&other).map(|(a, b)| (a + b) * (a + b));
            Ok(left.sum::<f64>())
        });
    Ok(squares.collect::<Result<Vec<f64>>>()?.iter().sum())
}
