//! What a plan has to know of a model: a rehearsal measures it, and for a model that need not exist it is
//! estimated.

use crate::planner::simulator::Compute;
use crate::schedule::operation::Call;

/// Memory of a call whose graph is kept from its forward to its backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptGraph {
    /// Bytes from the one to the other.
    pub bytes: u64,
    /// Bytes while one of the two runs, beyond those of a backward that computes again.
    pub beyond_bytes: u64,
}

/// What the rehearsal found out.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Segments in the order in which they ran.
    pub calls: Vec<Call>,
    /// Peak of what the model's own tensors take, in bytes; none where memory is not counted.
    pub working_bytes: Option<u64>,
    /// The most of them, in bytes, that a micro-batch holds between two segments: what each one more takes
    /// that runs vertically.
    pub parked_bytes: u64,
    /// What each call takes where its graph is kept, where memory is counted.
    pub kept: Vec<KeptGraph>,
    /// How long computing takes.
    pub compute: Compute,
}
