//! `ferrozero bench adamw`: the optimizer's loop against a loop that only moves the same bytes.

use super::super::CommandResult;
use super::{adamw_step, spread};
use crate::arrangement::STAGGER_BYTES;
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::{AdamWState, adamw};
use ferrozero_offload::{Arena, Budget, Lease, Tier};
use serde_json::json;
use std::io::BufRead;
use std::time::Instant;

/// Bytes that one update moves for each parameter: four runs are read and three written.
pub(in crate::command) const BYTES_PER_PARAMETER: usize = 7 * 4;

/// Elements that the reference handles at a time, as the optimizer does.
const CHUNK_ELEMENTS: usize = 64 * 1024;

/// Adds `gradient` to three runs, in a form that compilers vectorise.
fn add(master: &mut [f32], first_moment: &mut [f32], second_moment: &mut [f32], gradient: &[f32]) {
    let elements = gradient.len();
    let (master, first_moment) = (&mut master[..elements], &mut first_moment[..elements]);
    let second_moment = &mut second_moment[..elements];
    for i in 0..elements {
        master[i] += gradient[i];
        first_moment[i] += gradient[i];
        second_moment[i] += gradient[i];
    }
}

/// Sizes to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct AdamWArguments {
    /// Parameters
    #[arg(long, default_value_t = 64 << 20)]
    elements: usize,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Measured rounds of each
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Write the result as JSON
    #[arg(long)]
    json: bool,
    /// Make one update for each line of standard input, and write its seconds
    #[arg(long, hide = true)]
    serve: bool,
}

/// Master parameters, moments and gradient, in pinned memory as the engine has them.
pub(in crate::command) struct Runs {
    leases: [Lease; 4],
    elements: usize,
}

impl Runs {
    /// Memory for `elements` parameters.
    pub(in crate::command) fn new(elements: usize) -> CommandResult<Self> {
        let bytes = 4 * elements + STAGGER_BYTES;
        let budget = Budget::new(Tier::Host, 4 * bytes.next_multiple_of(4096) as u64);
        let arena = Arena::new(&budget, budget.limit_bytes() as usize)?;
        let lease = |value: f32| -> CommandResult<Lease> {
            let mut lease = arena.lease(bytes)?;
            lease.as_f32_mut().fill(value);
            Ok(lease)
        };
        let leases = [lease(0.5)?, lease(0.0)?, lease(0.0)?, lease(0.01)?];
        Ok(Self { leases, elements })
    }

    /// Makes one update; answers the seconds that it took.
    pub(in crate::command) fn update(&mut self, pool: &Pool, step: u64) -> CommandResult<f64> {
        let [master, first_moment, second_moment, gradient] = &mut self.leases;
        let state = AdamWState {
            master: &mut master.as_f32_mut()[..self.elements],
            first_moment: &mut first_moment.as_f32_mut()[..self.elements],
            second_moment: &mut second_moment.as_f32_mut()[..self.elements],
        };
        let started = Instant::now();
        adamw(pool, &adamw_step(step), state, &gradient.as_f32()[..self.elements], None)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Reads and writes what an update does, with one addition each.
    fn move_bytes(&mut self, threads: usize) -> f64 {
        let [master, first_moment, second_moment, gradient] = &mut self.leases;
        let part = self.elements.div_ceil(threads).max(1);
        let parts = master.as_f32_mut()[..self.elements]
            .chunks_mut(part)
            .zip(first_moment.as_f32_mut()[..self.elements].chunks_mut(part))
            .zip(second_moment.as_f32_mut()[..self.elements].chunks_mut(part))
            .zip(gradient.as_f32()[..self.elements].chunks(part));
        let started = Instant::now();
        std::thread::scope(|scope| {
            for (((master, first_moment), second_moment), gradient) in parts {
                scope.spawn(move || {
                    let chunks = master
                        .chunks_mut(CHUNK_ELEMENTS)
                        .zip(first_moment.chunks_mut(CHUNK_ELEMENTS))
                        .zip(second_moment.chunks_mut(CHUNK_ELEMENTS))
                        .zip(gradient.chunks(CHUNK_ELEMENTS));
                    for (((master, first_moment), second_moment), gradient) in chunks {
                        add(master, first_moment, second_moment, gradient);
                    }
                });
            }
        });
        started.elapsed().as_secs_f64()
    }
}

/// Runs the bench.
pub fn run(arguments: AdamWArguments) -> CommandResult {
    let pool = Pool::new(arguments.threads)?;
    let mut runs = Runs::new(arguments.elements)?;
    if arguments.serve {
        for (step, line) in (1..).zip(std::io::stdin().lock().lines()) {
            line?;
            println!("{}", runs.update(&pool, step)?);
        }
        return Ok(());
    }
    let (mut ours, mut reference) = (vec![], vec![]);
    // The first round warms both up.
    for round in 0..=arguments.rounds {
        let times = (runs.update(&pool, 1)?, runs.move_bytes(arguments.threads.max(1)));
        if round > 0 {
            ours.push(times.0);
            reference.push(times.1);
        }
    }
    let (ours, reference) = (spread(ours), spread(reference));
    let ratio = reference.median / ours.median;
    let bytes = BYTES_PER_PARAMETER * arguments.elements;
    if arguments.json {
        let result = json!({
            "elements": arguments.elements,
            "threads": arguments.threads,
            "bytes_moved": bytes,
            "adamw_s": ours,
            "reference_s": reference,
            "ratio": ratio,
        });
        println!("{result}");
        return Ok(());
    }
    println!("{} million parameters, {} threads", arguments.elements / 1_000_000, arguments.threads);
    println!("| loop | median | least | most |\n|---|---|---|---|");
    for (name, times) in [("AdamW", &ours), ("the same bytes, one addition each", &reference)] {
        println!("| {name} | {:.4} s | {:.4} s | {:.4} s |", times.median, times.least, times.most);
    }
    println!("\nAdamW runs at {ratio:.2} of the speed of moving its bytes.");
    Ok(())
}
