//! The disk as `fio` sees it: direct transfers of the best size and depth that a short scan finds.

use super::super::super::CommandResult;
use super::Sweep;
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Most bytes that one run of the scan moves.
const SCAN_BYTES: u64 = 512 << 20;

/// Shapes that the scan tries again, in turns, before it names the best.
const FINALISTS: usize = 4;

/// Runs of each finalist.
const FINAL_RUNS: usize = 3;

/// Size and depth of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u64,
}

/// A file of `fio`; removed when this is dropped.
pub struct Fio {
    path: PathBuf,
    bytes: u64,
    engine: &'static str,
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Fio {
    /// Writes a file of `bytes` in `directory`, or says why there is nothing to compare with.
    pub fn new(directory: &Path, bytes: u64) -> Result<Self, String> {
        let mut refusal = String::new();
        for engine in ["io_uring", "libaio"] {
            let fio = Self { path: directory.join("fio.bin"), bytes, engine };
            match fio.run(Sweep::Write, Shape { block_bytes: 1 << 20, depth: 8 }, bytes) {
                Ok(_) => return Ok(fio),
                Err(error) => refusal = error.to_string(),
            }
        }
        Err(refusal)
    }

    /// The fastest of all sizes and depths: all once, and the best few of them in turns.
    pub fn best_shape(&self, sweep: Sweep) -> CommandResult<Shape> {
        let bytes = self.bytes.min(SCAN_BYTES);
        let mut tried = vec![];
        for block_bytes in [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20] {
            for depth in [1, 2, 4, 8, 16, 32] {
                let shape = Shape { block_bytes, depth };
                tried.push((shape, self.run(sweep, shape, bytes)?));
            }
        }
        tried.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        tried.truncate(FINALISTS);
        for _ in 0..FINAL_RUNS {
            for (shape, sum) in &mut tried {
                *sum += self.run(sweep, *shape, bytes)?;
            }
        }
        let best = tried.iter().max_by(|(_, one), (_, other)| one.total_cmp(other));
        best.map(|(shape, _)| *shape).ok_or_else(|| "fio: the scan tried nothing".into())
    }

    /// Moves all bytes once.
    pub fn bytes_per_s(&self, sweep: Sweep, shape: Shape) -> CommandResult<f64> {
        self.run(sweep, shape, self.bytes)
    }

    fn run(&self, sweep: Sweep, shape: Shape, bytes: u64) -> CommandResult<f64> {
        let mut command = Command::new("fio");
        // Buffers in huge pages, as the store's are: the disk gets fewer and longer ranges of memory, and is
        // faster.
        command.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
        let directions = match sweep {
            Sweep::Read => "read",
            Sweep::Write => "write",
            Sweep::Update => "readwrite",
        };
        command.args(["--name=ferrozero", "--direct=1", "--output-format=json", "--fallocate=posix"]);
        command.arg(format!("--filename={}", self.path.display()));
        command.arg(format!("--rw={directions}"));
        command.arg(format!("--ioengine={}", self.engine));
        command.arg(format!("--size={}", self.bytes));
        command.arg(format!("--io_size={}", sweep.moved_bytes(bytes)));
        command.arg(format!("--bs={}", shape.block_bytes));
        command.arg(format!("--iodepth={}", shape.depth));
        let output = match command.output() {
            Ok(output) => output,
            Err(error) => return Err(format!("fio cannot be started ({error})").into()),
        };
        let said = || String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if !output.status.success() {
            return Err(format!("fio failed: {}", said()).into());
        }
        // Some versions write warnings before the JSON.
        let text = String::from_utf8_lossy(&output.stdout);
        let result: Value = serde_json::from_str(text.trim_start_matches(|start| start != '{'))?;
        let job = &result["jobs"][0];
        let number = |direction: &str, name: &str| job[direction][name].as_f64().unwrap_or(0.0);
        let moved_bytes = number("read", "io_bytes") + number("write", "io_bytes");
        let taken_ms = number("read", "runtime").max(number("write", "runtime"));
        if moved_bytes == 0.0 || taken_ms == 0.0 {
            return Err(format!("fio moved nothing: {}", said()).into());
        }
        Ok(moved_bytes / (taken_ms / 1e3))
    }
}
