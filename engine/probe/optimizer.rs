//! The optimizer's loop over memory of its own.

use crate::error::{Error, Result};
use crate::schedule::buffer_plan::STAGGER_BYTES;
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::{AdamWState, AdamWStep, adamw};
use ferrozero_offload::{Arena, Budget, Lease, Tier, padded_bytes};
use std::time::Instant;

/// Bytes that one update moves for each parameter: four runs are read and three written.
pub const BYTES_PER_PARAMETER: usize = 7 * 4;

/// The optimizer's numbers in step `step` of a measurement.
pub fn adamw_step(step: u64) -> AdamWStep {
    AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step,
        gradient_scale: 1.0,
    }
}

/// The optimizer's threads.
pub fn pool(threads: usize) -> Result<Pool> {
    Pool::new(threads).map_err(Error::Kernel)
}

/// Master parameters, moments and gradient, in memory as the engine has it.
pub struct Runs {
    /// The four runs.
    pub leases: [Lease; 4],
    /// Elements of each.
    pub elements: usize,
}

impl Runs {
    /// Memory for `elements` parameters.
    ///
    /// # Errors
    /// [`Error::Offload`] without so much memory.
    pub fn new(elements: usize) -> Result<Self> {
        let bytes = 4 * elements + STAGGER_BYTES;
        let budget = Budget::new(Tier::Host, 4 * padded_bytes(bytes) as u64);
        let arena = Arena::new(&budget, budget.limit_bytes() as usize)?;
        let lease = |value: f32| -> Result<Lease> {
            let mut lease = arena.lease(bytes)?;
            lease.as_f32_mut().fill(value);
            Ok(lease)
        };
        let leases = [lease(0.5)?, lease(0.0)?, lease(0.0)?, lease(0.01)?];
        Ok(Self { leases, elements })
    }

    /// Makes one update; answers the seconds that it took.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn update(&mut self, pool: &Pool, step: u64) -> Result<f64> {
        let [master, first_moment, second_moment, gradient] = &mut self.leases;
        let state = AdamWState {
            master: &mut master.as_f32_mut()[..self.elements],
            first_moment: &mut first_moment.as_f32_mut()[..self.elements],
            second_moment: &mut second_moment.as_f32_mut()[..self.elements],
        };
        let started = Instant::now();
        adamw(pool, &adamw_step(step), state, &gradient.as_f32()[..self.elements], None)
            .map_err(Error::Kernel)?;
        Ok(started.elapsed().as_secs_f64())
    }
}
