//! An optimizer with the formats that its state is stored in: one pass over the stored state.

use super::streams::{Formats, Masters, Stream};
use super::view::View;
use super::{MOST_STATES, Optimizer, Part, Scope, Step, Tools, whole};
use crate::adamw::LowPrecision;
use crate::convert::{narrow_chunk, widen_chunk};
use crate::error::same_length;
use crate::format::{Noise, UNIT_ELEMENTS};
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::on_paths;
use crate::{Error, Path, Pool};
use half::{bf16, f16};
use std::sync::Arc;

/// An optimizer and the formats of its streams.
#[derive(Debug, Clone)]
pub struct StoredOptimizer {
    optimizer: Arc<dyn Optimizer>,
    formats: Formats,
    seed: u64,
    streams: Vec<Stream>,
}

/// Gradients, in the type that they are kept in.
#[derive(Debug, Clone, Copy)]
pub enum Gradient<'a> {
    /// In f32.
    F32(&'a [f32]),
    /// In bf16.
    Bf16(&'a [bf16]),
    /// In f16.
    F16(&'a [f16]),
}

/// A part of a parameter, or a whole one, with its state as it is stored.
#[derive(Debug)]
pub struct Piece<'a, 'b> {
    /// The shape of the parameter.
    pub shape: &'a [usize],
    /// A number of the group, the same in every run and of no other group, such as
    /// [`key_of_name`](crate::philox::key_of_name) of its name.
    pub group: u64,
    /// Where in the run of the group the piece starts: a multiple of [`UNIT_ELEMENTS`].
    pub first_element: u64,
    /// The streams, in the order of [`StoredOptimizer::streams`]: of each, the bytes of the piece's elements.
    pub streams: &'a mut [&'b mut [u8]],
    /// The gradient, whose length is the number of the piece's elements.
    pub gradient: Gradient<'a>,
    /// A copy of the updated parameters to write. Masters in bf16 are their own copy.
    pub copy: Option<LowPrecision<'a>>,
    /// Memory of [`StoredOptimizer::scratch_elements`], with any values.
    pub scratch: &'a mut [f32],
}

impl Gradient<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> Gradient<'a> {
    pub(super) fn take(&mut self, elements: usize) -> Gradient<'a> {
        fn cut<'a, T>(values: &mut &'a [T], elements: usize) -> &'a [T] {
            let (first, rest) = values.split_at(elements.min(values.len()));
            *values = rest;
            first
        }
        match self {
            Self::F32(values) => Gradient::F32(cut(values, elements)),
            Self::Bf16(values) => Gradient::Bf16(cut(values, elements)),
            Self::F16(values) => Gradient::F16(cut(values, elements)),
        }
    }

    /// In f32 and scaled: in `scratch`, or as it lies where nothing changes.
    pub(super) fn scaled<'s>(self, path: Path, scale: f32, scratch: &'s mut [f32]) -> &'s [f32]
    where
        'a: 's,
    {
        match self {
            Self::F32(values) if scale == 1.0 => return values,
            Self::F32(values) => scratch.copy_from_slice(values),
            Self::Bf16(values) => widen_chunk(path, values, scratch),
            Self::F16(values) => widen_chunk(path, values, scratch),
        }
        multiply(path, scratch, scale);
        scratch
    }
}

on_paths! {
    fn multiply(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }
}

impl<'a> LowPrecision<'a> {
    fn len(&self) -> usize {
        match self {
            Self::Bf16(copy) => copy.len(),
            Self::F16(copy) => copy.len(),
        }
    }

    fn take(&mut self, elements: usize) -> LowPrecision<'a> {
        match self {
            Self::Bf16(copy) => LowPrecision::Bf16(cut_mut(copy, elements)),
            Self::F16(copy) => LowPrecision::F16(cut_mut(copy, elements)),
        }
    }

    pub(super) fn write(&mut self, path: Path, values: &[f32]) {
        match self {
            Self::Bf16(copy) => narrow_chunk(path, values, copy),
            Self::F16(copy) => narrow_chunk(path, values, copy),
        }
    }
}

/// Takes the first elements, or all there are.
fn cut_mut<'a, T>(values: &mut &'a mut [T], elements: usize) -> &'a mut [T] {
    let all = std::mem::take(values);
    let (first, rest) = all.split_at_mut(elements.min(all.len()));
    *values = rest;
    first
}

impl StoredOptimizer {
    /// An optimizer, the formats of its streams, and the seed of stochastic rounding.
    ///
    /// # Errors
    /// [`Error::Setting`] if a setting of the optimizer is not a number that it is defined for, or it has too
    /// many states.
    pub fn new(optimizer: Arc<dyn Optimizer>, formats: Formats, seed: u64) -> Result<Self, Error> {
        optimizer.validate()?;
        let states = optimizer.states().len();
        super::check("the number of states", states as f64, states <= MOST_STATES, "6 or less")?;
        let streams = formats.streams(&*optimizer);
        Ok(Self { optimizer, formats, seed, streams })
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &dyn Optimizer {
        &*self.optimizer
    }

    /// The formats.
    pub fn formats(&self) -> Formats {
        self.formats
    }

    /// All streams, those of the master parameters first. Computing fetches the first one alone.
    pub fn streams(&self) -> &[Stream] {
        &self.streams
    }

    /// Elements of a stream of a parameter of this shape.
    pub fn stream_elements(&self, stream: usize, shape: &[usize]) -> usize {
        match stream.checked_sub(self.master_streams()) {
            None => shape.iter().product(),
            Some(state) => self.optimizer.state_elements(state, shape),
        }
    }

    /// What an update of a parameter of this shape must see at once.
    pub fn scope(&self, shape: &[usize]) -> Scope {
        self.optimizer.scope(shape)
    }

    /// Elements of f32 that an update of a parameter of this shape needs beside its state: none where it sees
    /// elements alone.
    pub fn scratch_elements(&self, shape: &[usize]) -> usize {
        match self.scope(shape) {
            Scope::Elements => 0,
            Scope::Parameter => whole::scratch_elements(self, shape),
        }
    }

    pub(super) fn master_streams(&self) -> usize {
        self.formats.masters.streams().len()
    }

    pub(super) fn noise(&self, group: u64, stream: usize, step: &Step) -> Noise {
        // INVARIANT: there are at most two streams of masters and MOST_STATES others.
        Noise::new(self.seed, group, stream as u8, step.number)
    }

    /// Updates a piece in place.
    ///
    /// # Errors
    /// [`Error::Setting`] if a number of the step is not one that updates are defined for; [`Error::Length`]
    /// and [`Error::Alignment`] if a run does not fit. Nothing is changed then.
    pub fn update(&self, pool: &Pool, step: &Step, piece: Piece<'_, '_>) -> Result<(), Error> {
        self.update_on(Path::best(), pool, step, piece)
    }

    /// As [`Self::update`], on a given path.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub fn update_on(&self, path: Path, pool: &Pool, step: &Step, piece: Piece<'_, '_>) -> Result<(), Error> {
        step.validate()?;
        self.check(&piece)?;
        let tools = Tools { path, pool };
        match self.scope(piece.shape) {
            Scope::Parameter => whole::update(self, tools, step, piece),
            Scope::Elements => {
                let streams = 0..self.streams.len();
                let noises: Vec<Noise> =
                    streams.map(|stream| self.noise(piece.group, stream, step)).collect();
                let shape = piece.shape;
                pool.map(self.tasks(piece), |task| self.run(tools, step, shape, task, &noises));
            }
        }
        Ok(())
    }

    /// Whether all runs have the lengths and addresses that the piece needs.
    fn check(&self, piece: &Piece<'_, '_>) -> Result<(), Error> {
        let elements = piece.gradient.len();
        let all: usize = piece.shape.iter().product();
        let scope = self.scope(piece.shape);
        match scope {
            Scope::Parameter => same_length("the gradient of a whole parameter", elements, all)?,
            Scope::Elements if elements > all => same_length("the gradient", elements, all)?,
            Scope::Elements => {}
        }
        let first = piece.first_element;
        let at_unit = first.is_multiple_of(UNIT_ELEMENTS as u64);
        super::check("the piece's first element", first as f64, at_unit, "a multiple of 1024")?;
        same_length("the list of streams", piece.streams.len(), self.streams.len())?;
        for (number, (stream, bytes)) in self.streams.iter().zip(&*piece.streams).enumerate() {
            let elements = match scope {
                Scope::Parameter => self.stream_elements(number, piece.shape),
                // A state that parameters of this shape do not have.
                Scope::Elements if self.stream_elements(number, piece.shape) == 0 => 0,
                Scope::Elements => elements,
            };
            same_length(stream.name, bytes.len(), stream.format.bytes(elements))?;
            let needed = stream.format.alignment();
            if !bytes.is_empty() && !bytes.as_ptr().addr().is_multiple_of(needed) {
                return Err(Error::Alignment { name: stream.name, needed });
            }
        }
        if let Some(copy) = &piece.copy {
            same_length("the copy", copy.len(), elements)?;
            let in_f32 = self.formats.masters == Masters::F32;
            super::check("the number of copies of masters in 16 bits", 1.0, in_f32, "0")?;
        }
        same_length("the scratch memory", piece.scratch.len(), self.scratch_elements(piece.shape))
    }

    fn tasks<'a, 'b: 'a>(&self, piece: Piece<'a, 'b>) -> Vec<Task<'a>> {
        let Piece { first_element, streams, mut gradient, mut copy, .. } = piece;
        let elements = gradient.len();
        let mut streams: Vec<&mut [u8]> = streams.iter_mut().map(|bytes| &mut **bytes).collect();
        let first_unit = first_element / UNIT_ELEMENTS as u64;
        let starts = (0..elements).step_by(CHUNK_ELEMENTS);
        let task = |start: usize| {
            let elements = CHUNK_ELEMENTS.min(elements - start);
            let formats = self.streams.iter().zip(&mut streams);
            Task {
                unit: first_unit + (start / UNIT_ELEMENTS) as u64,
                streams: formats.map(|(s, bytes)| cut_mut(bytes, s.format.bytes(elements))).collect(),
                gradient: gradient.take(elements),
                copy: copy.as_mut().map(|copy| copy.take(elements)),
            }
        };
        starts.map(task).collect()
    }

    /// One block of a unit after another.
    fn run(&self, tools: Tools<'_>, step: &Step, shape: &[usize], mut task: Task<'_>, noises: &[Noise]) {
        let masters = self.master_streams();
        let mut scratch = vec![0.0; UNIT_ELEMENTS * (MOST_STATES + 2)];
        let elements = task.gradient.len();
        for (unit, start) in (task.unit..).zip((0..elements).step_by(UNIT_ELEMENTS)) {
            let elements = UNIT_ELEMENTS.min(elements - start);
            let mut scratch = scratch.chunks_exact_mut(UNIT_ELEMENTS).map(|part| &mut part[..elements]);
            let mut scratch = || scratch.next().unwrap_or_default();
            let gradient = task.gradient.take(elements).scaled(tools.path, step.gradient_scale, scratch());
            let mut streams = self.streams.iter().zip(&mut task.streams);
            let mut next = || {
                let (stream, bytes) = streams.next()?;
                let bytes = cut_mut(bytes, stream.format.bytes(elements));
                // Parameters of this shape may not have this state.
                let elements = if bytes.is_empty() { 0 } else { elements };
                Some((stream.format, bytes, elements))
            };
            let mut views: [View<'_>; MOST_STATES + 1] = Default::default();
            if masters == 2
                && let (Some((_, rounded, _)), Some((_, remainder, _))) = (next(), next())
            {
                views[0] = View::split(rounded, remainder, scratch());
            }
            let empty = views.iter_mut().skip(masters - 1);
            for (view, (format, bytes, elements)) in empty.zip(std::iter::from_fn(next)) {
                *view = View::new(format, bytes, elements, |elements| &mut scratch()[..elements]);
            }
            for view in &mut views {
                view.decode(tools.path);
            }
            let [parameters, states @ ..] = views.each_mut().map(View::values);
            let mut states = states;
            let states = &mut states[..self.streams.len() - masters];
            let part = Part { shape, parameters, gradient, states, scratch: &mut [] };
            self.optimizer.update(tools, step, part);
            if let Some(copy) = &mut task.copy {
                copy.take(elements).write(tools.path, views[0].values());
            }
            for (view, noise) in views.iter_mut().zip(&noises[masters - 1..]) {
                view.encode(tools.path, unit, noise);
            }
        }
    }
}

/// What one thread updates at a time.
struct Task<'a> {
    /// Unit of the group that it starts with.
    unit: u64,
    streams: Vec<&'a mut [u8]>,
    gradient: Gradient<'a>,
    copy: Option<LowPrecision<'a>>,
}
