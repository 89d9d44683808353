//! How many thread blocks a launch has, and how much memory an operation takes beside its results. Kernels
//! take turn after turn where there is more work than blocks, and operations make piece after piece of what
//! is larger than that memory.

use std::cell::Cell;

/// Elements that an operation has beside its results at once: probabilities of an attention, logits of a
/// head. 64 MiB in f32.
const SCRATCH_ELEMENTS: usize = 16 * 1024 * 1024;

/// Limits of a thread, for tests: they show what happens on inputs larger than a grid or than scratch memory
/// on inputs that are much smaller.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Thread blocks that a launch has at most.
    pub blocks: usize,
    /// Elements that an operation has beside its results at once.
    pub scratch_elements: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { blocks: usize::MAX, scratch_elements: SCRATCH_ELEMENTS }
    }
}

/// Launches whose number of blocks depends on how much work they have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Launches {
    /// All of them that had work.
    pub count: usize,
    /// Those that had more work than blocks, so that blocks took several turns.
    pub in_turns: usize,
}

thread_local! {
    static LIMITS: Cell<Option<(Limits, Launches)>> = const { Cell::new(None) };
}

/// Runs `run` with limits for what this thread launches, and counts its launches.
pub fn with_limits<T>(limits: Limits, run: impl FnOnce() -> T) -> (T, Launches) {
    LIMITS.set(Some((limits, Launches::default())));
    let result = run();
    let launches = LIMITS.take().map_or(Launches::default(), |(_, launches)| launches);
    (result, launches)
}

/// The blocks of a launch that has work for `wanted`, where the device is to get `most`.
pub(crate) fn blocks(wanted: usize, most: usize) -> u32 {
    let mut most = most;
    if let Some((limits, mut launches)) = LIMITS.get() {
        launches.count += usize::from(wanted > 0);
        launches.in_turns += usize::from(wanted > limits.blocks);
        LIMITS.set(Some((limits, launches)));
        most = most.min(limits.blocks);
    }
    wanted.min(most) as u32
}

/// Elements that an operation may have beside its results at once.
pub(crate) fn scratch_elements() -> usize {
    LIMITS.get().map_or(SCRATCH_ELEMENTS, |(limits, _)| limits.scratch_elements)
}
