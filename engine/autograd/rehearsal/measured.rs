//! What the rehearsal measures of runs of one kind of segment.

use crate::statistics::median;

/// One computing of the loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pass {
    /// Finds code cold, and measures memory: nothing that is freed is kept.
    #[default]
    WarmUp,
    /// Measures time, with freed tensors kept as in a run.
    Timed,
}

/// What runs of one kind of segment took, in one direction.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Most bytes beyond the parameters.
    pub bytes: u64,
    /// Seconds of each run of the warm-up, and then of each timed one.
    pub seconds: Vec<f64>,
}

impl Measured {
    /// Timed runs that are worth their time: the first finds memory cold.
    const LEAST_RUNS: usize = 2;
    /// Short runs are worth more of them, because their time varies more.
    const ENOUGH_S: f64 = 0.3;
    const MOST_RUNS: usize = 8;

    /// Whether a pass need not run it again.
    pub fn is_known(&self, pass: Pass) -> bool {
        let runs = self.seconds.len();
        match pass {
            Pass::WarmUp => runs >= 1,
            Pass::Timed => runs >= Self::LEAST_RUNS && self.is_enough(),
        }
    }

    /// Whether its time is known.
    pub fn is_enough(&self) -> bool {
        self.seconds.len() >= Self::MOST_RUNS || self.seconds.iter().sum::<f64>() >= Self::ENOUGH_S
    }

    /// One more run.
    pub fn add(&mut self, bytes: u64, seconds: f64) {
        self.bytes = self.bytes.max(bytes);
        self.seconds.push(seconds);
    }

    /// The median of the warm runs.
    pub fn typical_s(&self) -> f64 {
        match self.seconds.as_slice() {
            [] => 0.0,
            [cold] => *cold,
            [_, warm @ ..] => median(warm.to_vec()),
        }
    }
}
