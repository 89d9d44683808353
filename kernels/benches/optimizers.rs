//! Updates of stored states against plain loops that read and write the same bytes.
//!
//! The two take turns, so that whatever else the machine does hits both; the table has the medians. The
//! arguments are the number of elements in Mi (16) and of threads (2).

use std::sync::Arc;
use std::time::Instant;

use ferrozero_kernels::optimizer::{
    Adagrad, AdamW, Formats, Gradient, Lion, Masters, Optimizer, Piece, Sgd, States, Step, StoredOptimizer,
};
use ferrozero_kernels::{Error, Pool};

const ROUNDS: usize = 15;
/// Elements that the plain loop handles at a time, as the optimizers do.
const CHUNK_ELEMENTS: usize = 64 * 1024;
/// Runs lie at different places of pages, as the engine's do: at equal ones they would wait for each other.
const STAGGER_WORDS: usize = 1040;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let elements = arguments.next().unwrap_or(16usize) << 20;
    let threads = arguments.next().unwrap_or(2);
    let momentum = Sgd { momentum: 0.9, ..Sgd::default() };
    let optimizers: [Arc<dyn Optimizer>; 4] = [
        Arc::new(AdamW::default()),
        Arc::new(Lion::default()),
        Arc::new(momentum),
        Arc::new(Adagrad::default()),
    ];
    println!("{} Mi elements, {threads} threads", elements >> 20);
    println!("| optimizer | masters | states | bytes | update | the same bytes | ratio |");
    println!("|---|---|---|---|---|---|---|");
    for optimizer in optimizers {
        for states in [States::F32, States::Bf16, States::EightBit] {
            for masters in [Masters::F32, Masters::Bf16, Masters::Split] {
                let stored = StoredOptimizer::new(optimizer.clone(), Formats { masters, states }, 1)?;
                compare(&stored, elements, threads)?;
            }
        }
    }
    Ok(())
}

/// The streams of a parameter and its gradient.
struct Runs {
    streams: Vec<Vec<u32>>,
    gradient: Vec<f32>,
}

impl Runs {
    fn new(stored: &StoredOptimizer, elements: usize) -> Self {
        let words = stored.streams().iter().map(|stream| stream.format.bytes(elements).div_ceil(4));
        let streams = words.enumerate().map(|(number, words)| vec![0; words + number * STAGGER_WORDS]);
        let gradient = (0..elements as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) as i32) as f32 * 1e-10);
        Self { streams: streams.collect(), gradient: gradient.collect() }
    }

    fn words(&mut self) -> Vec<&mut [u32]> {
        let streams = self.streams.iter_mut().enumerate();
        streams.map(|(number, words)| &mut words[number * STAGGER_WORDS..]).collect()
    }
}

fn compare(stored: &StoredOptimizer, elements: usize, threads: usize) -> Result<(), Error> {
    let pool = Pool::new(threads)?;
    let mut runs = Runs::new(stored, elements);
    // A copy for the plain loop, so that states stay what an optimizer makes them.
    let mut plain = Runs::new(stored, elements);
    let (mut ours, mut reference) = (vec![], vec![]);
    // The first round warms both up.
    for round in 0..=ROUNDS {
        let started = Instant::now();
        update(stored, &pool, &mut runs, 1 + round as u64)?;
        let middle = Instant::now();
        move_bytes(&mut plain, elements, threads);
        let end = Instant::now();
        if round > 0 {
            ours.push((middle - started).as_secs_f64());
            reference.push((end - middle).as_secs_f64());
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (ours, reference) = (median(ours), median(reference));
    let streams: usize = stored.streams().iter().map(|stream| 2 * stream.format.bytes(1024)).sum();
    let (name, formats) = (stored.optimizer().name(), stored.formats());
    println!(
        "| {name} | {:?} | {:?} | {:.1} | {:.1} ms | {:.1} ms | {:.2} |",
        formats.masters,
        formats.states,
        streams as f64 / 1024.0 + 4.0,
        1e3 * ours,
        1e3 * reference,
        reference / ours
    );
    Ok(())
}

fn update(stored: &StoredOptimizer, pool: &Pool, runs: &mut Runs, number: u64) -> Result<(), Error> {
    let gradient = std::mem::take(&mut runs.gradient);
    let mut streams: Vec<&mut [u8]> = runs.words().into_iter().map(bytemuck::cast_slice_mut).collect();
    let piece = Piece {
        shape: &[gradient.len()],
        group: 1,
        first_element: 0,
        streams: &mut streams,
        gradient: Gradient::F32(&gradient),
        copy: None,
        scratch: &mut [],
    };
    let step = Step { number, learning_rate: 1e-3, weight_decay: 0.01, gradient_scale: 1.0 };
    let updated = stored.update(pool, &step, piece);
    runs.gradient = gradient;
    updated
}

/// A chunk of every stream, and of the gradient.
type Task<'a> = (Vec<&'a mut [u32]>, &'a [f32]);

/// Adds a word of the gradient to each word of each stream.
fn move_bytes(runs: &mut Runs, elements: usize, threads: usize) {
    let gradient = std::mem::take(&mut runs.gradient);
    let chunks = elements.div_ceil(CHUNK_ELEMENTS);
    let mut streams: Vec<_> = runs
        .words()
        .into_iter()
        .map(|words| {
            let chunk = words.len().div_ceil(chunks);
            words.chunks_mut(chunk)
        })
        .collect();
    let mut tasks: Vec<Vec<Task<'_>>> = (0..threads).map(|_| vec![]).collect();
    let share = chunks.div_ceil(threads);
    for (number, gradient) in gradient.chunks(CHUNK_ELEMENTS).enumerate() {
        let parts = streams.iter_mut().filter_map(Iterator::next).collect();
        tasks[number / share].push((parts, gradient));
    }
    std::thread::scope(|scope| {
        for tasks in tasks {
            scope.spawn(move || {
                for (parts, gradient) in tasks {
                    add(parts, gradient);
                }
            });
        }
    });
    runs.gradient = gradient;
}

/// All streams of a block of 1024 elements, then the next block, as an optimizer goes.
fn add(parts: Vec<&mut [u32]>, gradient: &[f32]) {
    let blocks = gradient.len().div_ceil(1024).max(1);
    let mut parts: Vec<_> = parts
        .into_iter()
        .map(|part| {
            let block = part.len().div_ceil(blocks);
            part.chunks_mut(block)
        })
        .collect();
    for gradient in gradient.chunks(1024) {
        for words in parts.iter_mut().filter_map(Iterator::next) {
            for (word, &value) in words.iter_mut().zip(gradient) {
                *word = word.wrapping_add(value.to_bits());
            }
        }
        std::hint::black_box(gradient.iter().fold(0u32, |sum, value| sum ^ value.to_bits()));
    }
}
