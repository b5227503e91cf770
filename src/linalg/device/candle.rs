//! Products by `candle`: on CUDA, on Metal, or on the processor, where the same code runs as on a device.
//!
//! What is used of it is little: copies to and from a device, matrix products in f32 and f64, and rounding to f32.
//! Bounds of the errors of these products hold for any order of sums, so nothing is assumed of a device but that it
//! rounds each operation, or each fused multiply-add, to nearest; whoever opens it looks whether it does.
//! candle has no factorisations: another library makes them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor, WithDType};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::{LANES, Lanes, Opening};
use crate::error::{Error, Reason, Result};
use crate::linalg::dense::{Algebra, Dense, Held, Into, Real, Svd};

/// Memory that is used where the device is the processor, unless said otherwise.
const PROCESSOR_MEMORY: u64 = 1 << 30;

/// The share of the free memory of a device that is used unless said otherwise: the driver needs some as well.
const SHARE: f64 = 0.8;

/// The share of a lane's memory that may be held. The rest is for products, whether something is held or not: what a
/// product is cut into, and with it its bits, depends on shapes alone and not on what other threads do.
const HELD_SHARE: f64 = 0.75;

/// Operations for each byte that is carried, below which the processor is done sooner: it computes some 200 GFLOP/s
/// where a bus carries some 10 GB/s in both directions together.
const WORTH: f64 = 20.0;

/// The processor, by candle's own products.
pub(super) fn processor(_number: usize, opening: &Opening<'_>) -> Lanes {
    lanes(opening, || Ok(Device::Cpu), |_| None)
}

/// A device of CUDA; each lane has a stream of its own.
pub(super) fn cuda(number: usize, opening: &Opening<'_>) -> Lanes {
    // TF32 is off unless somebody in this process asked for it.
    candle_core::cuda::set_gemm_reduced_precision_f32(false);
    lanes(
        opening,
        || Device::new_cuda_with_stream(number),
        free_memory,
    )
}

/// A device of Metal.
pub(super) fn metal(number: usize, opening: &Opening<'_>) -> Lanes {
    lanes(opening, || Device::new_metal(number), free_memory)
}

#[cfg(feature = "cuda")]
fn free_memory(device: &Device) -> Option<u64> {
    let device = device.as_cuda_device().ok()?;
    let (free, _) = device.cuda_stream().context().mem_get_info().ok()?;
    Some(free as u64)
}

#[cfg(all(feature = "metal", not(feature = "cuda")))]
fn free_memory(device: &Device) -> Option<u64> {
    let device = device.as_metal_device().ok()?.metal_device();
    let recommended = device.recommended_max_working_set_size();
    let free = recommended.saturating_sub(device.current_allocated_size());
    Some(free as u64)
}

#[cfg(not(any(feature = "cuda", feature = "metal")))]
fn free_memory(_device: &Device) -> Option<u64> {
    None
}

fn lanes(
    opening: &Opening<'_>,
    open: impl Fn() -> candle_core::Result<Device>,
    free: impl Fn(&Device) -> Option<u64>,
) -> Lanes {
    let name = opening.name;
    let missing = |error: candle_core::Error| {
        Error::new(Reason::NoDevice {
            device: name.to_owned(),
            problem: told(&error),
        })
    };
    let devices: Vec<Device> = (0..LANES)
        .map(|_| open().map_err(missing))
        .collect::<Result<_>>()?;
    let free = || Some((free(&devices[0])? as f64 * SHARE) as u64);
    let memory = opening.memory.or_else(free);
    let memory = memory.unwrap_or(PROCESSOR_MEMORY) / LANES as u64;
    let memory = usize::try_from(memory).unwrap_or(usize::MAX);
    let lane = |device| -> Box<dyn Algebra> {
        Box::new(Lane::new(name, device, memory, opening.factorisations))
    };
    Ok(devices.into_iter().map(lane).collect())
}

/// One queue of a device.
struct Lane {
    name: String,
    device: Device,
    /// Bytes that may be used.
    memory: usize,
    /// Bytes that are held.
    held: AtomicUsize,
    /// Bytes that a product may take at once, once there was no room for more.
    piece: AtomicUsize,
    /// Of threads that share the lane one has the memory for products at a time.
    turn: Mutex<()>,
    factorisations: &'static dyn Algebra,
    /// Bytes above which copies fail as if there were no room.
    #[cfg(test)]
    capacity: usize,
}

/// Numbers that candle and the other libraries share.
trait Number: Real + WithDType {
    /// What factorises them.
    fn of(library: &dyn Algebra) -> &dyn Dense<Self>;
}

impl Number for f32 {
    fn of(library: &dyn Algebra) -> &dyn Dense<Self> {
        library
    }
}

impl Number for f64 {
    fn of(library: &dyn Algebra) -> &dyn Dense<Self> {
        library
    }
}

/// A factor of a product.
#[derive(Clone)]
enum Factor<'a, T> {
    Here(ArrayView2<'a, T>),
    OnDevice(Tensor),
}

impl<T: Number> Factor<'_, T> {
    fn rows(&self, from: usize, count: usize) -> candle_core::Result<Factor<'_, T>> {
        Ok(match self {
            Factor::Here(matrix) => Factor::Here(matrix.slice(s![from..from + count, ..])),
            Factor::OnDevice(tensor) => Factor::OnDevice(tensor.narrow(0, from, count)?),
        })
    }

    fn columns(&self, from: usize, count: usize) -> candle_core::Result<Factor<'_, T>> {
        Ok(match self {
            Factor::Here(matrix) => Factor::Here(matrix.slice(s![.., from..from + count])),
            Factor::OnDevice(tensor) => Factor::OnDevice(tensor.narrow(1, from, count)?),
        })
    }

    fn dim(&self) -> (usize, usize) {
        match self {
            Factor::Here(matrix) => matrix.dim(),
            Factor::OnDevice(tensor) => (tensor.dims()[0], tensor.dims()[1]),
        }
    }

    /// What must be carried for it, in elements.
    fn carried(&self) -> usize {
        match self {
            Factor::Here(matrix) => matrix.len(),
            Factor::OnDevice(_) => 0,
        }
    }
}

/// Bytes that a product of so many rows of the left factor and columns of the right one takes there.
fn taken<T: Number>(a: &Factor<'_, T>, b: &Factor<'_, T>, height: usize, width: usize) -> usize {
    let inner = a.dim().1;
    let rows = if a.carried() > 0 { height * inner } else { 0 };
    let columns = if b.carried() > 0 { width * inner } else { 0 };
    // A result that is rounded to f32 lies there twice.
    size_of::<T>().saturating_mul(rows + columns + height * width) + 4 * height * width
}

/// Rows of the left factor and columns of the right one that are multiplied at once; the least there can be where that
/// takes more than the limit.
fn cut<T: Number>(a: &Factor<'_, T>, b: &Factor<'_, T>, limit: usize) -> (usize, usize) {
    let ((mut height, _), (_, mut width)) = (a.dim(), b.dim());
    // A matrix that is held stays whole: devices multiply by rows that lie side by side.
    let is_wide = b.carried() > 0;
    while taken(a, b, height, width) > limit {
        match is_wide && width > height {
            true => width = width.div_ceil(2),
            false if height > 1 => height = height.div_ceil(2),
            false => break,
        }
    }
    (height, width)
}

impl Lane {
    fn new(
        name: &str,
        device: Device,
        memory: usize,
        factorisations: &'static dyn Algebra,
    ) -> Self {
        Lane {
            name: name.to_owned(),
            device,
            memory,
            held: AtomicUsize::new(0),
            piece: AtomicUsize::new(usize::MAX),
            turn: Mutex::new(()),
            factorisations,
            #[cfg(test)]
            capacity: usize::MAX,
        }
    }

    /// Bytes of matrices that may be held.
    fn room_to_hold(&self) -> usize {
        (self.memory as f64 * HELD_SHARE) as usize
    }

    /// Bytes that a product may take at once.
    fn room(&self) -> usize {
        let room = self.memory - self.room_to_hold();
        room.min(self.piece.load(Ordering::Relaxed))
    }

    /// Waits until no other thread has a product there. On the processor none waits: a product runs on rayon's threads,
    /// and one that waits for it may be the one that it needs.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        let lock = || self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.device.is_cpu()).then(lock)
    }

    /// The product of two factors, in pieces that have room.
    fn product<T: Number, R: WithDType>(
        &self,
        a: &Factor<'_, T>,
        b: &Factor<'_, T>,
    ) -> Result<Array2<R>> {
        let ((rows, _), (_, columns)) = (a.dim(), b.dim());
        let mut result = Array2::from_elem((rows, columns), R::from_f64(0.0));
        if result.is_empty() {
            return Ok(result);
        }
        let (mut row, mut column) = (0, 0);
        let (mut height, mut width) = (0, 0);
        while row < rows {
            if column == 0 {
                (height, width) = cut(a, b, self.room());
                height = height.min(rows - row);
            }
            let width = width.min(columns - column);
            let turn = self.turn();
            let piece = a
                .rows(row, height)
                .and_then(|a| self.piece::<T, R>(&a, &b.columns(column, width)?));
            drop(turn);
            match piece {
                Ok(piece) if piece.dim() == result.dim() => return Ok(piece),
                Ok(piece) => {
                    let place = s![row..row + height, column..column + width];
                    result.slice_mut(place).assign(&piece);
                    column += width;
                    if column == columns {
                        (row, column) = (row + height, 0);
                    }
                }
                Err(error) if is_out_of_memory(&error) => {
                    if !self.halved(a, b, (height, width)) {
                        let device = self.name.clone();
                        let bytes = taken(a, b, height, width);
                        return Err(Error::new(Reason::DeviceMemory { device, bytes }));
                    }
                    // The row of pieces begins again with smaller ones.
                    column = 0;
                }
                Err(error) => return Err(self.failed(&error)),
            }
        }
        Ok(result)
    }

    /// Halves what a product may take at once until its pieces are smaller than one that had no room; whether they can
    /// be.
    fn halved<T: Number>(
        &self,
        a: &Factor<'_, T>,
        b: &Factor<'_, T>,
        (height, width): (usize, usize),
    ) -> bool {
        // Another thread may have halved it since.
        let mut limit = self.room();
        loop {
            let smaller = cut(a, b, limit);
            if smaller.0 < height || smaller.1 < width {
                self.piece.fetch_min(limit, Ordering::Relaxed);
                return true;
            }
            if limit == 0 {
                return false;
            }
            limit /= 2;
        }
    }

    /// A product at once.
    fn piece<T: Number, R: WithDType>(
        &self,
        a: &Factor<'_, T>,
        b: &Factor<'_, T>,
    ) -> candle_core::Result<Array2<R>> {
        let ((rows, inner), (_, columns)) = (a.dim(), b.dim());
        if inner == 0 {
            return Ok(Array2::from_elem((rows, columns), R::from_f64(0.0)));
        }
        let (a, b) = (self.carried(a)?, self.carried(b)?);
        let product = a.matmul(&b)?.to_dtype(R::DTYPE)?;
        let values = product.flatten_all()?.to_vec1()?;
        Array2::from_shape_vec((rows, columns), values)
            .map_err(|error| candle_core::Error::Msg(error.to_string()))
    }

    /// A factor on the device, transposed there if it lies so here.
    fn carried<T: Number>(&self, factor: &Factor<'_, T>) -> candle_core::Result<Tensor> {
        let matrix = match factor {
            Factor::OnDevice(tensor) => return Ok(tensor.clone()),
            Factor::Here(matrix) => matrix,
        };
        #[cfg(test)]
        if matrix.len() * size_of::<T>() > self.capacity {
            return Err(candle_core::Error::Msg("out of memory".to_owned()));
        }
        let (rows, columns) = matrix.dim();
        if let Some(values) = matrix.as_slice() {
            return Tensor::from_slice(values, (rows, columns), &self.device);
        }
        if let Some(values) = matrix.t().as_slice() {
            return Tensor::from_slice(values, (columns, rows), &self.device)?.t();
        }
        let values = matrix.iter().copied().collect();
        Tensor::from_vec(values, (rows, columns), &self.device)
    }

    fn failed(&self, error: &candle_core::Error) -> Error {
        Error::new(Reason::DeviceFailed {
            device: self.name.clone(),
            problem: told(error),
        })
    }

    /// Whether it has products of such numbers.
    fn has<T: Number>(&self) -> bool {
        T::DTYPE != DType::F64 || self.has_doubles()
    }

    /// Whether a product of matrices that lie here can be had there, and sooner.
    fn is_worth<T: Number>(&self, a: &Factor<'_, T>, b: &Factor<'_, T>) -> bool {
        let ((rows, inner), (_, columns)) = (a.dim(), b.dim());
        let operations = 2.0 * rows as f64 * inner as f64 * columns as f64;
        let elements = rows * inner + inner * columns + rows * columns;
        let bytes = size_of::<T>() as f64 * elements as f64;
        let has_room = taken(a, b, 1, 1) <= self.memory - self.room_to_hold();
        self.has::<T>() && has_room && (self.device.is_cpu() || operations > WORTH * bytes)
    }
}

impl Algebra for Lane {
    fn name(&self) -> &str {
        &self.name
    }

    fn has_doubles(&self) -> bool {
        !self.device.is_metal()
    }

    fn uses_threads(&self) -> bool {
        self.device.is_cpu()
    }
}

impl<T: Number> Dense<T> for Lane {
    fn multiply(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        mut c: ArrayViewMut2<'_, T>,
        how: Into,
    ) -> Result<()> {
        let (left, right) = (Factor::Here(a), Factor::Here(b));
        if !self.is_worth(&left, &right) {
            return T::of(self.factorisations).multiply(a, b, c, how);
        }
        let product: Array2<T> = self.product(&left, &right)?;
        match how {
            Into::Place => c.assign(&product),
            Into::Sum => c.zip_mut_with(&product, |sum, term| *sum += *term),
        }
        Ok(())
    }

    fn hold<'a>(&'a self, matrix: ArrayView2<'_, T>) -> Result<Option<Box<dyn Held<T> + 'a>>> {
        if matrix.is_empty() || !self.has::<T>() {
            return Ok(None);
        }
        let (rows, columns) = matrix.dim();
        // The least that a product with it takes: a vector, and what it becomes, as in `taken`.
        let least = size_of::<T>() * (rows + columns) + 4 * columns;
        if least > self.memory - self.room_to_hold() {
            return Ok(None);
        }
        let bytes = matrix.len() * size_of::<T>();
        let more = |held: usize| Some(held + bytes).filter(|held| *held <= self.room_to_hold());
        let relaxed = Ordering::Relaxed;
        if self.held.fetch_update(relaxed, relaxed, more).is_err() {
            return Ok(None);
        }
        // Rows side by side, which is how every device takes it.
        let matrix = matrix.as_standard_layout();
        let turn = self.turn();
        let carried = self.carried(&Factor::Here(matrix.view()));
        drop(turn);
        match carried {
            Ok(tensor) => Ok(Some(Box::new(Copy {
                lane: self,
                tensor,
                bytes,
            }))),
            Err(error) => {
                self.held.fetch_sub(bytes, Ordering::Relaxed);
                match is_out_of_memory(&error) {
                    true => Ok(None),
                    false => Err(self.failed(&error)),
                }
            }
        }
    }

    fn thin_qr(&self, a: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>)> {
        T::of(self.factorisations).thin_qr(a)
    }

    fn thin_svd(&self, a: ArrayView2<'_, T>) -> Result<Svd<T>> {
        T::of(self.factorisations).thin_svd(a)
    }

    fn eigh(&self, a: ArrayView2<'_, T>) -> Result<(Vec<T>, Array2<T>)> {
        T::of(self.factorisations).eigh(a)
    }

    fn eigenvalues(&self, a: ArrayView2<'_, T>) -> Result<Vec<T>> {
        T::of(self.factorisations).eigenvalues(a)
    }
}

/// A matrix in the memory of a device.
struct Copy<'a> {
    lane: &'a Lane,
    tensor: Tensor,
    bytes: usize,
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        self.lane.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl<T: Number> Held<T> for Copy<'_> {
    fn before(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        let own = Factor::OnDevice(self.tensor.clone());
        self.lane.product(&own, &Factor::Here(x))
    }

    fn after(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        let own = Factor::OnDevice(self.tensor.clone());
        self.lane.product(&Factor::Here(x), &own)
    }

    fn after_in_single(&self, x: ArrayView2<'_, T>) -> Result<Array2<f32>> {
        let own = Factor::<T>::OnDevice(self.tensor.clone());
        self.lane.product(&Factor::Here(x), &own)
    }
}

/// What candle says, in one line: behind the first are frames of a stack.
fn told(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

/// Whether there was no room: the words of CUDA's driver, of cuBLAS, and of Metal.
fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = error.to_string().to_ascii_lowercase();
    [
        "out of memory",
        "out_of_memory",
        "alloc_failed",
        "failed to create metal resource",
    ]
    .iter()
    .any(|words| text.contains(words))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use rayon::prelude::*;

    use super::*;
    use crate::linalg::dense::FAER;
    use crate::linalg::random::Random;

    /// Shapes of products: rows, what is summed over, columns.
    const SHAPES: [[usize; 3]; 8] = [
        [1, 1, 1],
        [7, 5, 3],
        [1, 40, 9],
        [9, 40, 1],
        [40, 1, 3],
        [33, 17, 65],
        [65, 31, 33],
        [129, 63, 11],
    ];

    /// A lane on the processor with so much memory, where copies of more bytes than `capacity` find no room.
    fn lane(memory: usize, capacity: usize) -> Lane {
        Lane {
            capacity,
            ..Lane::new("lane", Device::Cpu, memory, &FAER)
        }
    }

    fn random<T: Number>(seed: u64, rows: usize, columns: usize) -> Array2<T> {
        let values = Random::new(seed).normals(rows * columns).into_iter();
        Array2::from_shape_vec((rows, columns), values.map(T::rounded).collect()).unwrap()
    }

    /// Whether each element is a sum of products of these, in any order, and rounded to a type at the end.
    fn assert_product<T: Number, R: Number>(
        found: &Array2<R>,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        what: &str,
    ) {
        assert_eq!(found.dim(), (a.nrows(), b.ncols()), "{what}");
        for ((row, column), found) in found.indexed_iter() {
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for (a, b) in a.row(row).iter().zip(b.column(column)) {
                sum += a.widened() * b.widened();
                magnitude += (a.widened() * b.widened()).abs();
            }
            let roundoff = T::ROUNDOFF.max(R::ROUNDOFF);
            let allowed = (a.ncols() + 1) as f64 * roundoff * magnitude;
            let error = (found.widened() - sum).abs();
            assert!(error <= allowed, "{what}, {row} {column}: {error:e}");
        }
    }

    /// The same matrix: row by row, column by column, with gaps, and backwards.
    fn layouts<T: Number>(matrix: &Array2<T>) -> Vec<(&'static str, Array2<T>)> {
        let (rows, columns) = matrix.dim();
        let turned = matrix.t().as_standard_layout().into_owned();
        let mut gaps = Array2::from_elem((2 * rows, 3 * columns), T::rounded(7.0));
        gaps.slice_mut(s![..;2, ..;3]).assign(matrix);
        let mut backwards = matrix.clone();
        backwards
            .slice_mut(s![..;-1, ..])
            .assign(&matrix.to_owned());
        vec![
            ("by rows", matrix.clone()),
            ("by columns", turned),
            ("with gaps", gaps),
            ("backwards", backwards),
        ]
    }

    /// The matrix in memory that [`layouts`] gave.
    fn seen<'a, T: Number>(layout: &str, memory: &'a Array2<T>) -> ArrayView2<'a, T> {
        match layout {
            "by rows" => memory.view(),
            "by columns" => memory.t(),
            "with gaps" => memory.slice(s![..;2, ..;3]),
            _ => memory.slice(s![..;-1, ..]),
        }
    }

    /// Every product of two matrices, and whether some of it was held.
    fn check_products<T: Number>(lane: &Lane, what: &str) -> bool {
        let mut held_some = false;
        for [rows, inner, columns] in SHAPES {
            let (a, b) = (random::<T>(1, rows, inner), random::<T>(2, inner, columns));
            let earlier = random::<T>(3, rows, columns);
            for ((layout, a), (_, b)) in layouts(&a).iter().zip(layouts(&b)) {
                let (a, b) = (seen(layout, a), seen(layout, &b));
                let what = format!("{what}: {rows} × {inner} × {columns}, {layout}");
                let mut product = earlier.clone();
                lane.multiply(a, b, product.view_mut(), Into::Place)
                    .unwrap();
                assert_product(&product, a, b, &what);
                // A term more: the sum with what was there before.
                let more = ndarray::concatenate![ndarray::Axis(1), a, earlier.view()];
                let one = Array2::from_diag_elem(columns, T::rounded(1.0));
                let below = ndarray::concatenate![ndarray::Axis(0), b, one];
                let mut sum = earlier.clone();
                lane.multiply(a, b, sum.view_mut(), Into::Sum).unwrap();
                assert_product(&sum, more.view(), below.view(), &what);
                if let Some(held) = lane.hold(a).unwrap() {
                    held_some = true;
                    assert_product(&held.before(b).unwrap(), a, b, &what);
                }
                if let Some(held) = lane.hold(b).unwrap() {
                    assert_product(&held.after(a).unwrap(), a, b, &what);
                    let single = held.after_in_single(a).unwrap();
                    assert_product(&single, a, b, &what);
                }
                assert_eq!(lane.held.load(Relaxed), 0, "{what}");
            }
        }
        held_some
    }

    #[test]
    fn a_small_memory_cuts_products_into_pieces_and_none_takes_more_than_there_is() {
        let mut cuts = 0;
        for memory in [1 << 10, 1 << 12, 1 << 14, 1 << 30] {
            let lane = lane(memory, usize::MAX);
            let what = format!("{memory} bytes");
            let held = [
                check_products::<f32>(&lane, &what),
                check_products::<f64>(&lane, &what),
            ];
            assert_eq!(held, [true, true], "{what}");
            for [rows, inner, columns] in SHAPES {
                let (a, b) = (
                    random::<f64>(1, rows, inner),
                    random::<f64>(2, inner, columns),
                );
                let (a, b) = (Factor::Here(a.view()), Factor::Here(b.view()));
                let (height, width) = cut(&a, &b, lane.room());
                cuts += usize::from(height < rows) + usize::from(width < columns);
                let fits = taken(&a, &b, height, width) <= lane.room();
                assert_eq!(fits, lane.is_worth(&a, &b), "{what}: {height} × {width}");
            }
        }
        assert!(cuts > 10, "{cuts}");
    }

    #[test]
    fn a_piece_that_finds_no_room_is_halved_and_the_product_goes_on() {
        let large = lane(1 << 30, usize::MAX);
        let (a, b) = (random::<f64>(1, 65, 31), random::<f64>(2, 31, 33));
        let all = large
            .product::<f64, f64>(&Factor::Here(a.view()), &Factor::Here(b.view()))
            .unwrap();
        // One row of the left factor has 248 bytes.
        for capacity in [250, 1000, 4000, 16_000] {
            let small = lane(1 << 30, capacity);
            let found = small
                .product::<f64, f64>(&Factor::Here(a.view()), &Factor::Here(b.view()))
                .unwrap();
            let what = format!("{capacity} bytes");
            assert_product(&found, a.view(), b.view(), &what);
            let apart = (&found - &all).iter().fold(0.0f64, |a, b| a.max(b.abs()));
            assert!(apart < 1e-13, "{what}: {apart:e}");
            let piece = small.piece.load(Relaxed);
            assert!(piece < 1 << 28, "{what}: {piece}");
            // What is known of the room is not forgotten.
            let again = small
                .product::<f64, f64>(&Factor::Here(a.view()), &Factor::Here(b.view()))
                .unwrap();
            assert_eq!((again, small.piece.load(Relaxed)), (found, piece), "{what}");
        }
        assert_eq!(large.piece.load(Relaxed), usize::MAX);
    }

    #[test]
    fn products_with_what_is_held_are_halved_as_well() {
        let small = lane(1 << 30, 512);
        let held = random::<f64>(1, 8, 8);
        let copy = small.hold(held.view()).unwrap().expect("it has room");
        let (wide, tall) = (random::<f64>(2, 8, 1001), random::<f64>(3, 1001, 8));
        let before = copy.before(wide.view()).unwrap();
        assert_product(&before, held.view(), wide.view(), "before");
        let after = copy.after(tall.view()).unwrap();
        assert_product(&after, tall.view(), held.view(), "after");
        let single = copy.after_in_single(tall.view()).unwrap();
        assert_product(&single, tall.view(), held.view(), "in single");
    }

    #[test]
    fn an_element_that_finds_no_room_is_an_error() {
        let (a, b) = (random::<f64>(1, 9, 31), random::<f64>(2, 31, 5));
        let small = lane(1 << 30, 247);
        let mut c = Array2::zeros((9, 5));
        let error = small.multiply(a.view(), b.view(), c.view_mut(), Into::Place);
        let reason = error.unwrap_err();
        let expected = Reason::DeviceMemory {
            device: "lane".to_owned(),
            bytes: (31 + 31 + 1) * 8 + 4,
        };
        assert_eq!(
            format!("{:?}", reason.reason()),
            format!("{expected:?}"),
            "{reason}"
        );
        assert!(c.iter().all(|value| *value == 0.0));
        // A row of a product with a matrix that is held cannot be cut.
        let small = lane(1 << 30, 8 * 8 * 8);
        let held = small.hold(random::<f64>(3, 64, 1).view()).unwrap();
        let held = held.expect("it has room");
        let row = random::<f64>(4, 1, 64);
        held.after(row.view()).unwrap();
        assert!(
            small
                .hold(random::<f64>(3, 65, 1).view())
                .unwrap()
                .is_none()
        );
        assert_eq!(small.held.load(Relaxed), 8 * 64);
    }

    #[test]
    fn what_is_held_never_takes_more_than_its_share() {
        // 7,500 bytes to hold, 2,500 for products.
        let lane = lane(10_000, usize::MAX);
        let matrix = random::<f64>(1, 20, 20);
        let (first, second) = (lane.hold(matrix.view()), lane.hold(matrix.view()));
        let (first, second) = (first.unwrap(), second.unwrap());
        assert!(first.is_some() && second.is_some());
        assert!(lane.hold(matrix.view()).unwrap().is_none());
        drop(first);
        assert!(lane.hold(matrix.view()).unwrap().is_some());
        drop(second);
        assert_eq!(lane.held.load(Relaxed), 0);
        // It would have room, but a row of a product with it would not.
        assert!(
            lane.hold(random::<f64>(1, 1, 900).view())
                .unwrap()
                .is_none()
        );
        assert!(
            lane.hold(Array2::<f64>::zeros((0, 5)).view())
                .unwrap()
                .is_none()
        );
        let copies = || lane.hold(matrix.view()).unwrap();
        let most = (0..200).into_par_iter().map(|_| {
            let copy = copies();
            let held = lane.held.load(Relaxed);
            (held, copy.is_some())
        });
        let most: Vec<(usize, bool)> = most.collect();
        assert!(most.iter().all(|(held, _)| *held <= 7_500));
        assert!(most.iter().any(|(_, some)| *some));
        assert_eq!(lane.held.load(Relaxed), 0);
    }

    #[test]
    fn threads_that_share_a_lane_without_room_all_come_to_an_end() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build();
        let small = lane(1 << 30, 700);
        pool.unwrap().install(|| {
            (0..64u64).into_par_iter().for_each(|seed| {
                let (rows, columns) = (seed as usize % 13 + 20, seed as usize % 7 + 30);
                let (a, b) = (random::<f32>(seed, rows, 40), random(seed, 40, columns));
                let mut c = Array2::zeros((rows, columns));
                small
                    .multiply(a.view(), b.view(), c.view_mut(), Into::Place)
                    .unwrap();
                assert_product(&c, a.view(), b.view(), &format!("{seed}"));
            });
        });
        assert!(small.piece.load(Relaxed) < 1 << 28);
    }
}
