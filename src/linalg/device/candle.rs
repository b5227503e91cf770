//! Products by `candle`: on CUDA, on Metal, or on the processor, where the same code runs as on a device.
//!
//! What is used of it is little: copies to and from a device, matrix products in f32 and f64, and rounding to f32.
//! Bounds of the errors of these products hold for any order of sums, so nothing is assumed of a device but that it
//! rounds each operation, or each fused multiply-add, to nearest; whoever opens it looks whether it does.
//! candle has no factorisations: another library makes them.

use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor, WithDType};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::{LANES, Opening};
use crate::error::{Error, Reason, Result};
use crate::linalg::dense::{Algebra, Dense, Held, Into, Real, Svd};

/// Memory that is used where the device is the processor, unless said otherwise.
const PROCESSOR_MEMORY: u64 = 1 << 30;

/// The share of the free memory of a device that is used unless said otherwise: the driver needs some as well.
const SHARE: f64 = 0.8;

/// The share of a lane's memory that may be held, so that there is room for products.
const HELD_SHARE: f64 = 0.75;

/// Operations for each byte that is carried, below which the processor is done sooner: it computes some 200 GFLOP/s
/// where a bus carries some 10 GB/s in both directions together.
const WORTH: f64 = 20.0;

type Lanes = Result<Vec<Box<dyn Algebra>>>;

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
        Box::new(Lane {
            name: name.to_owned(),
            device,
            memory,
            held: AtomicUsize::new(0),
            piece: AtomicUsize::new(usize::MAX),
            factorisations: opening.factorisations,
            #[cfg(test)]
            capacity: usize::MAX,
        })
    };
    Ok(devices.into_iter().map(lane).collect())
}

/// One queue of a device.
struct Lane {
    name: String,
    device: Device,
    /// Bytes that may be used.
    memory: usize,
    /// Bytes that are.
    held: AtomicUsize,
    /// Bytes that a product may take at once, once there was no room for more.
    piece: AtomicUsize,
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

/// Rows of the left factor and columns of the right one that are multiplied at once.
fn cut<T: Number>(a: &Factor<'_, T>, b: &Factor<'_, T>, limit: usize) -> (usize, usize) {
    let ((mut height, inner), (_, mut width)) = (a.dim(), b.dim());
    let (left, right) = (a.carried() > 0, b.carried() > 0);
    let size = size_of::<T>();
    let bytes = |height: usize, width: usize| {
        let rows = if left { height * inner } else { 0 };
        let columns = if right { width * inner } else { 0 };
        // A result that is rounded to f32 lies there twice.
        size.saturating_mul(rows + columns + height * width) + 4 * height * width
    };
    while bytes(height, width) > limit && (height > 1 || right && width > 1) {
        // A matrix that is held stays whole: devices multiply by rows that lie side by side.
        match right && width > height {
            true => width = width.div_ceil(2),
            false if height > 1 => height = height.div_ceil(2),
            false => width = width.div_ceil(2),
        }
    }
    (height, width)
}

impl Lane {
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
                let free = self
                    .memory
                    .saturating_sub(self.held.load(Ordering::Relaxed));
                (height, width) = cut(a, b, free.min(self.piece.load(Ordering::Relaxed)));
                height = height.min(rows - row);
            }
            let width = width.min(columns - column);
            let piece = a
                .rows(row, height)
                .and_then(|a| self.piece::<T, R>(&a, &b.columns(column, width)?));
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
                    let bytes = size_of::<T>() * height * width;
                    if height == 1 && width == 1 || self.halved(a, b, height, width) {
                        let device = self.name.clone();
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

    /// Halves what a product may take at once; whether that changes nothing.
    fn halved<T: Number>(
        &self,
        a: &Factor<'_, T>,
        b: &Factor<'_, T>,
        height: usize,
        width: usize,
    ) -> bool {
        let mut limit = self.memory.min(self.piece.load(Ordering::Relaxed));
        loop {
            limit /= 2;
            let smaller = cut(a, b, limit);
            if smaller.0 < height || smaller.1 < width {
                self.piece.store(limit, Ordering::Relaxed);
                return false;
            }
            if limit == 0 {
                return true;
            }
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

    /// Whether a product of matrices that lie here is done sooner there.
    fn is_worth<T: Number>(&self, a: (usize, usize), b: (usize, usize)) -> bool {
        let operations = 2.0 * a.0 as f64 * a.1 as f64 * b.1 as f64;
        let elements = a.0 * a.1 + b.0 * b.1 + a.0 * b.1;
        let bytes = size_of::<T>() as f64 * elements as f64;
        self.has::<T>() && (self.device.is_cpu() || operations > WORTH * bytes)
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
        if !self.is_worth::<T>(a.dim(), b.dim()) {
            return T::of(self.factorisations).multiply(a, b, c, how);
        }
        let product: Array2<T> = self.product(&Factor::Here(a), &Factor::Here(b))?;
        match how {
            Into::Place => c.assign(&product),
            Into::Sum => c.zip_mut_with(&product, |sum, term| *sum = *sum + *term),
        }
        Ok(())
    }

    fn hold<'a>(&'a self, matrix: ArrayView2<'_, T>) -> Result<Option<Box<dyn Held<T> + 'a>>> {
        let bytes = matrix.len() * size_of::<T>();
        let room = (self.memory as f64 * HELD_SHARE) as usize;
        if matrix.is_empty() || !self.has::<T>() {
            return Ok(None);
        }
        if self.held.fetch_add(bytes, Ordering::Relaxed) + bytes > room {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
            return Ok(None);
        }
        // Rows side by side, which is how every device takes it.
        let matrix = matrix.as_standard_layout();
        match self.carried(&Factor::Here(matrix.view())) {
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
