//! AdamP (Heo et al., "AdamP: slowing down the slowdown for momentum optimizers on scale-invariant weights",
//! arXiv 2006.08217).

use super::matrix::{task_elements, task_rows};
use super::{Optimizer, Part, Scope, State, Step, Tools, adam, at_least_zero, sums};
use crate::Error;
use crate::adamw::{AdamWState, Numbers, adamw_chunk};
use crate::simd::on_paths;

/// AdamP: AdamW whose step loses its radial part where gradients are all but orthogonal to the weights, as
/// they are where a normalisation follows. Weights are seen by output channel (the first dimension) first,
/// then as a whole. Vectors are AdamW's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamP {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment, and to norms.
    pub epsilon: f64,
    /// Largest cosine between gradient and weights, times the root of their number, of what counts as
    /// orthogonal.
    pub delta: f64,
    /// Part of the weight decay that remains there.
    pub decay_ratio: f64,
}

impl Default for AdamP {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, delta: 0.1, decay_ratio: 0.1 }
    }
}

/// What is known of a run of weights.
#[derive(Clone, Copy, Default)]
struct Sums {
    gradient_weight: f64,
    gradient: f64,
    weight: f64,
    direction_weight: f64,
}

impl Sums {
    fn add(self, other: Self) -> Self {
        Self {
            gradient_weight: self.gradient_weight + other.gradient_weight,
            gradient: self.gradient + other.gradient,
            weight: self.weight + other.weight,
            direction_weight: self.direction_weight + other.direction_weight,
        }
    }

    /// Of the angle between gradient and weights.
    fn cosine(&self, epsilon: f64) -> f64 {
        self.gradient_weight.abs() / (self.gradient.sqrt().max(epsilon) * self.weight.sqrt().max(epsilon))
    }

    /// What the weights are multiplied with to be the direction's part along them.
    fn along(&self, epsilon: f64) -> f64 {
        let norm = self.weight.sqrt() + epsilon;
        self.direction_weight / (norm * norm)
    }
}

impl Optimizer for AdamP {
    fn name(&self) -> &'static str {
        "AdamP"
    }

    fn validate(&self) -> Result<(), Error> {
        adam::validate(self.beta1, self.beta2, self.epsilon)?;
        at_least_zero("delta", self.delta)?;
        at_least_zero("the ratio of the decay", self.decay_ratio)
    }

    fn states(&self) -> Vec<State> {
        adam::moments()
    }

    fn scope(&self, shape: &[usize]) -> Scope {
        if shape.len() > 1 { Scope::Parameter } else { Scope::Elements }
    }

    fn scratch_elements(&self, shape: &[usize]) -> usize {
        shape.iter().product()
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [first_moment, second_moment] = part.states else { return };
        let (master, gradient) = (part.parameters, part.gradient);
        let mut numbers = adam::numbers(step, self.beta1, self.beta2, self.epsilon);
        let [channels, _, ..] = *part.shape else {
            let state = AdamWState { master, first_moment, second_moment };
            return adamw_chunk(tools.path, numbers, state, gradient);
        };
        if master.is_empty() {
            return;
        }
        let columns = master.len() / channels;
        let task = task_elements(columns);
        let moments = first_moment.chunks_mut(task).zip(second_moment.chunks_mut(task));
        let runs = master.chunks(task).zip(gradient.chunks(task)).zip(moments);
        let tasks = runs.zip(part.scratch.chunks_mut(task)).collect();
        let sums = tools.pool.map(tasks, |(((weight, gradient), (m, v)), direction)| {
            direct(tools.path, numbers, gradient, m, v, direction);
            let rows = weight.chunks(columns).zip(gradient.chunks(columns)).zip(direction.chunks(columns));
            let row = |((w, g), d): ((&[f32], &[f32]), &[f32])| Sums {
                gradient_weight: sums::dot(tools.path, g, w),
                gradient: sums::dot(tools.path, g, g),
                weight: sums::dot(tools.path, w, w),
                direction_weight: sums::dot(tools.path, d, w),
            };
            rows.map(row).collect::<Vec<_>>()
        });
        let rows: Vec<Sums> = sums.into_iter().flatten().collect();
        let along = self.along(&rows, columns);
        if along.is_some() {
            numbers.keep = (1.0 - step.learning_rate * step.weight_decay * self.decay_ratio) as f32;
        }
        let along = along.unwrap_or_else(|| vec![0.0; rows.len()]);
        let runs = master.chunks_mut(task).zip(part.scratch.chunks(task));
        let tasks = runs.zip(along.chunks(task_rows(columns))).collect();
        tools.pool.map(tasks, |((weight, direction), along): ((&mut [f32], &[f32]), &[f32])| {
            let rows = weight.chunks_mut(columns).zip(direction.chunks(columns)).zip(along);
            for ((weight, direction), &along) in rows {
                apply(tools.path, numbers, along, weight, direction);
            }
        });
    }
}

impl AdamP {
    /// For each row, the factor on its weights that is taken from the direction; none where no view of the
    /// weights is orthogonal to their gradient.
    fn along(&self, rows: &[Sums], columns: usize) -> Option<Vec<f32>> {
        let largest = rows.iter().map(|row| row.cosine(self.epsilon)).fold(0.0, f64::max);
        if largest < self.delta / (columns as f64).sqrt() {
            return Some(rows.iter().map(|row| row.along(self.epsilon) as f32).collect());
        }
        let whole = rows.iter().fold(Sums::default(), |sum, &row| sum.add(row));
        let elements = (rows.len() * columns) as f64;
        let orthogonal = whole.cosine(self.epsilon) < self.delta / elements.sqrt();
        orthogonal.then(|| vec![whole.along(self.epsilon) as f32; rows.len()])
    }
}

on_paths! {
    /// Updates the moments; answers the direction that AdamW would take.
    fn direct(
        numbers: Numbers,
        gradient: &[f32],
        first_moment: &mut [f32],
        second_moment: &mut [f32],
        direction: &mut [f32],
    ) {
        let moments = first_moment.iter_mut().zip(second_moment);
        for ((&g, (first, second)), direction) in gradient.iter().zip(moments).zip(direction) {
            (*first, *second) = numbers.moments(*first, *second, g);
            *direction = numbers.direction(*first, *second);
        }
    }

    /// Takes a step without its part along the weights.
    fn apply(numbers: Numbers, along: f32, weights: &mut [f32], direction: &[f32]) {
        for (weight, &direction) in weights.iter_mut().zip(direction) {
            let direction = direction - *weight * along;
            *weight = *weight * numbers.keep - direction * numbers.learning_rate;
        }
    }
}
