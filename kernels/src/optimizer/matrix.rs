//! Parameters as matrices, cut into tasks.

use crate::pool::CHUNK_ELEMENTS;

/// Rows of a task: as many as fit into a chunk, at least one. They depend on the matrix alone.
pub(super) fn task_rows(columns: usize) -> usize {
    (CHUNK_ELEMENTS / columns.max(1)).max(1)
}

/// Elements of a task: whole rows.
pub(super) fn task_elements(columns: usize) -> usize {
    task_rows(columns) * columns.max(1)
}

/// Matrices in the last two dimensions of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Matrices {
    /// How many.
    pub count: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub columns: usize,
}

impl Matrices {
    /// Those of a shape of two dimensions or more.
    pub(super) fn of(shape: &[usize]) -> Option<Self> {
        match shape {
            [leading @ .., rows, columns] => {
                Some(Self { count: leading.iter().product(), rows: *rows, columns: *columns })
            }
            _ => None,
        }
    }
}
