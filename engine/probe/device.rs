//! What a device does: its matrix products and attention, and the bus and the memory of one that has its own.

use super::Effort;
use crate::device::compute::ComputeDevice;
use crate::device::tensor_storage::TensorStorage;
use crate::error::Result;
use crate::statistics::median;
use candle_core::{DType, Device, Tensor};
use ferrozero_kernels::ops::{Products, causal_attention, linear, with_products};
use ferrozero_offload::{Budget, Tier};
use std::time::{Duration, Instant};

/// Elements of a copy over the bus.
const BUS_ELEMENTS: usize = 4 << 20;
/// Rows and columns of matrices for a device that multiplies those of [`SIDE`] in no time.
const LARGE_SIDE: usize = 4096;
/// Rows and columns of matrices as large as those of a small model, so that larger ones are not slower.
const SIDE: usize = 1024;
/// Sequences, tokens, width and heads of attention as in a small model.
const ATTENTION_BATCH: usize = 8;
const ATTENTION_TOKENS: usize = 1024;
const ATTENTION_WIDTH: usize = 768;
const ATTENTION_HEADS: usize = 12;
const COMPUTE_TIME: Duration = Duration::from_secs(1);
/// A product that takes less says little of the device.
const SHORTEST_PRODUCT: Duration = Duration::from_millis(2);
/// Times between two looks at the clock of a device that must not wait for the host.
const TOGETHER: u32 = 8;

/// Bytes a second that page-locked memory sends to the device, and gets from it.
pub fn bus_bytes_per_s(device: &ComputeDevice, effort: Effort) -> Result<[f64; 2]> {
    let bytes = BUS_ELEMENTS * device.dtype().size_in_bytes();
    let budget = Budget::new(Tier::Host, bytes as u64);
    let mut lease = device.host_arena(&budget, bytes)?.lease(bytes)?;
    let mut run = TensorStorage::zeros(BUS_ELEMENTS, device.dtype(), device.device())?;
    device.synchronize()?;
    let (mut up, mut down) = (vec![], vec![]);
    // The first round finds everything cold.
    for round in 0..=effort.rounds {
        let started = Instant::now();
        device.load_boundary(&lease, &mut run, 0..BUS_ELEMENTS)?;
        let up_s = started.elapsed().as_secs_f64();
        device.save_boundary(&mut run, 0..BUS_ELEMENTS, &mut lease)?;
        let down_s = started.elapsed().as_secs_f64() - up_s;
        if round > 0 {
            up.push(bytes as f64 / up_s);
            down.push(bytes as f64 / down_s);
        }
    }
    Ok([median(up), median(down)])
}

/// Bytes a second that the device reads and writes in its own memory: a sum of a run and a number.
pub fn memory_bytes_per_s(device: &Device, effort: Effort) -> candle_core::Result<f64> {
    let run = Tensor::zeros(effort.elements, DType::F32, device)?;
    let bytes = 2.0 * 4.0 * effort.elements as f64;
    let mut speeds = vec![];
    for round in 0..=effort.rounds {
        device.synchronize()?;
        let started = Instant::now();
        let _sum = run.affine(1.0, 1.0)?;
        device.synchronize()?;
        if round > 0 {
            speeds.push(bytes / started.elapsed().as_secs_f64());
        }
    }
    Ok(median(speeds))
}

/// Operations a second of matrix products of a type; an error where the device has none.
pub fn matmul_flop_per_s(device: &Device, dtype: DType) -> candle_core::Result<f64> {
    let mut side = SIDE;
    let mut matrix = square(device, dtype, side)?;
    // The first one finds the device cold.
    time(device, 1, || matrix.matmul(&matrix))?;
    if time(device, 1, || matrix.matmul(&matrix))? < SHORTEST_PRODUCT {
        side = LARGE_SIDE;
        matrix = square(device, dtype, side)?;
        time(device, 1, || matrix.matmul(&matrix))?;
    }
    Ok(2.0 * (side as f64).powi(3) * times_per_s(device, || matrix.matmul(&matrix))?)
}

/// Operations a second of matrix products of f32 that the CPU device makes of bf16; none where it does not.
pub fn bf16_products_flop_per_s(device: &Device) -> Option<f64> {
    if !device.is_cpu() || !Products::Bf16.is_native() {
        return None;
    }
    let matrix = square(device, DType::F32, SIDE).ok()?;
    let multiply = || with_products(Products::Bf16, || linear(&matrix, &matrix, None));
    // The first one finds the device cold.
    time(device, 1, multiply).ok()?;
    Some(2.0 * (SIDE as f64).powi(3) * times_per_s(device, multiply).ok()?)
}

/// Operations a second of causal attention of a type, counted as plans count them: 4·T·C a token, with what
/// the mask hides; an error where the device has none.
pub fn attention_flop_per_s(device: &Device, dtype: DType) -> candle_core::Result<f64> {
    let batch = if device.is_cpu() { 1 } else { ATTENTION_BATCH };
    let shape = (batch, ATTENTION_TOKENS, 3 * ATTENTION_WIDTH);
    let packed = Tensor::ones(shape, DType::F32, device)?.to_dtype(dtype)?; // [B, T, 3·C]
    let attend = || causal_attention(&packed, ATTENTION_HEADS, None);
    time(device, 1, attend)?;
    let flop = 4.0 * (batch * ATTENTION_TOKENS * ATTENTION_TOKENS * ATTENTION_WIDTH) as f64;
    Ok(flop * times_per_s(device, attend)?)
}

/// How often a second a device does some work.
fn times_per_s(device: &Device, work: impl Fn() -> candle_core::Result<Tensor>) -> candle_core::Result<f64> {
    let together = if device.is_cpu() { 1 } else { TOGETHER };
    let (mut times, mut elapsed) = (0, Duration::ZERO);
    while elapsed < COMPUTE_TIME {
        elapsed += time(device, together, &work)?;
        times += together;
    }
    Ok(f64::from(times) / elapsed.as_secs_f64())
}

fn square(device: &Device, dtype: DType, side: usize) -> candle_core::Result<Tensor> {
    Tensor::ones((side, side), DType::F32, device)?.to_dtype(dtype)
}

/// The time of some work, several times.
fn time(
    device: &Device,
    times: u32,
    work: impl Fn() -> candle_core::Result<Tensor>,
) -> candle_core::Result<Duration> {
    let started = Instant::now();
    for _ in 0..times {
        work()?;
    }
    device.synchronize()?;
    Ok(started.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_measured_in_the_types_that_a_device_computes_in() {
        assert!(attention_flop_per_s(&Device::Cpu, DType::F32).unwrap() > 0.0);
        assert!(attention_flop_per_s(&Device::Cpu, DType::F64).is_err());
    }

    #[test]
    fn products_of_bf16_are_measured_where_they_are_made() {
        assert_eq!(bf16_products_flop_per_s(&Device::Cpu).is_some(), Products::Bf16.is_native());
    }
}
