//! Adafactor (Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", arXiv
//! 1804.04235), with the numbers of PyTorch's `torch.optim.Adafactor`.

use super::matrix::{Matrices, task_elements, task_rows};
use super::{Optimizer, Part, Scope, State, Step, Tools, Values, above_zero, check, sums};
use crate::Error;
use crate::simd::{Path, on_paths};

/// Adafactor: the second moment of a matrix is the product of a row and a column. Steps are relative to the
/// size of the weights, and the learning rate is an upper bound that falls with the root of the step's
/// number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adafactor {
    /// The second moment keeps 1 - step^this of itself; below 0.
    pub beta2_decay: f64,
    /// Least second moment is the square of this.
    pub epsilon: f64,
    /// Least size of weights that steps are relative to.
    pub least_weight: f64,
    /// Largest root mean square of a step before the learning rate.
    pub clip: f64,
}

impl Default for Adafactor {
    fn default() -> Self {
        Self { beta2_decay: -0.8, epsilon: f64::from(f32::EPSILON), least_weight: 1e-3, clip: 1.0 }
    }
}

/// Columns that are summed by one task.
const TASK_COLUMNS: usize = 256;

/// One element's numbers in a step.
#[derive(Clone, Copy)]
pub(super) struct Numbers {
    /// How much of the second moment is new.
    part: f32,
    least: f32,
}

impl Optimizer for Adafactor {
    fn name(&self) -> &'static str {
        "Adafactor"
    }

    fn validate(&self) -> Result<(), Error> {
        let falls = self.beta2_decay < 0.0 && self.beta2_decay.is_finite();
        check("the decay of beta2", self.beta2_decay, falls, "a finite number below 0")?;
        above_zero("epsilon", self.epsilon * self.epsilon)?;
        above_zero("the least weight", self.least_weight)?;
        above_zero("the clip of a step", self.clip)
    }

    fn states(&self) -> Vec<State> {
        vec![
            State { name: "row moments", values: Values::Few },
            State { name: "column moments", values: Values::Few },
            State { name: "second moment", values: Values::NonNegative },
        ]
    }

    fn state_elements(&self, state: usize, shape: &[usize]) -> usize {
        match (state, Matrices::of(shape)) {
            (0, Some(matrices)) => matrices.count * matrices.rows,
            (1, Some(matrices)) => matrices.count * matrices.columns,
            (2, None) => shape.iter().product(),
            _ => 0,
        }
    }

    fn scope(&self, _shape: &[usize]) -> Scope {
        Scope::Parameter
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [row_moments, column_moments, moment] = part.states else { return };
        if part.parameters.is_empty() {
            return;
        }
        let elements = part.parameters.len() as f64;
        let number = step.number as f64;
        let new = number.powf(self.beta2_decay);
        let numbers = Numbers { part: new as f32, least: (self.epsilon * self.epsilon) as f32 };
        let weight_size = (sums::squares(tools, part.parameters) / elements).sqrt();
        let rate = weight_size.max(self.least_weight) * step.learning_rate.min(1.0 / number.sqrt());
        let estimate = match Matrices::of(part.shape) {
            Some(matrices) => {
                let sizes = (matrices.rows.max(1), matrices.columns.max(1));
                let gradients = part.gradient.chunks(sizes.0 * sizes.1);
                let moments = row_moments.chunks_mut(sizes.0).zip(column_moments.chunks_mut(sizes.1));
                for (gradient, (rows, columns)) in gradients.zip(moments) {
                    average_rows(tools, numbers.part, gradient, rows, sizes.1);
                    average_columns(tools, numbers.part, gradient, columns, sizes.0);
                }
                Estimate::factored(row_moments, column_moments, sizes, self.epsilon)
            }
            None => {
                let task = task_elements(1);
                let chunks = part.gradient.chunks(task).zip(moment.chunks_mut(task)).collect();
                tools.pool.map(chunks, |(gradient, moment): (&[f32], &mut [f32])| {
                    average_squares(tools.path, numbers, gradient, moment);
                });
                Estimate { rows: vec![1.0], columns: moment, width: moment.len(), height: 1 }
            }
        };
        let task = task_rows(estimate.width);
        let chunks = part.gradient.chunks(task * estimate.width).enumerate().collect();
        let squares = tools.pool.map(chunks, |(chunk, gradient): (usize, &[f32])| {
            let rows = estimate.rows_from(chunk * task).zip(gradient.chunks(estimate.width));
            rows.map(|((row, columns), g)| size(tools.path, numbers, row, columns, g)).sum::<f64>()
        });
        let size = (squares.into_iter().sum::<f64>() / elements).sqrt();
        let rate = (rate / (size / self.clip).max(1.0)) as f32;
        let chunks = part.parameters.chunks_mut(task * estimate.width);
        let chunks = chunks.zip(part.gradient.chunks(task * estimate.width)).enumerate().collect();
        let keep = step.keep();
        tools.pool.map(chunks, |(chunk, (weights, gradient)): (usize, (&mut [f32], &[f32]))| {
            let runs = weights.chunks_mut(estimate.width).zip(gradient.chunks(estimate.width));
            for ((row, columns), (weights, gradient)) in estimate.rows_from(chunk * task).zip(runs) {
                apply(tools.path, numbers, [row, keep, rate], columns, weights, gradient);
            }
        });
    }
}

/// The estimated second moments: of an element its row's factor times its column's.
struct Estimate<'a> {
    rows: Vec<f32>,
    columns: &'a [f32],
    width: usize,
    /// Rows of a matrix.
    height: usize,
}

impl<'a> Estimate<'a> {
    /// Of each matrix, its row moments over their mean, and its column moments.
    fn factored(rows: &[f32], columns: &'a [f32], (height, width): (usize, usize), epsilon: f64) -> Self {
        let mut factors = Vec::with_capacity(rows.len());
        for rows in rows.chunks(height) {
            let mean = rows.iter().map(|&row| f64::from(row)).sum::<f64>() / height as f64;
            factors.extend(rows.iter().map(|&row| (f64::from(row) / mean.max(epsilon)) as f32));
        }
        Self { rows: factors, columns, width, height }
    }

    /// Factor and columns of each row from one on.
    fn rows_from(&self, first: usize) -> impl Iterator<Item = (f32, &[f32])> {
        let columns = move |row: usize| &self.columns[row / self.height * self.width..][..self.width];
        (first..self.rows.len()).map(move |row| (self.rows[row], columns(row)))
    }
}

/// Moves the mean square of each row towards the gradient's.
fn average_rows(tools: Tools<'_>, part: f32, gradient: &[f32], moments: &mut [f32], columns: usize) {
    let rows = task_rows(columns);
    let tasks = gradient.chunks(rows * columns).zip(moments.chunks_mut(rows)).collect();
    tools.pool.map(tasks, |(gradient, moments): (&[f32], &mut [f32])| {
        for (row, moment) in gradient.chunks(columns).zip(moments) {
            let mean = sums::dot(tools.path, row, row) / columns as f64;
            *moment += (mean as f32 - *moment) * part;
        }
    });
}

/// Moves the mean square of each column towards the gradient's.
fn average_columns(tools: Tools<'_>, part: f32, gradient: &[f32], moments: &mut [f32], rows: usize) {
    let columns = moments.len();
    let tasks = moments.chunks_mut(TASK_COLUMNS).enumerate().collect();
    tools.pool.map(tasks, |(task, moments): (usize, &mut [f32])| {
        let mut squares = [0f64; TASK_COLUMNS];
        let squares = &mut squares[..moments.len()];
        for row in gradient.chunks(columns) {
            add_squares(tools.path, &row[task * TASK_COLUMNS..][..moments.len()], squares);
        }
        for (moment, square) in moments.iter_mut().zip(squares) {
            *moment += ((*square / rows as f64) as f32 - *moment) * part;
        }
    });
}

on_paths! {
    fn add_squares(row: &[f32], sums: &mut [f64]) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value) * f64::from(value);
        }
    }

    fn average_squares(numbers: Numbers, gradient: &[f32], moment: &mut [f32]) {
        for (&g, moment) in gradient.iter().zip(moment) {
            *moment += (g * g - *moment) * numbers.part;
        }
    }

    fn step_of_row(numbers: Numbers, row: f32, columns: &[f32], gradient: &[f32], out: &mut [f32]) {
        for ((&column, &g), out) in columns.iter().zip(gradient).zip(out) {
            *out = g / (row * column).max(numbers.least).sqrt();
        }
    }

    fn apply(numbers: Numbers, factors: [f32; 3], columns: &[f32], weights: &mut [f32], gradient: &[f32]) {
        let [row, keep, rate] = factors;
        for ((&column, &g), weight) in columns.iter().zip(gradient).zip(weights) {
            *weight = *weight * keep - g / (row * column).max(numbers.least).sqrt() * rate;
        }
    }
}

/// The sum of squares of a row's step.
fn size(path: Path, numbers: Numbers, row: f32, columns: &[f32], gradient: &[f32]) -> f64 {
    let mut out = [0.0; 1024];
    let runs = columns.chunks(out.len()).zip(gradient.chunks(out.len()));
    let block = |(columns, gradient): (&[f32], &[f32])| {
        let out = &mut out[..gradient.len()];
        step_of_row(path, numbers, row, columns, gradient, out);
        sums::dot(path, out, out)
    };
    runs.map(block).sum()
}
