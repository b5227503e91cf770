//! A matrix that lies in a file and is widened piece by piece, and the product of two of them.

use std::ops::Range;

use ndarray::{Array2, ShapeBuilder};

use super::candidates::{Candidates, Precision};
use crate::error::Result;
use crate::linalg::{Kernel, LANES, Panels};
use crate::tensor::{Float, Tensor, widen};

/// A stored tensor seen as a matrix, perhaps transposed.
#[derive(Clone, Debug)]
pub struct Factor {
    tensor: Tensor,
    float: Float,
    stored: (usize, usize),
    transposed: bool,
}

impl Factor {
    /// Sees a tensor as `rows` × (everything else).
    ///
    /// # Errors
    /// [`crate::Reason::AdapterType`].
    pub fn new(tensor: &Tensor, rows: usize) -> Result<Self> {
        let columns = match tensor.shape.split_first() {
            // Even where there are no rows.
            Some((outer, inner)) if *outer == rows => inner.iter().product(),
            _ => tensor.elements().checked_div(rows).unwrap_or(0),
        };
        let float = tensor.float()?;
        Ok(Factor {
            tensor: tensor.settled()?.into_owned(),
            float,
            stored: (rows, columns),
            transposed: false,
        })
    }

    /// The transpose; nothing is moved.
    pub fn t(mut self) -> Self {
        self.transposed = !self.transposed;
        self
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        if self.transposed {
            self.stored.1
        } else {
            self.stored.0
        }
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        if self.transposed {
            self.stored.0
        } else {
            self.stored.1
        }
    }

    /// Whether products with another such factor are exact in f64.
    pub fn is_narrow(&self) -> bool {
        self.float != Float::F64
    }

    /// A rectangle of the matrix, widened.
    ///
    /// # Errors
    /// Those of [`Tensor::bytes_of`].
    pub fn block(&self, rows: Range<usize>, columns: Range<usize>) -> Result<Array2<f64>> {
        let (outer, inner) = if self.transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        let (height, width) = (outer.len(), inner.len());
        let mut values = vec![0.0; height * width];
        let size = self.float.size();
        for (line, values) in outer.zip(values.chunks_exact_mut(width.max(1))) {
            let start = (line * self.stored.1 + inner.start) * size;
            let bytes = self.tensor.bytes_of(start, width * size)?;
            widen(self.float, &bytes, values);
        }
        let shape = match self.transposed {
            false => (height, width).into_shape_with_order(),
            true => (width, height).f(),
        };
        Ok(Array2::from_shape_vec(shape, values).expect("the shape has as many elements"))
    }
}

/// `c · left · right`, evaluated by blocks of rows as `docs/numerics.md` defines.
#[derive(Debug)]
pub struct Product {
    left: Factor,
    right: Factor,
    packed: Option<Panels>,
    c: f64,
    exact_products: bool,
}

/// A factor larger than this is widened band by band instead of kept widened, in bytes.
const PACKED_LIMIT: usize = 64 << 20;

/// Columns of a band of a factor that is not kept widened.
const BAND: usize = 64 * LANES;

impl Product {
    /// Prepares a product of rows × r and r × columns.
    ///
    /// # Errors
    /// Those of [`Factor::block`].
    pub fn new(left: Factor, right: Factor, c: f64) -> Result<Self> {
        debug_assert_eq!(left.columns(), right.rows());
        let exact_products = left.is_narrow() && right.is_narrow();
        Self::packed(Product {
            left,
            right,
            packed: None,
            c,
            exact_products,
        })
    }

    fn packed(mut product: Product) -> Result<Self> {
        let (rank, columns) = (product.right.rows(), product.right.columns());
        if rank.saturating_mul(columns).saturating_mul(8) <= PACKED_LIMIT {
            product.packed = Some(product.pack(0..columns)?);
        }
        Ok(product)
    }

    /// The multiplier.
    pub fn c(&self) -> f64 {
        self.c
    }

    fn pack(&self, columns: Range<usize>) -> Result<Panels> {
        let rank = self.right.rows();
        let mut panels = Panels::new(rank, columns.len());
        for first in columns.clone().step_by(BAND) {
            let band = first..(first + BAND).min(columns.end);
            let block = self.right.block(0..rank, band)?;
            panels.pack(first - columns.start, block.view());
        }
        Ok(panels)
    }

    /// `value[i,j] = fma(c, acc, value[i,j])` for the rows of the block.
    ///
    /// # Errors
    /// Those of [`Factor::block`].
    pub fn add(&self, rows: Range<usize>, value: &mut [f64], kernel: &Kernel) -> Result<()> {
        self.add_times(self.c, rows, value, kernel)
    }

    /// The chains themselves, for the rows of the block.
    ///
    /// # Errors
    /// Those of [`Factor::block`].
    pub fn chains(&self, rows: Range<usize>, chains: &mut [f64], kernel: &Kernel) -> Result<()> {
        // x + (−0) is x for every x, +0 included.
        chains.fill(-0.0);
        self.add_times(1.0, rows, chains, kernel)
    }

    fn add_times(
        &self,
        c: f64,
        rows: Range<usize>,
        value: &mut [f64],
        kernel: &Kernel,
    ) -> Result<()> {
        let (columns, exact) = (self.right.columns(), self.exact_products);
        let left = self.left.block(rows, 0..self.left.columns())?;
        let left = left.as_standard_layout();
        let left = left.as_slice().expect("standard layout");
        if let Some(panels) = &self.packed {
            kernel.add_low_rank(left, panels, c, exact, value, 0, columns);
            return Ok(());
        }
        for first in (0..columns).step_by(BAND) {
            let panels = self.pack(first..(first + BAND).min(columns))?;
            kernel.add_low_rank(left, &panels, c, exact, value, first, columns);
        }
        Ok(())
    }

    /// The chain of one element.
    ///
    /// # Errors
    /// Those of [`Factor::block`].
    pub fn chain(&self, row: usize, column: usize) -> Result<f64> {
        let rank = self.right.rows();
        let left = self.left.block(row..row + 1, 0..rank)?;
        let link = |acc: f64, (b, a): (&f64, f64)| b.mul_add(a, acc);
        if let Some(panels) = &self.packed {
            let right = (0..rank).map(|k| panels.get(k, column));
            return Ok(left.iter().zip(right).fold(0.0, link));
        }
        let right = self.right.block(0..rank, column..column + 1)?;
        Ok(left.iter().zip(right).fold(0.0, link))
    }

    /// What gives candidates for the chains; see [`super::method::Update::candidates`].
    ///
    /// # Errors
    /// Those of [`Factor::block`].
    pub fn candidates(&self, to: Float, has_doubles: bool) -> Result<Option<Candidates<'_>>> {
        let precision = match (has_doubles, to) {
            // No bound of a candidate settles the last digit of f64.
            (_, Float::F64) => return Ok(None),
            (true, Float::F32) => Precision::Doubles,
            (true, Float::BF16 | Float::F16) => Precision::DoublesToSingles,
            // Nearly every element would be left for the definition.
            (false, Float::F32) => return Ok(None),
            (false, Float::BF16 | Float::F16) if !self.exact_products => return Ok(None),
            (false, Float::BF16 | Float::F16) => Precision::Singles,
        };
        Candidates::of_product(&self.left, &self.right, precision).map(Some)
    }
}
