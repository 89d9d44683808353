//! Where initial values of parameters come from, if not from random numbers.

use crate::error::Result;
use std::fmt;
use std::ops::Range;

/// Where initial values of parameters come from, instead of random numbers.
pub trait InitialValues: fmt::Debug + Send + Sync {
    /// Compares the model's parameters, names and shapes, with what is there, before anything is read.
    ///
    /// # Errors
    /// [`Error::Weights`](crate::Error::Weights) naming the first tensor that is missing,
    /// of another shape, or left over.
    fn check(&self, parameters: &[(String, Vec<usize>)]) -> Result<()>;

    /// Fills `out` with the elements from `first_element` of the parameter `name`, or answers false if the
    /// parameter is one that starts with random numbers.
    ///
    /// # Errors
    /// [`Error::Weights`](crate::Error::Weights) and [`Error::File`](crate::Error::File).
    fn fill(&self, name: &str, first_element: usize, out: &mut [f32]) -> Result<bool>;

    /// As [`Self::fill`], for a matrix of which the model has the columns `columns` of `all` as a parameter
    /// of their own: `out` are their elements from `first_element` on, row by row.
    ///
    /// # Errors
    /// As [`Self::fill`].
    fn fill_columns(
        &self,
        name: &str,
        columns: Range<usize>,
        all: usize,
        first_element: usize,
        out: &mut [f32],
    ) -> Result<bool> {
        let count = columns.len();
        let mut done = 0;
        while done < out.len() {
            let (row, column) = ((first_element + done) / count, (first_element + done) % count);
            let part = (count - column).min(out.len() - done);
            let first = row * all + columns.start + column;
            if !self.fill(name, first, &mut out[done..done + part])? {
                return Ok(false);
            }
            done += part;
        }
        Ok(true)
    }
}
