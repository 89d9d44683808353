//! Gradients scaled, accumulated and measured in one pass.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, LaunchConfig, PushKernelArg,
};

use super::error::{CudaError, Doing};
use super::module::function;
use super::{CudaElement, Kernels, Pinned};
use crate::error::same_length;
use crate::gradient::{Accumulate, BLOCK_ELEMENTS, GradientStatistics};

/// [`GradientStatistics`] on the device, and the memory of the measures of a run's blocks.
#[derive(Debug)]
pub struct DeviceStatistics {
    squared_norm: CudaSlice<f64>,
    non_finite: CudaSlice<u64>,
    block_squares: CudaSlice<f64>,
    block_non_finite: CudaSlice<u32>,
    /// Where the totals are read.
    fetched: (Pinned<f64>, Pinned<u64>),
}

impl DeviceStatistics {
    /// Device memory for runs of up to `longest_run_elems`.
    pub fn bytes(longest_run_elems: usize) -> usize {
        let (total, block) = (size_of::<f64>() + size_of::<u64>(), size_of::<f64>() + size_of::<u32>());
        total + longest_run_elems.div_ceil(BLOCK_ELEMENTS).max(1) * block
    }

    /// Statistics of nothing yet, for runs of up to `longest_run_elems`.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if the device has no memory left.
    pub fn new(stream: &Arc<CudaStream>, longest_run_elems: usize) -> Result<Self, CudaError> {
        let doing = "allocating gradient statistics";
        let blocks = longest_run_elems.div_ceil(BLOCK_ELEMENTS).max(1);
        Ok(Self {
            squared_norm: stream.alloc_zeros(1).doing(doing)?,
            non_finite: stream.alloc_zeros(1).doing(doing)?,
            block_squares: stream.alloc_zeros(blocks).doing(doing)?,
            block_non_finite: stream.alloc_zeros(blocks).doing(doing)?,
            fetched: (Pinned::new(stream.context(), 1)?, Pinned::new(stream.context(), 1)?),
        })
    }

    /// Forgets what was measured.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if the driver fails.
    pub fn reset(&mut self, stream: &Arc<CudaStream>) -> Result<(), CudaError> {
        let doing = "resetting gradient statistics";
        stream.memset_zeros(&mut self.squared_norm).doing(doing)?;
        stream.memset_zeros(&mut self.non_finite).doing(doing)
    }

    /// What was measured by the work that is enqueued on `stream`, which this waits for.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if the driver fails, also in work that was enqueued earlier.
    pub fn read(&mut self, stream: &Arc<CudaStream>) -> Result<GradientStatistics, CudaError> {
        let (squared_norm, non_finite) = &mut self.fetched;
        Ok(GradientStatistics {
            squared_norm: squared_norm.fetch(stream, &self.squared_norm.as_view())?[0],
            non_finite: non_finite.fetch(stream, &self.non_finite.as_view())?[0],
        })
    }
}

impl Kernels {
    /// Puts `gradient · scale` into `accumulator`, or adds it, and adds what the accumulator then holds to
    /// `statistics`, as [`crate::gradient::accumulate`].
    ///
    /// # Errors
    /// [`CudaError::Run`] if the lengths differ, or the run is longer than `statistics` was made for;
    /// [`CudaError::Driver`] if a launch fails.
    pub fn accumulate<G: CudaElement>(
        &self,
        stream: &Arc<CudaStream>,
        accumulator: &mut CudaViewMut<'_, f32>,
        gradient: &CudaView<'_, G>,
        scale: f32,
        how: Accumulate,
        statistics: &mut DeviceStatistics,
    ) -> Result<(), CudaError> {
        let elements = accumulator.len();
        same_length("the gradient", gradient.len(), elements)?;
        let blocks = elements.div_ceil(BLOCK_ELEMENTS);
        if blocks > statistics.block_squares.len() {
            let expected = statistics.block_squares.len() * BLOCK_ELEMENTS;
            let name = "a run longer than its statistics were made for";
            return Err(crate::Error::Length { name, found: elements, expected }.into());
        }
        if elements == 0 {
            return Ok(());
        }
        let DeviceStatistics { squared_norm, non_finite, block_squares, block_non_finite, .. } = statistics;
        let kernel = function(&self.gradient, &format!("accumulate_{}", G::SUFFIX))?;
        let (count, add, block_count) = (elements as u64, i32::from(how == Accumulate::Add), blocks as u64);
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(accumulator).arg(gradient).arg(&count).arg(&scale).arg(&add);
        launch.arg(&mut *block_squares).arg(&mut *block_non_finite);
        // SAFETY: the arguments are those of the kernel, both runs have `elements` elements, the measures one
        // for each of their blocks, and a thread block has the 256 threads that the kernel is written for.
        unsafe { launch.launch(self.launch_for(blocks, 256)) }
            .doing("launching the accumulation of a gradient")?;

        let kernel = function(&self.gradient, "add_blocks")?;
        let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let mut launch = stream.launch_builder(&kernel);
        launch
            .arg(&*block_squares)
            .arg(&*block_non_finite)
            .arg(&block_count)
            .arg(squared_norm)
            .arg(non_finite);
        // SAFETY: the arguments are those of the kernel, the measures are those of `block_count` blocks, and
        // the one thread block has the 256 threads that the kernel is written for.
        unsafe { launch.launch(one) }.doing("launching the sum of a gradient's blocks")?;
        Ok(())
    }
}
