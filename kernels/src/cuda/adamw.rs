//! AdamW on flat runs, for groups whose states live on the device.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, CudaView, CudaViewMut, DeviceRepr, PushKernelArg,
};
use half::{bf16, f16};

use super::error::{CudaError, Doing};
use super::module::function;
use super::{CudaElement, Kernels};
use crate::adamw::{AdamWStep, Numbers};
use crate::error::same_length;

// SAFETY: `Numbers` is `repr(C)`, has only `f32` fields, and is declared with the same fields in
// `cuda/adamw.cu`.
unsafe impl DeviceRepr for Numbers {}

/// The state of a run of parameters on the device. All runs have the same length.
#[derive(Debug)]
pub struct RunState<'a> {
    /// Master parameters.
    pub master: CudaViewMut<'a, f32>,
    /// First moments.
    pub first_moment: CudaViewMut<'a, f32>,
    /// Second moments.
    pub second_moment: CudaViewMut<'a, f32>,
}

/// A copy of the updated parameters in the type that the device computes with, rounded to nearest even.
#[derive(Debug)]
pub enum RunCopy<'a> {
    /// In bf16.
    Bf16(CudaViewMut<'a, bf16>),
    /// In f16.
    F16(CudaViewMut<'a, f16>),
}

impl Kernels {
    /// Updates a run of parameters in place, and its low-precision copy if there is one, as
    /// [`crate::adamw::adamw`].
    ///
    /// # Errors
    /// [`CudaError::Run`] if the runs' lengths differ; [`CudaError::Driver`] if the launch fails.
    pub fn adamw<G: CudaElement>(
        &self,
        stream: &Arc<CudaStream>,
        step: &AdamWStep,
        mut state: RunState<'_>,
        gradient: &CudaView<'_, G>,
        copy: Option<RunCopy<'_>>,
    ) -> Result<(), CudaError> {
        let elements = state.master.len();
        same_length("the first moment", state.first_moment.len(), elements)?;
        same_length("the second moment", state.second_moment.len(), elements)?;
        same_length("the gradient", gradient.len(), elements)?;
        let (copy_suffix, copy_elements) = match &copy {
            None => (bf16::SUFFIX, elements),
            Some(RunCopy::Bf16(copy)) => (bf16::SUFFIX, copy.len()),
            Some(RunCopy::F16(copy)) => (f16::SUFFIX, copy.len()),
        };
        same_length("the copy", copy_elements, elements)?;
        if elements == 0 {
            return Ok(());
        }
        let kernel = function(&self.adamw, &format!("adamw_{}_{copy_suffix}", G::SUFFIX))?;
        let (numbers, count, null) = (Numbers::new(step), elements as u64, 0u64);
        let (mut copy_bf16, mut copy_f16) = match copy {
            None => (None, None),
            Some(RunCopy::Bf16(copy)) => (Some(copy), None),
            Some(RunCopy::F16(copy)) => (None, Some(copy)),
        };
        let mut launch = stream.launch_builder(&kernel);
        launch
            .arg(&mut state.master)
            .arg(&mut state.first_moment)
            .arg(&mut state.second_moment)
            .arg(gradient);
        match (&mut copy_bf16, &mut copy_f16) {
            (Some(copy), _) => launch.arg(copy),
            (None, Some(copy)) => launch.arg(copy),
            (None, None) => launch.arg(&null),
        };
        launch.arg(&count).arg(&numbers);
        // SAFETY: the arguments are those of the kernel of this name, and every run has `elements` elements,
        // which the kernel does not leave.
        unsafe { launch.launch(self.launch_for(elements.div_ceil(4), 1)) }.doing("launching AdamW")?;
        Ok(())
    }
}
