//! `ferrozero probe`: measures what decides how fast a step is here, and writes it down for `ferrozero plan`.

use super::output::{quoted, say_next};
use super::{CommandResult, configuration};
use crate::device::compute::ComputeDevice;
use crate::planner::machine::Machine;
use crate::planner::plan::Bytes;
use crate::probe;
use candle_core::{DType, Device};
use ferrozero_kernels::ops::Products;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct ProbeArguments {
    /// Folder on the disk to measure; what is made there is removed afterwards
    #[arg(long, default_value = "ferrozero-run")]
    dir: PathBuf,
    /// File to write
    #[arg(long, short, value_name = "FILE.json", default_value = "machine.json")]
    out: PathBuf,
    /// Device: cpu, cuda or cuda:NUMBER
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads of the optimizer [default: one a processor]
    #[arg(long)]
    threads: Option<usize>,
    /// Measure again where the file already holds this folder's and device's numbers
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
    let ProbeArguments { dir, out, device, threads, again, json, quiet } = arguments;
    let device = crate::open_device(&device)?;
    let known = if out.exists() && !again { Some(Machine::from_file(&out)?) } else { None };
    // What was measured of another folder or device says nothing of this one.
    let known = known.filter(|machine| machine.is_of(&dir, &device));
    let is_measured = known.is_some();
    let machine = match known {
        Some(machine) => machine,
        None => {
            let machine = measure(&dir, &device, threads, quiet)?;
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
    let computing = |name: &str, flop_per_s: Option<f64>| match flop_per_s {
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
    computing("matrix products, f32", machine.matmul_f32_flop_per_s);
    computing("matrix products, bf16", machine.matmul_bf16_flop_per_s);
    computing("attention, f32", machine.attention_f32_flop_per_s);
    computing("attention, bf16", machine.attention_bf16_flop_per_s);
    speed("memory of the device", machine.device_memory_bytes_per_s);
    if let Some(bytes) = machine.device_memory_bytes {
        println!("  {:<28}{:>14}", "device memory to use", Bytes(bytes));
    }
    if let Some(bytes) = machine.host_memory_bytes {
        println!("  {:<28}{:>14}", "memory that is free", Bytes(bytes));
    }
}

fn measure(dir: &Path, device: &Device, threads: Option<usize>, quiet: bool) -> CommandResult<Machine> {
    let device = ComputeDevice::new(device, DType::F32, Products::F32, None)?;
    let is_new = !dir.exists();
    std::fs::create_dir_all(dir)
        .map_err(|error| configuration(format!("--dir {}: {error}", dir.display())))?;
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}")?;
    let bar = match quiet {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(probe::MEASUREMENTS).with_style(style),
    };
    let next = |what: &'static str| {
        bar.inc(u64::from(bar.message() != ""));
        bar.set_message(what);
    };
    let machine = probe::thorough(dir, threads, &device, &next);
    bar.finish_and_clear();
    if is_new {
        // Fails, as it should, when anything else was put there meanwhile.
        let _ = std::fs::remove_dir(dir);
    }
    Ok(machine?)
}
