//! Optimizer states in 8 bits.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, CudaView, CudaViewMut, PushKernelArg};

use crate::cuda::Kernels;
use crate::cuda::error::{CudaError, Doing};
use crate::cuda::module::function;
use crate::quantize::{BLOCK_ELEMENTS, Code, check_lengths};

/// What the names of a code's kernels end with.
fn suffix(code: Code) -> &'static str {
    match code {
        Code::Signed => "signed",
        Code::Unsigned => "unsigned",
    }
}

impl Kernels {
    /// Rounds every element of `from` to 8 bits, as [`crate::quantize::quantize`].
    ///
    /// # Errors
    /// [`CudaError::Run`] if the lengths do not fit; [`CudaError::Driver`] if the launch fails.
    pub fn quantize(
        &self,
        stream: &Arc<CudaStream>,
        code: Code,
        from: &CudaView<'_, f32>,
        codes: &mut CudaViewMut<'_, u8>,
        scales: &mut CudaViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let elements = from.len();
        check_lengths(elements, codes.len(), scales.len())?;
        if elements == 0 {
            return Ok(());
        }
        let kernel = function(&self.quantize, &format!("quantize_{}", suffix(code)))?;
        let count = elements as u64;
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(from).arg(codes).arg(scales).arg(&count);
        let config = self.launch_for(elements.div_ceil(BLOCK_ELEMENTS), 32);
        // SAFETY: the arguments are those of the kernel; there are `elements` codes, and a scale for each of their blocks.
        unsafe { launch.launch(config) }.doing("launching a quantization")?;
        Ok(())
    }

    /// The values of codes, in f32, as [`crate::quantize::dequantize`].
    ///
    /// # Errors
    /// [`CudaError::Run`] if the lengths do not fit; [`CudaError::Driver`] if the launch fails.
    pub fn dequantize(
        &self,
        stream: &Arc<CudaStream>,
        code: Code,
        codes: &CudaView<'_, u8>,
        scales: &CudaView<'_, f32>,
        to: &mut CudaViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let elements = to.len();
        check_lengths(elements, codes.len(), scales.len())?;
        if elements == 0 {
            return Ok(());
        }
        let kernel = function(&self.quantize, &format!("dequantize_{}", suffix(code)))?;
        let count = elements as u64;
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(codes).arg(scales).arg(to).arg(&count);
        // SAFETY: the arguments are those of the kernel; there are `elements` codes, and a scale for each of their blocks.
        unsafe { launch.launch(self.launch_for(elements.div_ceil(4), 1)) }
            .doing("launching a dequantization")?;
        Ok(())
    }
}
