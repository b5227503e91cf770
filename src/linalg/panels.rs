//! A factor laid out for the kernel: panels of [`LANES`] columns, each panel row after row.

use ndarray::ArrayView2;

/// Columns of one panel: two AVX-512 registers of f64, four of AVX2.
pub const LANES: usize = 16;

/// An r × n matrix as ⌈n / 16⌉ panels of r × 16, the last one filled up with zeros.
#[derive(Clone, Debug, Default)]
pub struct Panels {
    rank: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Panels {
    /// An empty set of panels, to be filled by [`Panels::pack`].
    pub fn new(rank: usize, columns: usize) -> Self {
        let values = vec![0.0; columns.div_ceil(LANES) * rank * LANES];
        Panels {
            rank,
            columns,
            values,
        }
    }

    /// Copies `block` (r × any) to the columns from `first` on.
    pub fn pack(&mut self, first: usize, block: ArrayView2<'_, f64>) {
        for (k, row) in block.outer_iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                let column = first + j;
                let panel = column / LANES * self.rank * LANES;
                self.values[panel + k * LANES + column % LANES] = *value;
            }
        }
    }

    /// One element.
    pub fn get(&self, row: usize, column: usize) -> f64 {
        let panel = column / LANES * self.rank * LANES;
        self.values[panel + row * LANES + column % LANES]
    }

    /// Rows, the length of a chain.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Columns without the filling.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The panels, one after the other.
    pub(super) fn values(&self) -> &[f64] {
        &self.values
    }
}
