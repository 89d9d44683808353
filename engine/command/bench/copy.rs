//! `ferrozero bench copy`: pieces as the engine moves them between host and device, against one copy of all
//! their bytes. On the CPU device that is a plain copy from run to run, on a CUDA device one transfer of
//! pinned memory: the speed of the bus.

use super::super::{CommandResult, configuration};
use super::{Spread, spread};
use crate::byte_size::ByteSize;
use crate::device::compute::ComputeDevice;
use crate::device::tensor_storage::TensorStorage;
use crate::schedule::buffer_plan::STAGGER_BYTES;
use candle_core::DType;
use ferrozero_kernels::ops::Products;
use ferrozero_offload::{Budget, Lease, Tier, padded_bytes};
use serde::Serialize;
use serde_json::json;
use std::ops::Range;
use std::time::Instant;

/// Sizes to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct CopyArguments {
    /// Device: cpu, cuda or cuda:NUMBER
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Bytes to move
    #[arg(long, default_value = "256MiB")]
    bytes: ByteSize,
    /// Bytes of a piece
    #[arg(long, default_value = "4MiB")]
    piece: ByteSize,
    /// Measured rounds of each
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Up,
    Down,
}

/// One direction, measured.
#[derive(Debug, Serialize)]
struct Row {
    direction: Direction,
    pieces_bytes_per_s: Spread,
    whole_bytes_per_s: Spread,
    /// The speed of the pieces over that of the whole, round by round.
    ratio: Spread,
}

/// What is moved, and between what.
struct Copies {
    device: ComputeDevice,
    on_device: TensorStorage,
    pieces: Vec<Lease>,
    /// Of a device with memory of its own: all bytes in one lease.
    whole: Vec<Lease>,
    /// Of the CPU device: two runs of the heap.
    plain: [Vec<f32>; 2],
    piece_elements: usize,
}

impl Copies {
    fn new(arguments: &CopyArguments) -> CommandResult<Self> {
        let device =
            ComputeDevice::new(&crate::open_device(&arguments.device)?, DType::F32, Products::F32, None)?;
        let elements_of = |size: ByteSize| usize::try_from(size.0 / 4).unwrap_or(usize::MAX);
        let (elements, piece_elements) = (elements_of(arguments.bytes), elements_of(arguments.piece));
        if piece_elements == 0 || elements < piece_elements {
            let text = "--piece must be at least 4, and --bytes at least as many";
            return Err(configuration(text.into()).into());
        }
        let pieces = elements.div_ceil(piece_elements);
        let elements = pieces * piece_elements;
        // As far from one another as the engine's buffers are.
        let lease_bytes = padded_bytes(4 * piece_elements + STAGGER_BYTES);
        let whole_bytes = if device.is_apart() { padded_bytes(4 * elements) } else { 0 };
        let bytes = pieces * lease_bytes + whole_bytes;
        let budget = Budget::new(Tier::Host, bytes as u64);
        let arena = device.host_arena(&budget, bytes)?;
        let lease = |bytes: usize| -> CommandResult<Lease> {
            let mut lease = arena.lease(bytes)?;
            lease.as_f32_mut().fill(1.0);
            Ok(lease)
        };
        let on_device = device.f32_zeros(elements)?;
        // What makes zeros of it and what copies do not wait for each other.
        device.synchronize()?;
        let plain_elements = if device.is_apart() { 0 } else { elements };
        Ok(Self {
            on_device,
            pieces: (0..pieces).map(|_| lease(lease_bytes)).collect::<CommandResult<_>>()?,
            whole: (0..usize::from(device.is_apart()))
                .map(|_| lease(whole_bytes))
                .collect::<CommandResult<_>>()?,
            plain: [vec![1.0; plain_elements], vec![0.0; plain_elements]],
            piece_elements,
            device,
        })
    }

    fn bytes(&self) -> u64 {
        4 * (self.pieces.len() * self.piece_elements) as u64
    }

    /// Moves all bytes piece by piece, as the engine does; answers bytes a second.
    fn move_pieces(&mut self, direction: Direction) -> CommandResult<f64> {
        let started = Instant::now();
        for (number, lease) in self.pieces.iter_mut().enumerate() {
            let range = number * self.piece_elements..(number + 1) * self.piece_elements;
            transfer(&self.device, direction, lease, &mut self.on_device, range)?;
        }
        Ok(self.bytes() as f64 / started.elapsed().as_secs_f64())
    }

    /// Moves as many bytes at once.
    fn move_whole(&mut self, direction: Direction) -> CommandResult<f64> {
        let all = 0..self.pieces.len() * self.piece_elements;
        let started = Instant::now();
        match self.whole.first_mut() {
            Some(lease) => transfer(&self.device, direction, lease, &mut self.on_device, all)?,
            None => {
                let [from, to] = &mut self.plain;
                to.copy_from_slice(std::hint::black_box(from));
                std::hint::black_box(to);
            }
        }
        Ok(self.bytes() as f64 / started.elapsed().as_secs_f64())
    }
}

fn transfer(
    device: &ComputeDevice,
    direction: Direction,
    lease: &mut Lease,
    run: &mut TensorStorage,
    range: Range<usize>,
) -> crate::Result<()> {
    match direction {
        Direction::Up => device.load_boundary(lease, run, range),
        Direction::Down => device.save_boundary(run, range, lease),
    }
}

/// Runs the bench.
pub fn run(arguments: CopyArguments) -> CommandResult {
    let mut copies = Copies::new(&arguments)?;
    let mut rows = vec![];
    for direction in [Direction::Up, Direction::Down] {
        let (mut pieces, mut whole, mut ratios) = (vec![], vec![], vec![]);
        // The first round warms both up.
        for round in 0..=arguments.rounds {
            let speeds = match round % 2 {
                0 => {
                    let first = copies.move_pieces(direction)?;
                    (first, copies.move_whole(direction)?)
                }
                // Whoever comes first in one round comes second in the next.
                _ => {
                    let first = copies.move_whole(direction)?;
                    (copies.move_pieces(direction)?, first)
                }
            };
            if round > 0 {
                pieces.push(speeds.0);
                whole.push(speeds.1);
                ratios.push(speeds.0 / speeds.1);
            }
        }
        rows.push(Row {
            direction,
            pieces_bytes_per_s: spread(pieces),
            whole_bytes_per_s: spread(whole),
            ratio: spread(ratios),
        });
    }
    report(&arguments, &copies, &rows);
    Ok(())
}

fn report(arguments: &CopyArguments, copies: &Copies, rows: &[Row]) {
    if arguments.json {
        let result = json!({
            "device": arguments.device,
            "bytes": copies.bytes(),
            "piece_bytes": 4 * copies.piece_elements,
            "rounds": arguments.rounds,
            "rows": rows,
        });
        println!("{result}");
        return;
    }
    println!(
        "{} in pieces of {}, GB/s, median (least to most) of {} rounds in turns\n",
        ByteSize(copies.bytes()),
        arguments.piece,
        arguments.rounds
    );
    println!("| {} | in pieces | at once | ratio |\n|---|---|---|---|", arguments.device);
    let speed = |speed: Spread| {
        format!("{:.2} ({:.2} to {:.2})", speed.median / 1e9, speed.least / 1e9, speed.most / 1e9)
    };
    for row in rows {
        let name = if row.direction == Direction::Up { "host to device" } else { "device to host" };
        let Spread { median, least, most } = row.ratio;
        println!(
            "| {name} | {} | {} | {median:.3} ({least:.3} to {most:.3}) |",
            speed(row.pieces_bytes_per_s),
            speed(row.whole_bytes_per_s)
        );
    }
}
