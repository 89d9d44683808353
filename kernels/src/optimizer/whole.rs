//! Updates that see a whole parameter: its streams are decoded into scratch memory, updated, and stored
//! again, by all threads.

use super::stored::Gradient;
use super::view::View;
use super::{Part, Piece, Step, StoredOptimizer, Tools};
use crate::format::{Format, UNIT_ELEMENTS};
use crate::pool::CHUNK_ELEMENTS;

/// Elements of f32 for everything that is not stored in f32, for the gradient, and for the optimizer itself.
pub(super) fn scratch_elements(stored: &StoredOptimizer, shape: &[usize]) -> usize {
    let elements: usize = shape.iter().product();
    let masters = stored.master_streams();
    let of_masters = if stored.streams()[0].format == Format::F32 { 0 } else { elements };
    let states = stored.streams().iter().enumerate().skip(masters);
    let decoded = states.filter(|(_, stream)| stream.format != Format::F32);
    let of_states: usize = decoded.map(|(number, _)| stored.stream_elements(number, shape)).sum();
    elements + of_masters + of_states + stored.optimizer().scratch_elements(shape)
}

/// Updates a piece that is a whole parameter, whose lengths were checked.
pub(super) fn update(stored: &StoredOptimizer, tools: Tools<'_>, step: &Step, piece: Piece<'_, '_>) {
    let Piece { shape, group, first_element, streams, gradient, copy, scratch: mut rest, .. } = piece;
    let first_unit = first_element / UNIT_ELEMENTS as u64;
    let masters = stored.master_streams();
    let mut scratch = |elements: usize| {
        let (taken, others) = std::mem::take(&mut rest).split_at_mut(elements);
        rest = others;
        taken
    };
    let elements = gradient.len();
    let gradient = scaled(tools, gradient, step.gradient_scale, scratch(elements));
    let mut views = vec![];
    let (of_masters, of_states) = streams.split_at_mut(masters);
    match of_masters {
        [rounded, remainder] => views.push(View::split(rounded, remainder, scratch(elements))),
        [master, ..] => views.push(View::new(stored.streams()[0].format, master, elements, &mut scratch)),
        [] => {}
    }
    for (number, bytes) in of_states.iter_mut().enumerate() {
        let number = masters + number;
        let elements = stored.stream_elements(number, shape);
        views.push(View::new(stored.streams()[number].format, bytes, elements, &mut scratch));
    }
    for view in &mut views {
        tools.pool.map(view.pieces(CHUNK_ELEMENTS), |mut piece| piece.decode(tools.path));
    }
    let mut values: Vec<&mut [f32]> = views.iter_mut().map(View::values).collect();
    if let [parameters, states @ ..] = values.as_mut_slice() {
        let scratch = scratch(stored.optimizer().scratch_elements(shape));
        let part = Part { shape, parameters, gradient, states, scratch };
        stored.optimizer().update(tools, step, part);
        if let Some(mut copy) = copy {
            copy.write(tools.path, parameters);
        }
    }
    for (number, view) in views.iter_mut().enumerate() {
        // The noise of masters is that of their first stream.
        let stream = if number == 0 { 0 } else { masters + number - 1 };
        let noise = stored.noise(group, stream, step);
        let units = (first_unit..).step_by(CHUNK_ELEMENTS / UNIT_ELEMENTS);
        let pieces = units.zip(view.pieces(CHUNK_ELEMENTS)).collect();
        tools.pool.map(pieces, |(unit, mut piece): (u64, View<'_>)| piece.encode(tools.path, unit, &noise));
    }
}

/// The gradient in f32 and scaled, in `scratch` unless it is so already.
fn scaled<'a>(tools: Tools<'_>, gradient: Gradient<'a>, scale: f32, scratch: &'a mut [f32]) -> &'a [f32] {
    if let (Gradient::F32(values), true) = (gradient, scale == 1.0) {
        return values;
    }
    let mut rest = gradient;
    let chunks = scratch.chunks_mut(CHUNK_ELEMENTS).map(|to| (rest.take(to.len()), to)).collect();
    tools.pool.map(chunks, |(gradient, to): (Gradient<'_>, &mut [f32])| {
        gradient.scaled(tools.path, scale, to);
    });
    scratch
}
