//! `ferrozero probe`: measures what decides how fast a step is here, and writes it down for `ferrozero plan`.

use super::bench::adamw::{BYTES_PER_PARAMETER, Runs};
use super::bench::io::Sweep;
use super::bench::io::disk::Disk;
use super::bench::spread;
use super::output::{quoted, say_next};
use super::{CommandResult, configuration};
use crate::plan::Bytes;
use crate::simulator::Machine;
use candle_core::{DType, Device, Tensor};
use ferrozero_kernels::Pool;
use ferrozero_kernels::gradient::{Accumulate, GradientStatistics, accumulate};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Numbers of a run that no cache holds.
const MEMORY_ELEMENTS: usize = 32 << 20;
const ROUNDS: usize = 5;
/// Rows and columns of the matrices: as large as those of a small model, so that larger ones are not slower.
const MATMUL_SIDE: usize = 1024;
const MATMUL_TIME: Duration = Duration::from_secs(1);
/// State that a first, short look at the disk moves.
const FIRST_LOOK_BYTES: u64 = 48 << 20;
/// State of the measurement: a longer one of a faster disk.
const DISK_BYTES_MAX: u64 = 768 << 20;
/// Seconds that one sweep of the disk should take.
const SWEEP_S: f64 = 0.3;
const MEASUREMENTS: u64 = 6;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct ProbeArguments {
    /// Folder on the disk to measure; what is made there is removed afterwards
    #[arg(long, default_value = "ferrozero-run")]
    dir: PathBuf,
    /// File to write
    #[arg(long, short, value_name = "FILE.json", default_value = "machine.json")]
    out: PathBuf,
    /// Threads of the optimizer [default: one a processor]
    #[arg(long)]
    threads: Option<usize>,
    /// Measure again where the file is already there
    #[arg(long)]
    again: bool,
    /// Write the numbers as JSON on standard output too
    #[arg(long)]
    json: bool,
    /// Say nothing but errors, and with --json the numbers
    #[arg(long, short)]
    quiet: bool,
}

/// Measures, unless that was done before.
pub fn run(arguments: ProbeArguments) -> CommandResult {
    let ProbeArguments { dir, out, threads, again, json, quiet } = arguments;
    let is_measured = out.exists() && !again;
    let machine = match is_measured {
        true => Machine::from_file(&out)?,
        false => {
            let machine = measure(&dir, threads, quiet)?;
            machine.save(&out)?;
            machine
        }
    };
    if json {
        println!("{}", serde_json::to_string(&machine)?);
    }
    if json || quiet {
        return Ok(());
    }
    print(&machine);
    match is_measured {
        true => println!("\nread from {}; measure again with --again", out.display()),
        false => println!("\nwritten to {}", out.display()),
    }
    say_next(format_args!("ferrozero plan --machine {}", quoted(out.display())));
    Ok(())
}

fn print(machine: &Machine) {
    let speed = |name: &str, bytes_per_s: Option<f64>| {
        if let Some(bytes_per_s) = bytes_per_s {
            println!("  {name:<28}{:>9.2} GB/s", bytes_per_s / 1e9);
        }
    };
    let matmul = |name: &str, flop_per_s: Option<f64>| match flop_per_s {
        Some(flop_per_s) => println!("  {name:<28}{:>9.1} GFLOP/s", flop_per_s / 1e9),
        None => println!("  {name:<28}{:>9}", "none"),
    };
    println!("machine: {}", machine.name);
    speed("memory, read and written", machine.memory_bytes_per_s);
    speed("copy host to device", Some(machine.upload_bytes_per_s));
    speed("gradients device to host", Some(machine.download_bytes_per_s));
    speed("optimizer", Some(machine.optimizer_bytes_per_s));
    speed("disk read", Some(machine.disk_read_bytes_per_s));
    speed("disk write", Some(machine.disk_write_bytes_per_s));
    speed("disk read and write at once", machine.disk_mixed_bytes_per_s);
    matmul("matrix products, f32", machine.matmul_f32_flop_per_s);
    matmul("matrix products, bf16", machine.matmul_bf16_flop_per_s);
    if let Some(bytes) = machine.host_memory_bytes {
        println!("  {:<28}{:>14}", "memory that is free", Bytes(bytes));
    }
}

fn measure(dir: &Path, threads: Option<usize>, quiet: bool) -> CommandResult<Machine> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or(processors);
    let pool = Pool::new(threads)?;
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}")?;
    let bar = match quiet {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(MEASUREMENTS).with_style(style),
    };
    let next = |what: &'static str| {
        bar.inc(u64::from(bar.message() != ""));
        bar.set_message(what);
    };
    next("memory");
    let memory = memory_bytes_per_s(threads);
    next("copies");
    let (upload, download) = crossing_bytes_per_s(&pool)?;
    next("optimizer");
    let optimizer = optimizer_bytes_per_s(&pool)?;
    next("matrix products, f32");
    let matmul_f32 = matmul_flop_per_s(DType::F32);
    next("matrix products, bf16");
    let matmul_bf16 = matmul_flop_per_s(DType::BF16);
    next("disk");
    let [read, write, mixed] = disk_bytes_per_s(dir, threads)?;
    bar.finish_and_clear();
    Ok(Machine {
        name: format!("{processors} processors, {threads} threads of the optimizer"),
        host_memory_bytes: free_memory_bytes(),
        disk_read_bytes_per_s: read,
        disk_write_bytes_per_s: write,
        disk_mixed_bytes_per_s: Some(mixed),
        upload_bytes_per_s: upload,
        download_bytes_per_s: download,
        optimizer_bytes_per_s: optimizer,
        memory_bytes_per_s: Some(memory),
        matmul_f32_flop_per_s: matmul_f32,
        matmul_bf16_flop_per_s: matmul_bf16,
        ..Machine::default()
    })
}

/// Seconds that `work` takes: the median of several times, after one that warms up.
fn seconds(mut work: impl FnMut() -> CommandResult) -> CommandResult<f64> {
    work()?;
    let mut times = vec![];
    for _ in 0..ROUNDS {
        let started = Instant::now();
        work()?;
        times.push(started.elapsed().as_secs_f64());
    }
    Ok(spread(times).median)
}

/// All processors copy from one run to another: what is read and what is written both count.
fn memory_bytes_per_s(threads: usize) -> f64 {
    let from = vec![1.0_f32; MEMORY_ELEMENTS];
    let mut to = vec![0.0_f32; MEMORY_ELEMENTS];
    let part = MEMORY_ELEMENTS.div_ceil(threads.max(1));
    let copied = seconds(|| {
        std::thread::scope(|scope| {
            for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                scope.spawn(move || to.copy_from_slice(from));
            }
        });
        Ok(())
    });
    copied.map_or(0.0, |seconds| 2.0 * 4.0 * MEMORY_ELEMENTS as f64 / seconds)
}

/// Bytes a second of state up to the CPU device and down from it: a copy by one thread, and an accumulation by the pool.
fn crossing_bytes_per_s(pool: &Pool) -> CommandResult<(f64, f64)> {
    let from = vec![1.0_f32; MEMORY_ELEMENTS];
    let mut to = vec![0.0_f32; MEMORY_ELEMENTS];
    let bytes = 4.0 * MEMORY_ELEMENTS as f64;
    let up_s = seconds(|| {
        to.copy_from_slice(std::hint::black_box(&from));
        Ok(())
    })?;
    let mut statistics = GradientStatistics::default();
    let down_s =
        seconds(|| Ok(accumulate(pool, &mut to, &from, 1.0, Accumulate::Overwrite, &mut statistics)?))?;
    Ok((bytes / up_s, bytes / down_s))
}

fn optimizer_bytes_per_s(pool: &Pool) -> CommandResult<f64> {
    let mut runs = Runs::new(MEMORY_ELEMENTS)?;
    let mut step = 0;
    let update_s = seconds(|| {
        step += 1;
        runs.update(pool, step).map(drop)
    })?;
    Ok((BYTES_PER_PARAMETER * MEMORY_ELEMENTS) as f64 / update_s)
}

/// Operations a second of candle's matrix product; none where candle has no product of that type.
fn matmul_flop_per_s(dtype: DType) -> Option<f64> {
    let side = (MATMUL_SIDE, MATMUL_SIDE);
    let matrix = Tensor::ones(side, DType::F32, &Device::Cpu).and_then(|ones| ones.to_dtype(dtype)).ok()?;
    matrix.matmul(&matrix).ok()?;
    let started = Instant::now();
    let mut products = 0;
    while products == 0 || started.elapsed() < MATMUL_TIME {
        matrix.matmul(&matrix).ok()?;
        products += 1;
    }
    Some(f64::from(products) * 2.0 * (MATMUL_SIDE as f64).powi(3) / started.elapsed().as_secs_f64())
}

/// Bytes a second that the store reads, writes, and reads and writes at once.
fn disk_bytes_per_s(dir: &Path, threads: usize) -> CommandResult<[f64; 3]> {
    let is_new = !dir.exists();
    std::fs::create_dir_all(dir)
        .map_err(|error| configuration(format!("--dir {}: {error}", dir.display())))?;
    let speeds = sweep_disk(dir, threads);
    if is_new {
        // Fails, as it should, when anything else was put there meanwhile.
        let _ = std::fs::remove_dir(dir);
    }
    speeds
}

fn sweep_disk(dir: &Path, threads: usize) -> CommandResult<[f64; 3]> {
    let write_s = Disk::new(dir, FIRST_LOOK_BYTES, threads)?.sweep(Sweep::Write)?;
    let bytes = SWEEP_S * FIRST_LOOK_BYTES as f64 / write_s;
    let mut disk = Disk::new(dir, (bytes as u64).clamp(FIRST_LOOK_BYTES, DISK_BYTES_MAX), threads)?;
    let mut of = |sweep: Sweep| -> CommandResult<f64> {
        let times = (0..ROUNDS).map(|_| disk.sweep(sweep)).collect::<CommandResult<Vec<_>>>()?;
        Ok(sweep.moved_bytes(disk.bytes()) as f64 / spread(times).median)
    };
    Ok([of(Sweep::Read)?, of(Sweep::Write)?, of(Sweep::Update)?])
}

/// Memory that can be had without anything being swapped, as Linux estimates it (`MemAvailable`, proc(5)).
fn free_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
