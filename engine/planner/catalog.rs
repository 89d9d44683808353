//! Machines that are described and not measured: well-known devices and drives, each with its source.
//!
//! Numbers are those of data sheets; what a training step gets of them is less, and the constants here say
//! how much less is assumed, and why.

use crate::byte_size::ByteSize;
use crate::error::{Error, Result};
use crate::planner::machine::Machine;

/// A device that computes in memory of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Name on the command line.
    pub name: &'static str,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Peak floating-point operations a second of dense matrix products in 16 bits, accumulated in f32.
    pub peak_flop_per_s: f64,
    /// Bytes a second of its own memory.
    pub memory_bytes_per_s: f64,
    /// Bytes a second of its bus, one way.
    pub bus_bytes_per_s: f64,
    /// Where the numbers are from.
    pub source: &'static str,
}

/// Gigabytes as in the names of devices.
const GIB: u64 = 1 << 30;

/// 16 lanes of PCI Express 3, 4 and 5, one way: 8, 16 and 32 GT/s a lane in 128b/130b (PCI-SIG, <https://pcisig.com/faq>).
const PCIE_3: f64 = 15.75e9;
pub(crate) const PCIE_4: f64 = 31.5e9;
const PCIE_5: f64 = 63.0e9;

const V100: &str = "NVIDIA V100 data sheet: \
                    https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf";
const A100: &str = "NVIDIA A100 data sheet: \
                    https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf";
const H100: &str =
    "NVIDIA H100: https://www.nvidia.com/en-us/data-center/h100/ (half of the figure with sparsity)";
const H200: &str =
    "NVIDIA H200: https://www.nvidia.com/en-us/data-center/h200/ (half of the figure with sparsity)";
const AMPERE: &str = "NVIDIA GA102 white paper: \
                      https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf";
const ADA: &str = "NVIDIA Ada white paper: \
                   https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf";

const fn gpu(
    name: &'static str,
    memory_bytes: u64,
    peak_flop_per_s: f64,
    memory_bytes_per_s: f64,
    bus_bytes_per_s: f64,
    source: &'static str,
) -> Gpu {
    Gpu { name, memory_bytes, peak_flop_per_s, memory_bytes_per_s, bus_bytes_per_s, source }
}

/// Devices.
pub const GPUS: [Gpu; 7] = [
    gpu("v100-32g", 32 * GIB, 125e12, 0.9e12, PCIE_3, V100),
    gpu("a100-40g", 40 * GIB, 312e12, 1.555e12, PCIE_4, A100),
    gpu("a100-80g", 80 * GIB, 312e12, 1.935e12, PCIE_4, A100),
    gpu("h100-80g", 80 * GIB, 989e12, 3.35e12, PCIE_5, H100),
    gpu("h200-141g", 141_000_000_000, 989e12, 4.8e12, PCIE_5, H200),
    gpu("rtx3090-24g", 24 * GIB, 71e12, 0.936e12, PCIE_4, AMPERE),
    gpu("rtx4090-24g", 24 * GIB, 165.2e12, 1.008e12, PCIE_4, ADA),
];

/// A kind of drive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drive {
    /// Name on the command line.
    pub name: &'static str,
    /// Bytes a second that it reads, in long transfers.
    pub read_bytes_per_s: f64,
    /// Bytes a second that it writes, in long transfers.
    pub write_bytes_per_s: f64,
    /// Where the numbers are from.
    pub source: &'static str,
}

const fn drive(name: &'static str, read: f64, write: f64, source: &'static str) -> Drive {
    Drive { name, read_bytes_per_s: read, write_bytes_per_s: write, source }
}

const SATA: &str = "Samsung 870 EVO: https://semiconductor.samsung.com/consumer-storage/internal-ssd/870evo/";
const GEN_3: &str =
    "Samsung 970 EVO Plus: https://semiconductor.samsung.com/consumer-storage/internal-ssd/970evoplus/";
const GEN_4: &str =
    "Samsung 990 PRO: https://semiconductor.samsung.com/consumer-storage/internal-ssd/990-pro/";

/// Drives.
pub const DRIVES: [Drive; 3] = [
    drive("sata-ssd", 560e6, 530e6, SATA),
    drive("nvme-gen3", 3.5e9, 3.3e9, GEN_3),
    drive("nvme-gen4", 7.45e9, 6.9e9, GEN_4),
];

/// Share of a device's peak that a training step gets. Chowdhery et al. report 46 % for PaLM (arXiv
/// 2204.02311, table 3), Korthikanti et al. 42 to 56 % on A100 (arXiv 2205.05198, table 5).
pub const UTILISATION: f64 = 0.45;

/// Share of a bus that copies from pinned memory get: 12 of 16 GB/s, which the authors of ZeRO-Infinity state
/// for their machines (arXiv 2104.07857, section 4).
pub const BUS_SHARE: f64 = 0.75;

/// Bytes a second that programs read and write in the host's memory where nothing else is said: two thirds of
/// what two channels of DDR5-5600 move, 89.6 GB/s (8 bytes a transfer and channel, JEDEC JESD79-5).
pub const HOST_BYTES_PER_S: f64 = 60e9;

/// What a machine is described by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Description {
    /// Name of a device in [`GPUS`].
    pub device: String,
    /// Bytes of host memory.
    pub host_memory_bytes: Option<u64>,
    /// Bytes a second of the host's memory; none: [`HOST_BYTES_PER_S`].
    pub host_bytes_per_s: Option<f64>,
    /// A name of [`DRIVES`], or a speed such as `7GB/s`; none: no disk.
    pub drive: Option<String>,
    /// Bytes of the disk; none: not limited.
    pub disk_bytes: Option<u64>,
}

impl Description {
    /// The machine that is described.
    ///
    /// # Errors
    /// [`Error::Configuration`] for names that are in no table, with those that are.
    pub fn machine(&self) -> Result<Machine> {
        let gpu = GPUS.iter().find(|gpu| gpu.name == self.device).ok_or_else(|| {
            let known: Vec<_> = GPUS.iter().map(|gpu| gpu.name).collect();
            let (device, known) = (&self.device, known.join(", "));
            Error::Configuration(format!("device {device:?} is in no table: use one of {known}"))
        })?;
        let (read, write) = self.drive.as_deref().map_or(Ok((1e9, 1e9)), drive_speeds)?;
        let memory = self.host_bytes_per_s.unwrap_or(HOST_BYTES_PER_S);
        let crossing = BUS_SHARE * gpu.bus_bytes_per_s;
        Ok(Machine {
            name: self.device.clone(),
            host_memory_bytes: self.host_memory_bytes,
            device_memory_bytes: Some(gpu.memory_bytes),
            disk_bytes: if self.drive.is_none() { Some(0) } else { self.disk_bytes },
            disk_read_bytes_per_s: read,
            disk_write_bytes_per_s: write,
            // A drive that reads and writes at once is taken to do both together as fast as the faster one
            // alone.
            disk_mixed_bytes_per_s: Some(read.max(write)),
            upload_bytes_per_s: crossing,
            download_bytes_per_s: crossing,
            optimizer_bytes_per_s: memory,
            device_memory_bytes_per_s: Some(gpu.memory_bytes_per_s),
            memory_bytes_per_s: Some(memory),
            matmul_f32_flop_per_s: None,
            matmul_bf16_flop_per_s: Some(UTILISATION * gpu.peak_flop_per_s),
            ..Machine::default()
        })
    }
}

fn drive_speeds(text: &str) -> Result<(f64, f64)> {
    if let Some(drive) = DRIVES.iter().find(|drive| drive.name == text) {
        return Ok((drive.read_bytes_per_s, drive.write_bytes_per_s));
    }
    let bytes = text.strip_suffix("/s").and_then(|size| size.parse::<ByteSize>().ok());
    match bytes {
        Some(bytes) if bytes.0 > 0 => Ok((bytes.0 as f64, bytes.0 as f64)),
        _ => {
            let known: Vec<_> = DRIVES.iter().map(|drive| drive.name).collect();
            let known = known.join(", ");
            Err(Error::Configuration(format!("drive {text:?}: use a speed such as 7GB/s, or one of {known}")))
        }
    }
}
