//! Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is
//! scalable for LLM training", arXiv 2502.16982).

use super::{AdamW, Optimizer, Part, Scope, State, Step, Tools, Values, above_zero, adam, below_one, sums};
use crate::Error;
use crate::ops::matrix::{Matrix, MatrixMut, Threads, multiply};
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::on_paths;

/// Muon: the momentum of a matrix is made all but orthogonal by five steps of Newton and Schulz. What is no
/// matrix is AdamW's; so should embeddings and output layers be, which is the caller's choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Whether to look ahead.
    pub nesterov: bool,
    /// Least norm that a matrix is divided by.
    pub epsilon: f64,
    /// What steps are multiplied with by the matrix's shape.
    pub adjustment: Adjustment,
    /// For what is no matrix.
    pub adamw: AdamW,
}

/// What the steps of a matrix of `rows` × `columns` are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Adjustment {
    /// √max(1, rows / columns), as Muon was proposed.
    #[default]
    Original,
    /// 0.2 · √max(rows, columns), so that steps are as large as AdamW's and one learning rate serves both.
    MatchAdamW,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            epsilon: 1e-7,
            adjustment: Adjustment::default(),
            adamw: AdamW::default(),
        }
    }
}

/// The polynomial of a step, and how many steps.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];
const STEPS: usize = 5;
/// Rows of a product that one task makes. It is fixed, so that sums do not depend on the number of threads.
const TASK_ROWS: usize = 64;

fn is_matrix(shape: &[usize]) -> bool {
    shape.len() == 2
}

impl Optimizer for Muon {
    fn name(&self) -> &'static str {
        "Muon"
    }

    fn validate(&self) -> Result<(), Error> {
        below_one("momentum", self.momentum)?;
        above_zero("epsilon", self.epsilon)?;
        self.adamw.validate()
    }

    fn states(&self) -> Vec<State> {
        let mut states = adam::moments();
        states[0] = State { name: "momentum", values: Values::Signed };
        states
    }

    fn state_elements(&self, state: usize, shape: &[usize]) -> usize {
        if state > 0 && is_matrix(shape) { 0 } else { shape.iter().product() }
    }

    fn scope(&self, shape: &[usize]) -> Scope {
        if is_matrix(shape) { Scope::Parameter } else { Scope::Elements }
    }

    fn scratch_elements(&self, shape: &[usize]) -> usize {
        let [rows, columns] = *shape else { return 0 };
        let short = rows.min(columns);
        2 * rows * columns + 2 * short * short
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [rows, columns] = *part.shape else { return self.adamw.update(tools, step, part) };
        let [momentum, _] = part.states else { return };
        let elements = rows * columns;
        if elements == 0 {
            return;
        }
        let (direction, scratch) = part.scratch.split_at_mut(elements);
        let ahead = if self.nesterov { self.momentum } else { 1.0 };
        let numbers = [(1.0 - self.momentum) as f32, ahead as f32];
        let runs = part.gradient.chunks(CHUNK_ELEMENTS).zip(momentum.chunks_mut(CHUNK_ELEMENTS));
        let tasks = runs.zip(direction.chunks_mut(CHUNK_ELEMENTS)).collect();
        tools.pool.map(tasks, |((gradient, momentum), direction)| {
            look_ahead(tools.path, numbers, gradient, momentum, direction);
        });
        orthogonalize(tools, direction, scratch, (rows, columns), self.epsilon);
        let (rows, columns) = (rows as f64, columns as f64);
        let adjusted = step.learning_rate
            * match self.adjustment {
                Adjustment::Original => (rows / columns).max(1.0).sqrt(),
                Adjustment::MatchAdamW => 0.2 * rows.max(columns).sqrt(),
            };
        combine(tools, [step.keep(), -(adjusted as f32)], part.parameters, direction);
    }
}

/// Makes the rows of a wide matrix, or the columns of a tall one, all but orthonormal.
fn orthogonalize(
    tools: Tools<'_>,
    matrix: &mut [f32],
    scratch: &mut [f32],
    (rows, columns): (usize, usize),
    epsilon: f64,
) {
    let norm = sums::squares(tools, matrix).sqrt().max(epsilon);
    let (tall, short) = (rows > columns, rows.min(columns));
    let (product, scratch) = scratch.split_at_mut(matrix.len());
    let (gram, gram_squared) = scratch.split_at_mut(short * short);
    let chunks = matrix.chunks_mut(CHUNK_ELEMENTS).collect();
    tools.pool.map(chunks, |chunk| scale(tools.path, (1.0 / norm) as f32, chunk));
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..STEPS {
        let x = Matrix::new(&*matrix, rows, columns);
        let (left, right) = if tall { (x.transposed(), x) } else { (x, x.transposed()) };
        product_by_tasks(tools, gram, left, right);
        let square = Matrix::new(&*gram, short, short);
        product_by_tasks(tools, gram_squared, square, square);
        combine(tools, [b, c], gram, gram_squared);
        let polynomial = Matrix::new(&*gram, short, short);
        // The polynomial is symmetric but for rounding.
        let (left, right) = if tall { (x, polynomial) } else { (polynomial, x) };
        product_by_tasks(tools, product, left, right);
        combine(tools, [a, 1.0], matrix, product);
    }
}

/// `out = left · right`, some rows a task.
fn product_by_tasks(tools: Tools<'_>, out: &mut [f32], left: Matrix<'_>, right: Matrix<'_>) {
    let columns = right.columns();
    let tasks = out.chunks_mut(TASK_ROWS * columns).enumerate().collect();
    tools.pool.map(tasks, |(task, out): (usize, &mut [f32])| {
        let rows = out.len() / columns;
        let destination = MatrixMut::new(out, rows, columns);
        multiply(destination, false, left.rows(task * TASK_ROWS, rows), right, Threads::One);
    });
}

/// `own = factors[0] · own + factors[1] · other`.
fn combine(tools: Tools<'_>, factors: [f32; 2], own: &mut [f32], other: &[f32]) {
    let chunks = own.chunks_mut(CHUNK_ELEMENTS).zip(other.chunks(CHUNK_ELEMENTS)).collect();
    tools.pool.map(chunks, |(own, other): (&mut [f32], &[f32])| add(tools.path, factors, own, other));
}

on_paths! {
    /// Updates the momentum, and answers it, or what it will be if the gradient stays.
    fn look_ahead(numbers: [f32; 2], gradient: &[f32], momentum: &mut [f32], direction: &mut [f32]) {
        let [new, ahead] = numbers;
        for ((&g, momentum), direction) in gradient.iter().zip(momentum).zip(direction) {
            *momentum += (g - *momentum) * new;
            *direction = g + (*momentum - g) * ahead;
        }
    }

    fn scale(factor: f32, values: &mut [f32]) {
        for value in values {
            *value *= factor;
        }
    }

    fn add(factors: [f32; 2], own: &mut [f32], other: &[f32]) {
        for (own, &other) in own.iter_mut().zip(other) {
            *own = *own * factors[0] + other * factors[1];
        }
    }
}
