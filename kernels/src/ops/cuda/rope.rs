//! Rotary position embedding.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{Float, allocate, by_dtype, enqueue, module, result, size, tensor, threads, view};
use crate::ops::input::Input;
use crate::ops::rope::Sizes;

module!("rope");

/// How to rotate.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Rotation {
    pub(in crate::ops) op: &'static str,
    pub(in crate::ops) interleaved: bool,
    pub(in crate::ops) sizes: Sizes,
    /// 1 forward, −1 backward.
    pub(in crate::ops) direction: f32,
}

impl Rotation {
    pub(in crate::ops) fn forward(
        self,
        xs: (&CudaStorage, &Layout),
        cos: (&CudaStorage, &Layout),
        sin: (&CudaStorage, &Layout),
    ) -> Result<(CudaStorage, Shape)> {
        by_dtype!(self.op, xs.0.dtype(), T => {
            let [x, cos, sin] = [xs, cos, sin].map(|(storage, layout)| view::<T>(self.op, storage, layout));
            let out = self.rotate(&xs.0.device, &x?, &cos?, &sin?)?;
            Ok(result(&xs.0.device, out, xs.1.shape()))
        })
    }

    /// The gradient of the input, from the contiguous upstream gradient.
    pub(in crate::ops) fn backward(self, grad: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let [dy, c, s] = [grad, cos, sin].map(|tensor| Input::new(self.op, tensor));
        let device = dy.cuda_device()?;
        by_dtype!(self.op, grad.dtype(), T => {
            let dx = self.rotate::<T>(device, &dy.view()?, &c.view()?, &s.view()?)?;
            Ok(tensor(device, dx, grad.shape()))
        })
    }

    fn rotate<T: Float>(
        self,
        device: &CudaDevice,
        xs: &CudaView<'_, T>,
        cos: &CudaView<'_, T>,
        sin: &CudaView<'_, T>,
    ) -> Result<CudaSlice<T>> {
        let Sizes { heads, positions, head_width, table_rows, .. } = self.sizes;
        let sizes =
            [heads, positions, head_width / 2, table_rows].map(|elements| size::<u32>(self.op, elements));
        let [heads, positions, pairs, table_rows] = sizes;
        let (heads, positions, pairs, table_rows) = (heads?, positions?, pairs?, table_rows?);
        let mut out = allocate::<T>(device, xs.len())?;
        let kernel = kernel::<T>(device, "rope")?;
        let row_count = xs.len() / head_width.max(1);
        let (count, interleaved) = (row_count as u64, i32::from(self.interleaved));
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(xs).arg(cos).arg(sin).arg(&count);
        launch
            .arg(&heads)
            .arg(&positions)
            .arg(&pairs)
            .arg(&table_rows)
            .arg(&self.direction)
            .arg(&interleaved);
        // SAFETY: the arguments are those of the kernel, and `Sizes` has checked that the tables have a row
        // for every row of the input.
        unsafe { enqueue(&mut launch, threads(row_count * (head_width / 2).div_ceil(4))) }?;
        drop(launch);
        Ok(out)
    }
}
