//! Spectra and residuals of layers, drawn.

use std::path::Path;

use loratool::checkpoint::sink::{Destination, Faults, Shape};
use loratool::{Error, Reason, printable};
use plotters::prelude::*;

/// Width and height in pixels.
const SIZE: (u32, u32) = (1000, 900);

/// Fewer layers than this have their names below them.
const NAMED: usize = 24;

/// A layer, as far as it is drawn.
pub(super) struct Layer<'a> {
    pub(super) path: &'a str,
    pub(super) rank: usize,
    pub(super) residual: f64,
    /// Singular values, falling.
    pub(super) values: &'a [f64],
}

/// Where a drawing goes, if it goes anywhere: no input, and not the output.
pub(super) fn destination<'a>(
    path: Option<&Path>,
    output: &Path,
    force: bool,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<Option<Destination>, Error> {
    let Some(path) = path else {
        return Ok(None);
    };
    if path == output {
        return Err(Error::new(Reason::BadOption {
            text: "--plot".to_owned(),
            problem: "it is the output of the adapter".to_owned(),
        }));
    }
    Destination::check(path, Shape::File, force, inputs, Faults::default()).map(Some)
}

/// Draws the singular values of every layer, each divided by the layer's largest, and below them what is left of each
/// layer's change.
pub(super) fn spectra(title: &str, layers: &[Layer<'_>]) -> Result<String, Error> {
    let mut text = String::new();
    drawn(title, layers, &mut text).map_err(|problem| {
        Error::new(Reason::Drawing {
            problem: problem.to_string(),
        })
    })?;
    Ok(text)
}

fn drawn(
    title: &str,
    layers: &[Layer<'_>],
    text: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (above, below) = area.split_vertically(SIZE.1 * 11 / 20);
    values(layers, &printable(title), &above)?;
    residuals(layers, &below)?;
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn values(
    layers: &[Layer<'_>],
    title: &str,
    area: &Area<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    let longest = layers
        .iter()
        .map(|layer| layer.values.len())
        .max()
        .unwrap_or(1);
    let least = layers
        .iter()
        .flat_map(shares)
        .fold(1.0f64, f64::min)
        .max(1e-9);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(
            1f64..longest.max(2) as f64,
            (least / 1.5..1.5f64).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("singular value")
        .y_desc("share of the largest")
        .y_label_formatter(&|share| format!("{share:.0e}"))
        .draw()?;
    for (index, layer) in layers.iter().enumerate() {
        let points = shares(layer)
            .enumerate()
            .map(|(number, share)| (number as f64 + 1.0, share.max(least)));
        let color = Palette99::pick(index).mix(0.6);
        chart.draw_series(LineSeries::new(points, color))?;
        // Where it is cut off.
        if let Some(share) = layer
            .rank
            .checked_sub(1)
            .and_then(|last| shares(layer).nth(last))
        {
            let end = (layer.rank as f64, share.max(least));
            chart.draw_series([Circle::new(end, 3, color.filled())])?;
        }
    }
    Ok(())
}

/// Singular values, each divided by the largest.
fn shares(layer: &Layer<'_>) -> impl Iterator<Item = f64> {
    let values = layer.values;
    let largest = values.first().copied().unwrap_or(0.0);
    values
        .iter()
        .filter(move |_| largest > 0.0)
        .map(move |value| value / largest)
}

fn residuals(layers: &[Layer<'_>], area: &Area<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let named = layers.len() < NAMED;
    let count = layers.len().max(1);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(if named { 150 } else { 36 })
        .y_label_area_size(64)
        .build_cartesian_2d((0..count - 1).into_segmented(), 0f64..1f64)?;
    let label = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(index) | SegmentValue::Exact(index) if named => {
            let path = layers.get(*index).map_or("", |layer| layer.path);
            printable(path).into_owned()
        }
        SegmentValue::CenterOf(index) | SegmentValue::Exact(index) => index.to_string(),
        SegmentValue::Last => String::new(),
    };
    let style = ("sans-serif", 11).into_font().transform(match named {
        true => FontTransform::Rotate90,
        false => FontTransform::None,
    });
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(if named { count } else { 10 })
        .x_label_formatter(&label)
        .x_label_style(style)
        .x_desc(if named { "" } else { "layer" })
        .y_desc("residual")
        .draw()?;
    chart.draw_series(layers.iter().enumerate().map(|(index, layer)| {
        let (left, right) = (SegmentValue::Exact(index), SegmentValue::Exact(index + 1));
        let color = Palette99::pick(index).mix(0.8);
        let mut bar = Rectangle::new(
            [(left, 0.0), (right, layer.residual.min(1.0))],
            color.filled(),
        );
        bar.set_margin(0, 0, 2, 2);
        bar
    }))?;
    Ok(())
}
