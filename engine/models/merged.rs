//! The weights of a model that was trained further, as transformers loads them: adapters merged, matrices
//! transposed where they lie so.

use super::linear::Adapting;
use super::pretrained::Pretrained;
use crate::disk::safetensors::export_safetensors;
use crate::error::{Result, internal};
use crate::schedule::layout::Put;
use crate::train::trainer::Trainer;
use std::path::Path;

impl Pretrained {
    /// Writes a safetensors file as transformers loads it, with what adapters add to the matrices beside
    /// them. But adapters nothing is in memory as a whole: a few pieces are, and up to 4 MiB of a matrix that
    /// is transposed.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) and errors of the tiers.
    pub fn export_safetensors(&self, trainer: &Trainer, adapting: &Adapting, path: &Path) -> Result<()> {
        let weights = trainer.parameters().into_iter().filter(|(name, _)| !Adapting::is_adapter(name));
        let stored = weights.map(|(name, shape)| {
            let (stored, transposed) = self.stored_name(&name);
            let shape_stored = if transposed { shape.iter().rev().copied().collect() } else { shape.clone() };
            (stored, shape_stored, name, shape, transposed)
        });
        let stored: Vec<_> = stored.collect();
        let names: Vec<_> = stored.iter().map(|(name, shape, ..)| (name.clone(), shape.clone())).collect();
        let put_all = |wanted: &str, put: &mut Put| {
            let found = stored.iter().find(|(name, ..)| name == wanted);
            let (_, _, name, shape, transposed) =
                found.ok_or_else(|| internal("a parameter without its name in the file"))?;
            let merge = Merge::new(trainer, adapting, name, shape)?;
            let mut transposing = Transposing::new(shape).filter(|_| *transposed);
            let mut changed = vec![];
            trainer.show(name, &mut |first, values| {
                let values = match &merge {
                    Some(merge) => {
                        changed.clear();
                        changed.extend_from_slice(values);
                        merge.add(first, &mut changed);
                        &changed
                    }
                    None => values,
                };
                match &mut transposing {
                    Some(transposing) => transposing.take(first, values, put),
                    None => put(first, values),
                }
            })?;
            transposing.map_or(Ok(()), |mut transposing| transposing.put(put))
        };
        export_safetensors(path, &names, &put_all)
    }
}

/// What an adapter adds to a matrix [outputs, inputs].
struct Merge {
    /// [rank, inputs].
    a: Vec<f32>,
    /// [outputs, rank].
    b: Vec<f32>,
    inputs: usize,
    rank: usize,
    scale: f32,
}

impl Merge {
    /// That of the parameter of a name, if it has an adapter.
    fn new(trainer: &Trainer, adapting: &Adapting, name: &str, shape: &[usize]) -> Result<Option<Self>> {
        let (Some([a, b]), [_, inputs]) = (Adapting::adapter_of(name), shape) else { return Ok(None) };
        if adapting.rank == 0 || !trainer.parameters().iter().any(|(name, _)| *name == a) {
            return Ok(None);
        }
        let (a, b) = (trainer.parameter(&a)?, trainer.parameter(&b)?);
        Ok(Some(Self { a, b, inputs: *inputs, rank: adapting.rank, scale: adapting.scale() as f32 }))
    }

    /// Adds it to values from the element `first` on. The sums do not depend on how many values come at a
    /// time.
    fn add(&self, first: usize, values: &mut [f32]) {
        let (mut place, mut rest) = (first, values);
        while !rest.is_empty() {
            let (row, column) = (place / self.inputs, place % self.inputs);
            let (part, behind) = rest.split_at_mut((self.inputs - column).min(rest.len()));
            let mut sums = vec![0.0; part.len()];
            for (b, a) in self.b[row * self.rank..][..self.rank].iter().zip(self.a.chunks_exact(self.inputs))
            {
                sums.iter_mut().zip(&a[column..]).for_each(|(sum, a)| *sum += b * a);
            }
            part.iter_mut().zip(sums).for_each(|(value, sum)| *value += self.scale * sum);
            place += part.len();
            rest = behind;
        }
    }
}

/// Elements of a matrix that are in memory while it is transposed.
const STRIP_ELEMENTS: usize = 1 << 20;

/// A part of a row of a matrix.
struct Run {
    row: usize,
    column: usize,
    /// Where its values are in the strip.
    first: usize,
    end: usize,
}

/// A matrix [rows, columns] that comes in runs and is put as its transpose, many runs at a time: below one
/// another they are runs there.
struct Transposing {
    rows: usize,
    columns: usize,
    runs: Vec<Run>,
    strip: Vec<f32>,
}

impl Transposing {
    fn new(shape: &[usize]) -> Option<Self> {
        let [rows, columns] = *shape else { return None };
        Some(Self {
            rows,
            columns,
            runs: vec![],
            strip: Vec::with_capacity(STRIP_ELEMENTS.min(rows * columns)),
        })
    }

    /// Takes values from the element `place` of the matrix on.
    fn take(&mut self, mut place: usize, mut values: &[f32], put: &mut Put) -> Result<()> {
        while !values.is_empty() {
            let (row, column) = (place / self.columns, place % self.columns);
            let room = STRIP_ELEMENTS - self.strip.len();
            let (run, rest) = values.split_at((self.columns - column).min(room).min(values.len()));
            let first = self.strip.len();
            self.strip.extend_from_slice(run);
            self.runs.push(Run { row, column, first, end: self.strip.len() });
            (place, values) = (place + run.len(), rest);
            if self.strip.len() == STRIP_ELEMENTS {
                self.put(put)?;
            }
        }
        Ok(())
    }

    /// Puts what was taken.
    fn put(&mut self, put: &mut Put) -> Result<()> {
        let first = self.runs.iter().map(|run| run.column).min().unwrap_or(0);
        let end = self.runs.iter().map(|run| run.column + run.end - run.first).max().unwrap_or(0);
        let mut below = vec![];
        for column in first..end {
            let mut next_row = 0;
            for run in &self.runs {
                let value = column.checked_sub(run.column).map(|within| run.first + within);
                let Some(place) = value.filter(|&place| place < run.end) else { continue };
                if run.row != next_row && !below.is_empty() {
                    put(column * self.rows + next_row - below.len(), &below)?;
                    below.clear();
                }
                below.push(self.strip[place]);
                next_row = run.row + 1;
            }
            if !below.is_empty() {
                put(column * self.rows + next_row - below.len(), &below)?;
                below.clear();
            }
        }
        self.runs.clear();
        self.strip.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever comes at a time, also parts of rows.
    #[test]
    fn a_matrix_is_transposed_and_merged_in_parts_as_it_is_at_once() {
        // A row of the second matrix is more than a strip, and of the third half of one.
        for (rows, columns) in [(5, 7), (3, STRIP_ELEMENTS + 1), (5, STRIP_ELEMENTS / 2)] {
            let matrix: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let wave = |count: usize, step: f32| (0..count).map(|i| (i as f32 * step).sin()).collect();
            let merge = Merge {
                a: wave(2 * columns, 0.7),
                b: wave(2 * rows, 1.3),
                inputs: columns,
                rank: 2,
                scale: 2.0,
            };
            let mut merged = matrix.clone();
            merge.add(0, &mut merged);
            let place = columns + 3;
            let product: f32 = (0..2).map(|k| merge.b[2 + k] * merge.a[k * columns + 3]).sum();
            assert_eq!(merged[place], matrix[place] + 2.0 * product);

            // From the first element on, and as a model has it in parts: left and right half, row by row.
            let parts = matrix.chunks(columns / 2 + 1).scan(0, |first, part| {
                *first += part.len();
                Some((*first - part.len(), part.to_vec()))
            });
            let halves = [0..columns / 2, columns / 2..columns].into_iter().flat_map(|half| {
                let matrix = &matrix;
                (0..rows).map(move |row| {
                    let start = row * columns + half.start;
                    (start, matrix[start..start + half.len()].to_vec())
                })
            });
            let expected: Vec<f32> =
                (0..matrix.len()).map(|place| merged[place % rows * columns + place / rows]).collect();
            for parts in [parts.collect::<Vec<_>>(), halves.collect()] {
                let mut transposing = Transposing::new(&[rows, columns]).unwrap();
                let mut found = vec![f32::NAN; matrix.len()];
                let mut put = |first: usize, values: &[f32]| {
                    found[first..first + values.len()].copy_from_slice(values);
                    Ok(())
                };
                for (first, mut part) in parts {
                    merge.add(first, &mut part);
                    transposing.take(first, &part, &mut put).unwrap();
                    assert!(transposing.strip.len() < STRIP_ELEMENTS);
                }
                transposing.put(&mut put).unwrap();
                assert!(found == expected, "{rows} × {columns}");
            }
        }
    }
}
