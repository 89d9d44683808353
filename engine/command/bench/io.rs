//! `ferrozero bench io`: the store against `fio`, in turns on the same file system, so that both see the same
//! machine.

mod fio;

use super::super::{CommandResult, configuration};
use super::{Spread, spread};
use crate::byte_size::ByteSize;
use crate::probe::disk::{self, Disk, Sweep, Swept};
use fio::{Fio, Shape};
use serde::Serialize;
use serde_json::json;
use std::io::BufRead;
use std::path::PathBuf;

/// Sizes to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct IoArguments {
    /// Folder on the disk to measure; what is made there is removed afterwards
    #[arg(long, default_value = "ferrozero-bench")]
    dir: PathBuf,
    /// Bytes of state; may be given several times [default: 1GiB]
    #[arg(long)]
    bytes: Vec<ByteSize>,
    /// Threads of the optimizer
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Measured rounds of each
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Write the result as JSON
    #[arg(long)]
    json: bool,
    /// For each line of standard input, "read", "write" or "update", move all bytes once and write the
    /// seconds
    #[arg(long, hide = true)]
    serve: bool,
}

/// One sweep over one size.
#[derive(Debug, Serialize)]
struct Row {
    sweep: Sweep,
    bytes: u64,
    store_bytes_per_s: Spread,
    fio: Option<Reference>,
    /// Of an update.
    queues: Option<Queues>,
}

/// How long each queue of an update had something under way, as [`Swept`] says.
#[derive(Debug, Serialize)]
struct Queues {
    sweep_s: Spread,
    read_s: Spread,
    write_s: Spread,
    optimizer_s: Spread,
    /// The sweep's seconds over those of its busiest queue, round by round.
    over_busiest: Spread,
}

impl Queues {
    fn new(swept: &[Swept]) -> Self {
        let spread_of = |value: fn(&Swept) -> f64| spread(swept.iter().map(value).collect());
        Self {
            sweep_s: spread_of(|swept| swept.sweep_s),
            read_s: spread_of(|swept| swept.read_s),
            write_s: spread_of(|swept| swept.write_s),
            optimizer_s: spread_of(|swept| swept.optimizer_s),
            over_busiest: spread_of(Swept::over_busiest),
        }
    }
}

/// What `fio` made of the same bytes.
#[derive(Debug, Serialize)]
struct Reference {
    shape: Shape,
    bytes_per_s: Spread,
    /// The store's speed over that of `fio`, round by round.
    ratio: Spread,
}

/// Runs the bench.
pub fn run(arguments: IoArguments) -> CommandResult {
    let is_new = !arguments.dir.exists();
    std::fs::create_dir_all(&arguments.dir)?;
    let result = measure(&arguments);
    if is_new {
        // Fails, as it should, when anything else was put there meanwhile.
        let _ = std::fs::remove_dir(&arguments.dir);
    }
    result
}

fn measure(arguments: &IoArguments) -> CommandResult {
    let sizes: Vec<u64> = match arguments.bytes.as_slice() {
        [] => vec![1 << 30],
        sizes => sizes.iter().map(|size| size.0).collect(),
    };
    if arguments.serve {
        return serve(arguments, sizes[0]);
    }
    let mut rows = vec![];
    let mut missing = None;
    for bytes in sizes {
        let mut disk = Disk::new(&arguments.dir, bytes, disk::PLACES, arguments.threads)?;
        let fio = match Fio::new(&arguments.dir, disk.bytes()) {
            Ok(fio) => Some(fio),
            Err(reason) => {
                missing = Some(reason);
                None
            }
        };
        for sweep in Sweep::ALL {
            rows.push(measure_sweep(arguments, sweep, &mut disk, fio.as_ref())?);
        }
    }
    report(arguments, &rows, missing.as_deref())
}

fn measure_sweep(
    arguments: &IoArguments,
    sweep: Sweep,
    disk: &mut Disk,
    fio: Option<&Fio>,
) -> CommandResult<Row> {
    let moved_bytes = sweep.moved_bytes(disk.bytes()) as f64;
    let shape = fio.map(|fio| fio.best_shape(sweep)).transpose()?;
    let (mut ours, mut theirs, mut ratios, mut rounds) = (vec![], vec![], vec![], vec![]);
    // The first round warms both up.
    for round in 0..=arguments.rounds {
        let mut speeds = [None, None];
        let mut swept = None;
        // Whoever comes first in one round comes second in the next.
        for turn in [round % 2, 1 - round % 2] {
            speeds[turn] = match (turn, fio, shape) {
                (0, ..) => {
                    let Swept { sweep_s, .. } = *swept.insert(disk.sweep(sweep)?);
                    Some(moved_bytes / sweep_s)
                }
                (_, Some(fio), Some(shape)) => Some(fio.bytes_per_s(sweep, shape)?),
                _ => None,
            };
        }
        if round == 0 {
            continue;
        }
        rounds.extend(swept);
        ours.extend(speeds[0]);
        theirs.extend(speeds[1]);
        if let [Some(ours), Some(theirs)] = speeds {
            ratios.push(ours / theirs);
        }
    }
    let reference =
        shape.map(|shape| Reference { shape, bytes_per_s: spread(theirs), ratio: spread(ratios) });
    let queues = (sweep == Sweep::Update).then(|| Queues::new(&rounds));
    Ok(Row { sweep, bytes: disk.bytes(), store_bytes_per_s: spread(ours), fio: reference, queues })
}

fn report(arguments: &IoArguments, rows: &[Row], missing: Option<&str>) -> CommandResult {
    if arguments.json {
        let result = json!({
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "fio_missing": missing,
            "rows": rows,
        });
        println!("{result}");
        return Ok(());
    }
    println!("GB/s, median (least to most) of {} rounds in turns\n", arguments.rounds);
    println!("| bytes | sweep | store | fio | fio's requests | store : fio | time : busiest queue |");
    println!("|---|---|---|---|---|---|---|");
    let speed = |speed: Spread| {
        format!("{:.2} ({:.2} to {:.2})", speed.median / 1e9, speed.least / 1e9, speed.most / 1e9)
    };
    let ratio_of = |ratio: &Spread| format!("{:.3} ({:.3} to {:.3})", ratio.median, ratio.least, ratio.most);
    for row in rows {
        let (theirs, shape, ratio) = match &row.fio {
            Some(Reference { shape, bytes_per_s, ratio }) => (
                speed(*bytes_per_s),
                format!("{}, {} in flight", ByteSize(shape.block_bytes), shape.depth),
                ratio_of(ratio),
            ),
            None => ("".into(), "".into(), "".into()),
        };
        println!(
            "| {} | {} | {} | {theirs} | {shape} | {ratio} | {} |",
            ByteSize(row.bytes),
            row.sweep.name(),
            speed(row.store_bytes_per_s),
            row.queues.as_ref().map(|queues| ratio_of(&queues.over_busiest)).unwrap_or_default(),
        );
    }
    if let Some(reason) = missing {
        println!("\nNothing to compare with: {reason}.");
    }
    Ok(())
}

fn serve(arguments: &IoArguments, bytes: u64) -> CommandResult {
    let mut disk = Disk::new(&arguments.dir, bytes, disk::PLACES, arguments.threads)?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let sweep = Sweep::ALL.into_iter().find(|sweep| sweep.name() == line.trim());
        let sweep = sweep.ok_or_else(|| configuration(format!("{line:?} is not read, write or update")))?;
        println!("{}", json!({ "seconds": disk.sweep(sweep)?.sweep_s }));
    }
    Ok(())
}
