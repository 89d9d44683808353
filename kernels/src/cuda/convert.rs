//! Conversions between f32 and the 16-bit types.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, CudaView, CudaViewMut, PushKernelArg};
use half::{bf16, f16};

use super::error::{CudaError, Doing};
use super::module::function;
use super::{CudaElement, Kernels};
use crate::error::same_length;

/// One of the 16-bit types.
pub trait HalfElement: CudaElement {}
impl HalfElement for bf16 {}
impl HalfElement for f16 {}

impl Kernels {
    /// Rounds every element of `from` into `to`, as [`crate::convert::narrow`].
    ///
    /// # Errors
    /// [`CudaError::Run`] if the lengths differ; [`CudaError::Driver`] if the launch fails.
    pub fn narrow<E: HalfElement>(
        &self,
        stream: &Arc<CudaStream>,
        from: &CudaView<'_, f32>,
        to: &mut CudaViewMut<'_, E>,
    ) -> Result<(), CudaError> {
        self.convert(stream, &format!("narrow_{}", E::SUFFIX), from, to)
    }

    /// Widens every element of `from` into `to`, exactly, as [`crate::convert::widen`].
    ///
    /// # Errors
    /// [`CudaError::Run`] if the lengths differ; [`CudaError::Driver`] if the launch fails.
    pub fn widen<E: HalfElement>(
        &self,
        stream: &Arc<CudaStream>,
        from: &CudaView<'_, E>,
        to: &mut CudaViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        self.convert(stream, &format!("widen_{}", E::SUFFIX), from, to)
    }

    fn convert<From: CudaElement, To: CudaElement>(
        &self,
        stream: &Arc<CudaStream>,
        kernel: &str,
        from: &CudaView<'_, From>,
        to: &mut CudaViewMut<'_, To>,
    ) -> Result<(), CudaError> {
        let elements = from.len();
        same_length("the target", to.len(), elements)?;
        if elements == 0 {
            return Ok(());
        }
        let kernel = function(&self.convert, kernel)?;
        let count = elements as u64;
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(from).arg(to).arg(&count);
        // SAFETY: the arguments are those of the kernel that converts between these types, and both runs have
        // `elements` elements.
        unsafe { launch.launch(self.launch_for(elements.div_ceil(4), 1)) }.doing("launching a conversion")?;
        Ok(())
    }
}
