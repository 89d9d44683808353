//! `ferrozero bench adamw`: the optimizer's loop against a loop that only moves the same bytes.

use super::super::CommandResult;
use super::spread;
use crate::probe::optimizer::{BYTES_PER_PARAMETER, Runs, pool};
use serde_json::json;
use std::io::BufRead;
use std::time::Instant;

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

/// Reads and writes what an update does, with one addition each.
fn move_bytes(runs: &mut Runs, threads: usize) -> f64 {
    let [master, first_moment, second_moment, gradient] = &mut runs.leases;
    let part = runs.elements.div_ceil(threads).max(1);
    let parts = master.as_f32_mut()[..runs.elements]
        .chunks_mut(part)
        .zip(first_moment.as_f32_mut()[..runs.elements].chunks_mut(part))
        .zip(second_moment.as_f32_mut()[..runs.elements].chunks_mut(part))
        .zip(gradient.as_f32()[..runs.elements].chunks(part));
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

/// Runs the bench.
pub fn run(arguments: AdamWArguments) -> CommandResult {
    let pool = pool(arguments.threads)?;
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
        let times = (runs.update(&pool, 1)?, move_bytes(&mut runs, arguments.threads.max(1)));
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
