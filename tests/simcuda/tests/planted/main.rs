//! Programs with a fault that the driver must find, each beside its correct twin, which must pass in every
//! mode.

mod device;

use device::{Device, Result, on_device};
use simcuda::{Configuration, Mode, Order};

const COUNT: usize = 100;
const ILLEGAL_ADDRESS: i32 = 700;

const EAGER: Configuration = Configuration { mode: Mode::Eager, order: Order::Forward };
const LATE: Configuration = Configuration { mode: Mode::Late, order: Order::Forward };
const REVERSE: Configuration = Configuration { mode: Mode::Eager, order: Order::Reverse };

fn random(seed: u64) -> Configuration {
    Configuration { mode: Mode::Random { seed }, order: Order::Forward }
}

fn all() -> impl Iterator<Item = Configuration> {
    let late_reverse = Configuration { order: Order::Reverse, ..LATE };
    [EAGER, LATE, REVERSE, late_reverse].into_iter().chain((1..=8).map(random))
}

/// A program and what it answers.
type Program = fn(&Device, correct: bool) -> Result<Vec<f32>>;

/// The correct twin answers this in every mode, and the driver has nothing to report.
fn passes_everywhere(program: Program, expected: &[f32]) {
    for configuration in all() {
        let (result, reports) = on_device(configuration, |device| program(device, true));
        assert_eq!(result.as_deref(), Ok(expected), "{configuration:?}");
        assert!(reports.is_empty(), "{configuration:?}: {reports:?}");
    }
}

/// Two accesses of the faulty program have no order between them, which every mode reports.
fn races_everywhere(program: Program) {
    for configuration in all() {
        let (_, reports) = on_device(configuration, |device| program(device, false));
        let is_found = reports.iter().any(|report| report.contains("RACE"));
        assert!(is_found, "{configuration:?}: {reports:?}");
    }
}

/// The faulty program ends with an illegal access in every mode, in these words.
fn is_illegal_everywhere(program: Program, words: &str) {
    for configuration in all() {
        let (result, reports) = on_device(configuration, |device| program(device, false));
        assert_eq!(result, Err(ILLEGAL_ADDRESS), "{configuration:?}");
        assert!(reports.iter().any(|report| report.contains(words)), "{configuration:?}: {reports:?}");
    }
}

/// What the faulty program answers in one mode.
fn answers(program: Program, configuration: Configuration) -> Vec<f32> {
    on_device(configuration, |device| program(device, false)).0.unwrap()
}

/// Uploads zeros on one stream and adds one on another.
fn wait_between_streams(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let (copies, computes) = (device.stream()?, device.stream()?);
    let mut host = device.pinned(COUNT)?;
    host.set(0.0);
    let memory = device.allocate(COUNT, copies)?;
    device.upload(memory, &host, copies)?;
    if correct {
        device.join(computes, copies)?;
    }
    device.add_one(memory, memory, COUNT as u32, computes)?;
    device.download(&mut host, memory, computes)?;
    device.wait(computes)?;
    Ok(host.get())
}

#[test]
fn a_wait_between_streams_that_is_missing() {
    passes_everywhere(wait_between_streams, &[1.0; COUNT]);
    races_everywhere(wait_between_streams);
    // Nothing was waited for, so nothing was uploaded.
    assert!(answers(wait_between_streams, LATE).iter().all(|number| number.is_nan()));
}

/// Records an event before the work that it is meant to be of.
fn event_of_the_work(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let (first, second) = (device.stream()?, device.stream()?);
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, first)?;
    let too_early = device.record(first)?;
    device.zero(memory, COUNT, first)?;
    let event = if correct { device.record(first)? } else { too_early };
    device.wait_for(event, second)?;
    device.download(&mut host, memory, second)?;
    device.wait(second)?;
    Ok(host.get())
}

#[test]
fn an_event_that_is_recorded_too_early() {
    passes_everywhere(event_of_the_work, &[0.0; COUNT]);
    races_everywhere(event_of_the_work);
}

/// Looks at the result of a copy before it has waited for it.
fn wait_of_the_host(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let stream = device.stream()?;
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, stream)?;
    device.zero(memory, COUNT, stream)?;
    device.download(&mut host, memory, stream)?;
    if correct {
        device.wait(stream)?;
    }
    Ok(host.get())
}

#[test]
fn a_wait_of_the_host_that_is_missing() {
    passes_everywhere(wait_of_the_host, &[0.0; COUNT]);
    assert!(answers(wait_of_the_host, LATE).iter().all(|number| number.is_nan()));
    // Whoever runs everything at once cannot see it.
    assert_eq!(answers(wait_of_the_host, EAGER), [0.0; COUNT]);
}

/// Fills the buffer of a copy anew before the copy is made.
fn buffer_of_the_host(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let stream = device.stream()?;
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, stream)?;
    host.set(1.0);
    device.upload(memory, &host, stream)?;
    if correct {
        device.wait(stream)?;
    }
    host.set(2.0);
    device.download(&mut host, memory, stream)?;
    device.wait(stream)?;
    Ok(host.get())
}

#[test]
fn a_buffer_of_the_host_that_is_used_again_too_early() {
    passes_everywhere(buffer_of_the_host, &[1.0; COUNT]);
    assert_eq!(answers(buffer_of_the_host, LATE), [2.0; COUNT]);
}

/// Frees memory on another stream than the one that still uses it.
fn free_after_use(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let (uses, frees) = (device.stream()?, device.stream()?);
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, uses)?;
    device.zero(memory, COUNT, uses)?;
    device.download(&mut host, memory, uses)?;
    if correct {
        device.join(frees, uses)?;
    }
    device.free(memory, frees)?;
    device.wait(frees)?;
    device.wait(uses)?;
    Ok(host.get())
}

#[test]
fn memory_that_is_freed_too_early() {
    passes_everywhere(free_after_use, &[0.0; COUNT]);
    for configuration in all() {
        let (_, reports) = on_device(configuration, |device| free_after_use(device, false));
        // Where the free comes first there is nothing left to race with.
        let is_found = reports.iter().any(|report| report.contains("RACE") || report.contains("was freed"));
        assert!(is_found, "{configuration:?}: {reports:?}");
    }
    let (result, _) = on_device(LATE, |device| free_after_use(device, false));
    assert_eq!(result, Err(ILLEGAL_ADDRESS));
}

/// Writes the same memory on two streams.
fn two_writers(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let (first, second) = (device.stream()?, device.stream()?);
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, first)?;
    device.join(second, first)?;
    device.zero(memory, COUNT, first)?;
    if correct {
        device.join(second, first)?;
    }
    // The last quarter of it.
    let quarter = memory + (COUNT / 4 * 3 * device::FLOAT_BYTES) as u64;
    device.zero(quarter, COUNT / 4, second)?;
    device.join(first, second)?;
    device.download(&mut host, memory, first)?;
    device.wait(first)?;
    Ok(host.get())
}

#[test]
fn two_streams_that_write_the_same_memory() {
    passes_everywhere(two_writers, &[0.0; COUNT]);
    races_everywhere(two_writers);
}

/// Copies on one stream what another one changes twice.
fn between_two_changes(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let (changes, copies) = (device.stream()?, device.stream()?);
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, changes)?;
    device.zero(memory, COUNT, changes)?;
    device.wait(changes)?;
    device.add_one(memory, memory, COUNT as u32, changes)?;
    device.add_one(memory, memory, COUNT as u32, changes)?;
    if correct {
        device.join(copies, changes)?;
    }
    device.download(&mut host, memory, copies)?;
    device.wait(copies)?;
    Ok(host.get())
}

#[test]
fn an_order_that_neither_extreme_has() {
    passes_everywhere(between_two_changes, &[2.0; COUNT]);
    races_everywhere(between_two_changes);
    assert_eq!(answers(between_two_changes, EAGER), [2.0; COUNT]);
    assert_eq!(answers(between_two_changes, LATE), [0.0; COUNT]);
    let seed = (1..=20).find(|seed| answers(between_two_changes, random(*seed)) == [1.0; COUNT]);
    assert!(seed.is_some(), "no random order runs one change of two");
}

/// Runs a kernel that fills memory.
fn filled(device: &Device, name: &str, grid: u32, block: u32) -> Result<Vec<f32>> {
    let stream = device.stream()?;
    let mut host = device.pinned((grid * block) as usize)?;
    let memory = device.allocate((grid * block) as usize, stream)?;
    device.fill(name, memory, grid, block, stream)?;
    device.download(&mut host, memory, stream)?;
    device.wait(stream)?;
    Ok(host.get())
}

fn blocks(device: &Device, correct: bool) -> Result<Vec<f32>> {
    filled(device, if correct { "alone" } else { "after_the_block_before" }, 8, 1)
}

#[test]
fn a_kernel_that_depends_on_the_order_of_blocks() {
    let expected = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    passes_everywhere(blocks, &expected);
    assert_eq!(answers(blocks, EAGER), expected);
    assert!(answers(blocks, REVERSE)[1..].iter().all(|number| number.is_nan()));
}

fn warps(device: &Device, correct: bool) -> Result<Vec<f32>> {
    filled(device, if correct { "with_barrier" } else { "without_barrier" }, 1, 64)
}

#[test]
fn a_kernel_whose_barrier_is_missing() {
    let numbers: Vec<f32> = (0..64u8).map(f32::from).collect();
    passes_everywhere(warps, &[&numbers[32..], &numbers[..32]].concat());
    let (first_warp_first, last_warp_first) = (answers(warps, EAGER), answers(warps, REVERSE));
    assert_eq!(first_warp_first[32..], numbers[..32]);
    assert_ne!(last_warp_first[32..], numbers[..32]);
}

/// Adds one to memory that nobody has written.
fn fresh_memory(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let stream = device.stream()?;
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, stream)?;
    if correct {
        device.zero(memory, COUNT, stream)?;
    }
    device.add_one(memory, memory, COUNT as u32, stream)?;
    device.download(&mut host, memory, stream)?;
    device.wait(stream)?;
    Ok(host.get())
}

#[test]
fn fresh_memory_that_is_read() {
    passes_everywhere(fresh_memory, &[1.0; COUNT]);
    for configuration in all() {
        assert!(
            answers(fresh_memory, configuration).iter().all(|number| number.is_nan()),
            "{configuration:?}"
        );
    }
}

/// Writes one element more than there is.
fn bounds(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let stream = device.stream()?;
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, stream)?;
    device.zero(memory, COUNT, stream)?;
    let count = COUNT + usize::from(!correct);
    device.add_one(memory, memory, count as u32, stream)?;
    device.download(&mut host, memory, stream)?;
    device.wait(stream)?;
    Ok(host.get())
}

#[test]
fn an_access_out_of_bounds() {
    passes_everywhere(bounds, &[1.0; COUNT]);
    is_illegal_everywhere(bounds, "400 bytes into allocation 0 of 400 bytes");
}

/// Gives a kernel the address of the host's memory.
fn memory_of_the_device(device: &Device, correct: bool) -> Result<Vec<f32>> {
    let stream = device.stream()?;
    let mut host = device.pinned(COUNT)?;
    let memory = device.allocate(COUNT, stream)?;
    device.zero(memory, COUNT, stream)?;
    let wrong = [0f32; COUNT];
    let from = if correct { memory } else { wrong.as_ptr() as u64 };
    device.add_one(memory, from, COUNT as u32, stream)?;
    device.download(&mut host, memory, stream)?;
    device.wait(stream)?;
    Ok(host.get())
}

#[test]
fn memory_of_the_host_that_a_kernel_is_given() {
    passes_everywhere(memory_of_the_device, &[1.0; COUNT]);
    is_illegal_everywhere(memory_of_the_device, "no address of the device");
}

/// Multiplies matrices whose sums depend on their order.
fn product(device: &Device, _: bool) -> Result<Vec<f32>> {
    const SIZE: usize = 37;
    let stream = device.stream()?;
    let mut host = device.pinned(SIZE * SIZE)?;
    let [a, b, c] = [0, 1, 2].map(|_| device.allocate(SIZE * SIZE, stream));
    let (a, b, c) = (a?, b?, c?);
    for (memory, value) in [(a, 0.1), (b, 1e7 / 3.0)] {
        host.set(value);
        device.upload(memory, &host, stream)?;
        device.wait(stream)?;
    }
    device.add_one(a, a, (SIZE * SIZE / 2) as u32, stream)?;
    device.multiply(c, a, b, SIZE as i32, stream)?;
    device.download(&mut host, c, stream)?;
    device.wait(stream)?;
    Ok(host.get())
}

#[test]
fn products_have_the_same_bits_in_every_mode() {
    let (expected, _) = on_device(EAGER, |device| product(device, true));
    passes_everywhere(product, &expected.unwrap());
}

#[test]
fn a_failure_stays() {
    let (result, _) = on_device(EAGER, |device| {
        assert_eq!(bounds(device, false), Err(ILLEGAL_ADDRESS));
        bounds(device, true)
    });
    assert_eq!(result, Err(ILLEGAL_ADDRESS));
}
