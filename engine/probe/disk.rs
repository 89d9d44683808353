//! Three streams of state in a store, swept as the optimizer does it.

use super::optimizer::{adamw_step, pool};
use crate::error::{Error, Result, internal};
use crate::schedule::buffer_plan::STAGGER_BYTES;
use crate::schedule::trace::covered_s;
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::{AdamWState, adamw};
use ferrozero_offload::io::{Completion, Verb};
use ferrozero_offload::{
    Arena, Budget, ExtentId, ExtentKind, ExtentSpec, Lease, Store, StoreOptions, Tier, padded_bytes,
};
use serde::Serialize;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// Master parameters and two moments.
const STREAMS: usize = 3;

/// Places in the pipeline that keep any disk busy: each holds one piece of every stream.
pub const PLACES: usize = 12;

/// Most bytes of the gradient in memory, so large that no cache holds it.
const GRADIENT_BYTES_MAX: u64 = 128 << 20;

/// What is done with all bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sweep {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Read three streams, update them, write them back.
    Update,
}

impl Sweep {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Update];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Update => "update",
        }
    }

    /// Bytes that cross to or from the disk, for state of `bytes`.
    pub fn moved_bytes(self, bytes: u64) -> u64 {
        match self {
            Self::Read | Self::Write => bytes,
            Self::Update => 2 * bytes,
        }
    }
}

/// How long a sweep took, and how long each queue had something under way meanwhile. A transfer is under way from when it
/// is given to the store until its checksum is known, an update while it computes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Swept {
    /// Seconds from the first transfer to the end of the last.
    pub sweep_s: f64,
    /// Seconds in which at least one read was under way.
    pub read_s: f64,
    /// Seconds in which at least one write was under way.
    pub write_s: f64,
    /// Seconds in which the optimizer computed.
    pub optimizer_s: f64,
}

impl Swept {
    /// The sweep's seconds over those of its busiest queue: 1 where one queue was never without something to do, up to 3
    /// where each waited for the others. Reads and writes share the disk, so times that either takes alone do not add
    /// up to a bound; what the disk could do with both at once is a measurement of its own, `fio`'s.
    pub fn over_busiest(&self) -> f64 {
        self.sweep_s / self.read_s.max(self.write_s).max(self.optimizer_s)
    }
}

/// When each thing of a sweep started and ended.
struct Spans {
    started: Instant,
    reads: Vec<(f64, f64)>,
    writes: Vec<(f64, f64)>,
    updates: Vec<(f64, f64)>,
}

impl Spans {
    fn start() -> Self {
        Self { started: Instant::now(), reads: vec![], writes: vec![], updates: vec![] }
    }

    fn now_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn add_transfer(&mut self, verb: Verb, (start, end): (Instant, Instant)) {
        let seconds = |moment: Instant| moment.duration_since(self.started).as_secs_f64();
        let span = (seconds(start), seconds(end));
        match verb {
            Verb::Read => self.reads.push(span),
            Verb::Write => self.writes.push(span),
        }
    }

    fn end(self) -> Swept {
        Swept {
            sweep_s: self.now_s(),
            read_s: covered_s(self.reads),
            write_s: covered_s(self.writes),
            optimizer_s: covered_s(self.updates),
        }
    }
}

/// A store of files without names, and the memory to sweep it.
pub struct Disk {
    store: Store,
    streams: [ExtentId; STREAMS],
    pieces: usize,
    /// Places in the pipeline: each holds one piece of every stream.
    places: usize,
    leases: Vec<Lease>,
    gradient: Lease,
    pool: Pool,
    step: u64,
}

/// The end of one transfer.
struct Done {
    place: usize,
    stream: usize,
    verb: Verb,
    /// When it was given to the store, and when the store was done with it.
    span: (Instant, Instant),
    completion: Completion,
}

/// One place of the pipeline: the leases that are here, and what they wait for.
#[derive(Default)]
struct Place {
    leases: [Option<Lease>; STREAMS],
    piece: usize,
    in_flight: usize,
}

impl Disk {
    /// Makes a store with `bytes` of state, of which `places` pieces of each stream may be in memory, and writes all of it, to
    /// both places of each piece.
    ///
    /// # Errors
    /// [`Error::Configuration`] for too few bytes, and errors of the tiers.
    pub fn new(directory: &Path, bytes: u64, places: usize, threads: usize) -> Result<Self> {
        let stream_bytes = bytes / STREAMS as u64 / 4 * 4;
        if stream_bytes == 0 {
            return Err(Error::Configuration("bytes must be at least 12, one number of each stream".into()));
        }
        // Whatever the folder holds stays as it is, and a kill leaves nothing behind.
        let options = StoreOptions { temporary: true, ..StoreOptions::default() };
        let piece_bytes = options.piece_bytes.min(usize::try_from(stream_bytes).unwrap_or(usize::MAX));
        // As long as the engine's buffers, so that the three streams of a place do not meet in the memory's banks.
        let lease_bytes = piece_bytes + STAGGER_BYTES;
        let gradient_bytes = (stream_bytes.min(GRADIENT_BYTES_MAX) as usize).max(lease_bytes);
        let arena_bytes = STREAMS * places * padded_bytes(lease_bytes) + padded_bytes(gradient_bytes);
        let arena = Arena::new(&Budget::new(Tier::Host, arena_bytes as u64), arena_bytes)?;
        let names = ["master", "first_moment", "second_moment"];
        let specs =
            names.map(|name| ExtentSpec { name: name.into(), bytes: stream_bytes, kind: ExtentKind::State });
        let store = Store::create(directory, specs.to_vec(), options)?;
        let find = |name| store.extent(name).ok_or_else(|| internal("an extent without its name"));
        let streams = [find(names[0])?, find(names[1])?, find(names[2])?];
        let mut gradient = arena.lease(gradient_bytes)?;
        gradient.as_f32_mut().fill(0.01);
        let mut leases = vec![];
        for _ in 0..STREAMS * places {
            let mut lease = arena.lease(lease_bytes)?;
            lease.as_f32_mut().fill(0.5);
            leases.push(lease);
        }
        let pieces = store.piece_count(streams[0])?;
        let pool = pool(threads)?;
        let mut disk = Self { store, streams, pieces, places, leases, gradient, pool, step: 0 };
        // A file system may have to note that reserved space was written; a run does that once, and so do we.
        for _ in 0..2 {
            disk.sweep(Sweep::Write)?;
            disk.store.commit(serde_json::Value::Null)?;
        }
        Ok(disk)
    }

    /// Bytes of state.
    pub fn bytes(&self) -> u64 {
        self.store.extents().iter().map(|extent| extent.spec.bytes).sum()
    }

    /// Does it once; answers how long it took.
    ///
    /// # Errors
    /// Errors of the disk tier.
    pub fn sweep(&mut self, sweep: Sweep) -> Result<Swept> {
        let mut spans = Spans::start();
        match sweep {
            Sweep::Read => self.move_all(Verb::Read, &mut spans)?,
            Sweep::Write => self.move_all(Verb::Write, &mut spans)?,
            Sweep::Update => self.update_all(&mut spans)?,
        }
        Ok(spans.end())
    }

    fn start(
        &self,
        verb: Verb,
        place: usize,
        stream: usize,
        piece: usize,
        lease: Lease,
        done: &Sender<Done>,
    ) {
        let (done, started) = (done.clone(), Instant::now());
        let on_done = move |completion| {
            let span = (started, Instant::now());
            drop(done.send(Done { place, stream, verb, span, completion }));
        };
        match verb {
            Verb::Read => self.store.read(self.streams[stream], piece, lease, on_done),
            Verb::Write => self.store.write(self.streams[stream], piece, lease, on_done),
        }
    }

    fn move_all(&mut self, verb: Verb, spans: &mut Spans) -> Result<()> {
        let (sender, done) = channel();
        let mut left = (0..self.pieces).flat_map(|piece| (0..STREAMS).map(move |stream| (stream, piece)));
        let mut in_flight = 0;
        loop {
            while let Some(lease) = self.leases.pop() {
                let Some((stream, piece)) = left.next() else {
                    self.leases.push(lease);
                    break;
                };
                self.start(verb, 0, stream, piece, lease, &sender);
                in_flight += 1;
            }
            if in_flight == 0 {
                return Ok(());
            }
            let Done { span, completion, .. } =
                done.recv().map_err(|_| internal("a transfer ended without an answer"))?;
            spans.add_transfer(verb, span);
            in_flight -= 1;
            self.leases.push(completion.lease);
            completion.result?;
        }
    }

    fn update_all(&mut self, spans: &mut Spans) -> Result<()> {
        self.step += 1;
        let (sender, done): (_, Receiver<Done>) = channel();
        let mut places: Vec<Place> = (0..self.places).map(|_| Place::default()).collect();
        let mut next_piece = 0;
        let mut busy_places = 0;
        for (index, place) in places.iter_mut().enumerate() {
            place.leases = [self.leases.pop(), self.leases.pop(), self.leases.pop()];
            busy_places += usize::from(self.turn(place, index, &mut next_piece, Verb::Read, &sender));
        }
        while busy_places > 0 {
            let Done { place: index, stream, verb, span, completion } =
                done.recv().map_err(|_| internal("a transfer ended without an answer"))?;
            spans.add_transfer(verb, span);
            completion.result?;
            let place = &mut places[index];
            place.leases[stream] = Some(completion.lease);
            place.in_flight -= 1;
            if place.in_flight > 0 {
                continue;
            }
            let is_busy = match verb {
                Verb::Read => {
                    let start_s = spans.now_s();
                    self.update(place)?;
                    spans.updates.push((start_s, spans.now_s()));
                    self.turn(place, index, &mut next_piece, Verb::Write, &sender)
                }
                Verb::Write => self.turn(place, index, &mut next_piece, Verb::Read, &sender),
            };
            busy_places -= usize::from(!is_busy);
        }
        self.leases.extend(places.into_iter().flat_map(|place| place.leases).flatten());
        Ok(())
    }

    /// Starts the transfers of a place; a read is of the next piece, if there is one left.
    fn turn(
        &self,
        place: &mut Place,
        index: usize,
        next_piece: &mut usize,
        verb: Verb,
        done: &Sender<Done>,
    ) -> bool {
        if verb == Verb::Read {
            if *next_piece == self.pieces {
                return false;
            }
            place.piece = *next_piece;
            *next_piece += 1;
        }
        for (stream, lease) in place.leases.iter_mut().enumerate() {
            if let Some(lease) = lease.take() {
                self.start(verb, index, stream, place.piece, lease, done);
                place.in_flight += 1;
            }
        }
        place.in_flight > 0
    }

    fn update(&self, place: &mut Place) -> Result<()> {
        let bytes = self.store.piece_bytes_of(self.streams[0], place.piece)?;
        let elements = bytes / 4;
        let gradient = self.gradient.as_f32();
        let windows = (gradient.len() / elements).max(1);
        let gradient = &gradient[place.piece % windows * elements..][..elements];
        let [Some(master), Some(first_moment), Some(second_moment)] = &mut place.leases else {
            return Err(internal("a piece to update is incomplete"));
        };
        let state = AdamWState {
            master: &mut master.as_f32_mut()[..elements],
            first_moment: &mut first_moment.as_f32_mut()[..elements],
            second_moment: &mut second_moment.as_f32_mut()[..elements],
        };
        adamw(&self.pool, &adamw_step(self.step), state, gradient, None).map_err(Error::Kernel)
    }
}
