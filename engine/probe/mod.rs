//! Measures what decides how fast a step is here: thoroughly for `ferrozero probe`, and quickly when a run is planned and
//! nobody has probed.

mod device;
pub mod disk;
pub mod optimizer;

use crate::device::compute::ComputeDevice;
use crate::error::{Error, Result};
use crate::planner::catalog::{BUS_SHARE, PCIE_4};
use crate::planner::machine::Machine;
use crate::statistics::median;
use crate::sync::lock;
use candle_core::DType;
use disk::{Disk, Sweep};
use ferrozero_kernels::Pool;
use ferrozero_kernels::gradient::{Accumulate, GradientStatistics, accumulate};
use optimizer::{BYTES_PER_PARAMETER, Runs, pool};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What [`thorough`] measures, one after another.
pub const MEASUREMENTS: u64 = 8;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Effort {
    /// Numbers of a run: more than a cache holds.
    elements: usize,
    rounds: usize,
    /// After this no further round of the disk begins.
    disk_time: Duration,
    /// Pieces of each stream in memory.
    places: usize,
}

const THOROUGH: Effort =
    Effort { elements: 32 << 20, rounds: 5, disk_time: Duration::from_secs(20), places: disk::PLACES };
const QUICK: Effort =
    Effort { elements: 4 << 20, rounds: 3, disk_time: Duration::from_millis(300), places: 3 };

/// State that a first, short look at the disk moves.
const FIRST_LOOK_BYTES: u64 = 48 << 20;
/// State of the measurement: a longer one of a faster disk.
const DISK_BYTES_MAX: u64 = 768 << 20;
/// Seconds that one sweep of the disk should take.
const SWEEP_S: f64 = 0.3;
/// State that a quick measurement of the disk moves.
const QUICK_DISK_BYTES: u64 = 24 << 20;
/// Share of a run's memory that a quick measurement may take.
const QUICK_MEMORY_SHARE: u64 = 4;

/// Processors of this machine.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Measures everything, in about ten seconds, and tells `next` what comes next. Matrix products, attention and copies are those of
/// `device`.
///
/// # Errors
/// Errors of the tiers.
pub fn thorough(
    directory: &Path,
    threads: Option<usize>,
    device: &ComputeDevice,
    next: &dyn Fn(&'static str),
) -> Result<Machine> {
    let processors = processors();
    let threads = threads.unwrap_or(processors);
    let pool = pool(threads)?;
    next("memory");
    let memory = memory_bytes_per_s(threads, THOROUGH)?;
    next("copies");
    let [upload, download] = match device.is_apart() {
        true => device::bus_bytes_per_s(device, THOROUGH)?,
        false => crossing_bytes_per_s(&pool, THOROUGH)?,
    };
    next("optimizer");
    let optimizer = optimizer_bytes_per_s(&pool, THOROUGH)?;
    next("matrix products, f32");
    let matmul = |dtype| device::matmul_flop_per_s(device.device(), dtype).ok();
    let matmul_f32 = matmul(DType::F32);
    next("matrix products, bf16");
    let matmul_bf16 = match device.is_apart() {
        true => matmul(DType::BF16),
        false => device::bf16_products_flop_per_s(device.device()),
    };
    next("attention, f32");
    let attention = |dtype| device::attention_flop_per_s(device.device(), dtype).ok();
    let attention_f32 = attention(DType::F32);
    next("attention, bf16");
    // On the CPU device attention stays with f32.
    let attention_bf16 = if device.is_apart() { attention(DType::BF16) } else { None };
    next("disk");
    let write_s =
        Disk::new(directory, FIRST_LOOK_BYTES, THOROUGH.places, threads)?.sweep(Sweep::Write)?.sweep_s;
    let bytes = SWEEP_S * FIRST_LOOK_BYTES as f64 / write_s;
    let bytes = (bytes as u64).clamp(FIRST_LOOK_BYTES, DISK_BYTES_MAX);
    let [read, write, mixed] = disk_bytes_per_s(directory, bytes, threads, THOROUGH)?;
    let (beside, device_memory) = match device.is_apart() {
        true => (", a CUDA device", Some(device::memory_bytes_per_s(device.device(), THOROUGH)?)),
        false => ("", None),
    };
    Ok(Machine {
        name: format!("{processors} processors, {threads} threads of the optimizer{beside}"),
        directory: directory.canonicalize().ok(),
        processors: (!device.is_apart()).then_some(processors),
        host_memory_bytes: free_memory_bytes(),
        disk_read_bytes_per_s: read,
        disk_write_bytes_per_s: write,
        disk_mixed_bytes_per_s: Some(mixed),
        upload_bytes_per_s: upload,
        download_bytes_per_s: download,
        optimizer_bytes_per_s: optimizer,
        memory_bytes_per_s: Some(memory),
        device_memory_bytes: device.default_limit_bytes()?,
        device_memory_bytes_per_s: device_memory,
        matmul_f32_flop_per_s: matmul_f32,
        matmul_bf16_flop_per_s: matmul_bf16,
        attention_f32_flop_per_s: attention_f32,
        attention_bf16_flop_per_s: attention_bf16,
        ..Machine::default()
    })
}

/// What a run wants to know of the machine before it is planned.
#[derive(Debug, Clone, Copy)]
pub struct QuickLook<'a> {
    /// Folder of the run; none: nothing is on a disk.
    pub directory: Option<&'a Path>,
    /// Threads of the optimizer; none: one a processor.
    pub threads: Option<usize>,
    /// Bytes that the run may take.
    pub memory_bytes: Option<u64>,
    /// What computes.
    pub device: &'a ComputeDevice,
}

/// Speeds of memory and optimizer by threads, and of disks by their device's number: a process measures each once.
static MEASURED: Mutex<Option<Measured>> = Mutex::new(None);

#[derive(Default)]
struct Measured {
    memory: HashMap<usize, [f64; 3]>,
    /// Up and down, by the type in which state crosses.
    bus: HashMap<DType, [f64; 2]>,
    disk: HashMap<u64, [f64; 3]>,
}

/// What is taken where nothing can be measured: an ordinary machine of two memory channels with a SATA drive. Bytes a second
/// up, down, and of the optimizer; and of the disk's reads, writes, and both.
const ASSUMED_MEMORY: [f64; 3] = [8e9, 8e9, 20e9];
const ASSUMED_DISK: [f64; 3] = [5e8, 5e8, 5e8];
/// 16 lanes of PCI Express 4.
const ASSUMED_BUS: [f64; 2] = [BUS_SHARE * PCIE_4; 2];

/// What decides between plans, in less than half a second on a fast disk, and once a process. It never fails: what cannot be
/// measured is assumed, and whatever is wrong with the folder is told when the run wants it.
pub fn quick(look: QuickLook) -> Machine {
    let threads = look.threads.unwrap_or_else(processors);
    let mut measured = lock(&MEASURED);
    let measured = measured.get_or_insert_default();
    let elements = look.memory_bytes.map_or(u64::MAX, |bytes| bytes / QUICK_MEMORY_SHARE / 16);
    let effort = Effort { elements: QUICK.elements.min(elements as usize).max(1 << 16), ..QUICK };
    let [mut upload, mut download, optimizer] = *measured
        .memory
        .entry(threads)
        .or_insert_with(|| memory_speeds(threads, effort).unwrap_or(ASSUMED_MEMORY));
    let [read, write, mixed] = match look.directory {
        Some(directory) => match existing(directory).and_then(|existing| existing.metadata().ok()) {
            Some(metadata) => *measured
                .disk
                .entry(metadata.dev())
                .or_insert_with(|| quick_disk(directory, threads).unwrap_or(ASSUMED_DISK)),
            None => ASSUMED_DISK,
        },
        // Files that are in memory are copied there and back.
        None => [upload, upload, upload],
    };
    if look.device.is_apart() {
        let of_bus = || device::bus_bytes_per_s(look.device, effort).unwrap_or(ASSUMED_BUS);
        [upload, download] = *measured.bus.entry(look.device.dtype()).or_insert_with(of_bus);
    }
    Machine {
        name: "measured when the run was planned".into(),
        processors: (!look.device.is_apart()).then(processors),
        disk_read_bytes_per_s: read,
        disk_write_bytes_per_s: write,
        disk_mixed_bytes_per_s: Some(mixed),
        upload_bytes_per_s: upload,
        download_bytes_per_s: download,
        optimizer_bytes_per_s: optimizer,
        ..Machine::default()
    }
}

/// Forgets what a process has measured, so that the next run is planned with what is so now.
pub fn forget() {
    *lock(&MEASURED) = None;
}

/// The folder, or the one that it will be made in.
fn existing(directory: &Path) -> Option<&Path> {
    directory
        .ancestors()
        .map(|path| if path.as_os_str().is_empty() { Path::new(".") } else { path })
        .find(|path| path.exists())
}

fn memory_speeds(threads: usize, effort: Effort) -> Result<[f64; 3]> {
    let pool = pool(threads)?;
    let [upload, download] = crossing_bytes_per_s(&pool, effort)?;
    Ok([upload, download, optimizer_bytes_per_s(&pool, effort)?])
}

fn quick_disk(directory: &Path, threads: usize) -> Result<[f64; 3]> {
    let made = existing(directory).map(Path::to_owned);
    std::fs::create_dir_all(directory).map_err(Error::file(directory))?;
    let speeds = disk_bytes_per_s(directory, QUICK_DISK_BYTES, threads, QUICK);
    // A refused plan leaves nothing behind: removes the folders that were made here, if nothing else was put there.
    for path in directory.ancestors().take_while(|path| made.as_deref() != Some(*path)) {
        if std::fs::remove_dir(path).is_err() {
            break;
        }
    }
    speeds
}

/// Bytes a second that the store reads, writes, and reads and writes at once.
fn disk_bytes_per_s(directory: &Path, bytes: u64, threads: usize, effort: Effort) -> Result<[f64; 3]> {
    let mut disk = Disk::new(directory, bytes, effort.places, threads)?;
    let started = Instant::now();
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..effort.rounds {
        for (sweep, times) in Sweep::ALL.into_iter().zip(&mut times) {
            times.push(disk.sweep(sweep)?.sweep_s);
        }
        if started.elapsed() >= effort.disk_time {
            break;
        }
    }
    let mut speeds = [0.0; 3];
    for ((sweep, times), speed) in Sweep::ALL.into_iter().zip(times).zip(&mut speeds) {
        *speed = sweep.moved_bytes(disk.bytes()) as f64 / median(times);
    }
    Ok(speeds)
}

/// Seconds that `work` takes: the median of several times, after one that warms up.
fn seconds(effort: Effort, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut times = vec![];
    for _ in 0..effort.rounds {
        let started = Instant::now();
        work()?;
        times.push(started.elapsed().as_secs_f64());
    }
    Ok(median(times))
}

/// All processors copy from one run to another: what is read and what is written both count.
fn memory_bytes_per_s(threads: usize, effort: Effort) -> Result<f64> {
    let from = vec![1.0_f32; effort.elements];
    let mut to = vec![0.0_f32; effort.elements];
    let part = effort.elements.div_ceil(threads.max(1));
    let copied = seconds(effort, || {
        std::thread::scope(|scope| {
            let mut parts = from.chunks(part).zip(to.chunks_mut(part));
            parts.try_for_each(|(from, to)| {
                let started =
                    std::thread::Builder::new().spawn_scoped(scope, move || to.copy_from_slice(from));
                started.map(drop).map_err(|source| ferrozero_offload::Error::Thread { source }.into())
            })
        })
    });
    Ok(2.0 * 4.0 * effort.elements as f64 / copied?)
}

/// Bytes a second of state up to the CPU device and down from it: a copy by one thread, and an accumulation by the pool.
fn crossing_bytes_per_s(pool: &Pool, effort: Effort) -> Result<[f64; 2]> {
    let from = vec![1.0_f32; effort.elements];
    let mut to = vec![0.0_f32; effort.elements];
    let bytes = 4.0 * effort.elements as f64;
    let up_s = seconds(effort, || {
        to.copy_from_slice(std::hint::black_box(&from));
        Ok(())
    })?;
    let mut statistics = GradientStatistics::default();
    let down_s = seconds(effort, || {
        accumulate(pool, &mut to, &from, 1.0, Accumulate::Overwrite, &mut statistics).map_err(Error::Kernel)
    })?;
    Ok([bytes / up_s, bytes / down_s])
}

fn optimizer_bytes_per_s(pool: &Pool, effort: Effort) -> Result<f64> {
    let mut runs = Runs::new(effort.elements)?;
    let mut step = 0;
    let update_s = seconds(effort, || {
        step += 1;
        runs.update(pool, step).map(drop)
    })?;
    Ok((BYTES_PER_PARAMETER * effort.elements) as f64 / update_s)
}

/// Memory that can be had without anything being swapped, as Linux estimates it (`MemAvailable`, proc(5)).
fn free_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
