//! Three streams of state in a store, swept as the optimizer does it.

use super::super::super::{CommandResult, configuration};
use super::super::adamw_step;
use super::Sweep;
use crate::arrangement::STAGGER_BYTES;
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::{AdamWState, adamw};
use ferrozero_offload::io::{Completion, Verb};
use ferrozero_offload::{Arena, Budget, ExtentId, ExtentKind, ExtentSpec, Lease, Store, StoreOptions, Tier};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// Master parameters and two moments.
const STREAMS: usize = 3;

/// Places in the pipeline: each holds one piece of every stream.
const PLACES: usize = 12;

/// Most bytes of the gradient in memory, so large that no cache holds it.
const GRADIENT_BYTES_MAX: u64 = 128 << 20;

/// A store and the memory to sweep it. Its folder is removed when this is dropped.
pub struct Disk {
    store: Store,
    streams: [ExtentId; STREAMS],
    pieces: usize,
    leases: Vec<Lease>,
    gradient: Lease,
    pool: Pool,
    step: u64,
    _folder: Folder,
}

/// What is measured leaves nothing behind.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The end of one transfer.
struct Done {
    place: usize,
    stream: usize,
    verb: Verb,
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
    /// Makes a store with `bytes` of state and writes all of it, to both places of each piece.
    pub fn new(directory: &Path, bytes: u64, threads: usize) -> CommandResult<Self> {
        let stream_bytes = bytes / STREAMS as u64 / 4 * 4;
        if stream_bytes == 0 {
            return Err(configuration("bytes must be at least 12, one number of each stream".into()).into());
        }
        let options = StoreOptions::default();
        let piece_bytes = options.piece_bytes.min(usize::try_from(stream_bytes)?);
        // As long as the engine's buffers, so that the three streams of a place do not meet in the memory's banks.
        let lease_bytes = piece_bytes + STAGGER_BYTES;
        let gradient_bytes = usize::try_from(stream_bytes.min(GRADIENT_BYTES_MAX))?.max(lease_bytes);
        let page = |bytes: usize| bytes.next_multiple_of(4096);
        let arena_bytes = STREAMS * PLACES * page(lease_bytes) + page(gradient_bytes);
        let arena = Arena::new(&Budget::new(Tier::Host, arena_bytes as u64), arena_bytes)?;
        let folder = Folder(directory.join("store"));
        let _ = std::fs::remove_dir_all(&folder.0);
        let names = ["master", "first_moment", "second_moment"];
        let specs =
            names.map(|name| ExtentSpec { name: name.into(), bytes: stream_bytes, kind: ExtentKind::State });
        let store = Store::create(&folder.0, specs.to_vec(), options)?;
        let find = |name| store.extent(name).ok_or_else(|| format!("no extent {name}"));
        let streams = [find(names[0])?, find(names[1])?, find(names[2])?];
        let mut gradient = arena.lease(gradient_bytes)?;
        gradient.as_f32_mut().fill(0.01);
        let mut leases = vec![];
        for _ in 0..STREAMS * PLACES {
            let mut lease = arena.lease(lease_bytes)?;
            lease.as_f32_mut().fill(0.5);
            leases.push(lease);
        }
        let pieces = store.piece_count(streams[0])?;
        let pool = Pool::new(threads)?;
        let mut disk = Self { store, streams, pieces, leases, gradient, pool, step: 0, _folder: folder };
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

    /// Does it once; answers the seconds that it took.
    pub fn sweep(&mut self, sweep: Sweep) -> CommandResult<f64> {
        let started = Instant::now();
        match sweep {
            Sweep::Read => self.move_all(Verb::Read)?,
            Sweep::Write => self.move_all(Verb::Write)?,
            Sweep::Update => self.update_all()?,
        }
        Ok(started.elapsed().as_secs_f64())
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
        let done = done.clone();
        let on_done = move |completion| drop(done.send(Done { place, stream, verb, completion }));
        match verb {
            Verb::Read => self.store.read(self.streams[stream], piece, lease, on_done),
            Verb::Write => self.store.write(self.streams[stream], piece, lease, on_done),
        }
    }

    fn move_all(&mut self, verb: Verb) -> CommandResult {
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
            let Done { completion, .. } = done.recv()?;
            in_flight -= 1;
            self.leases.push(completion.lease);
            completion.result?;
        }
    }

    fn update_all(&mut self) -> CommandResult {
        self.step += 1;
        let (sender, done): (_, Receiver<Done>) = channel();
        let mut places: Vec<Place> = (0..PLACES).map(|_| Place::default()).collect();
        let mut next_piece = 0;
        let mut busy_places = 0;
        for (index, place) in places.iter_mut().enumerate() {
            place.leases = [self.leases.pop(), self.leases.pop(), self.leases.pop()];
            busy_places += usize::from(self.turn(place, index, &mut next_piece, Verb::Read, &sender));
        }
        while busy_places > 0 {
            let Done { place: index, stream, verb, completion } = done.recv()?;
            completion.result?;
            let place = &mut places[index];
            place.leases[stream] = Some(completion.lease);
            place.in_flight -= 1;
            if place.in_flight > 0 {
                continue;
            }
            let is_busy = match verb {
                Verb::Read => {
                    self.update(place)?;
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

    fn update(&self, place: &mut Place) -> CommandResult {
        let bytes = self.store.piece_bytes_of(self.streams[0], place.piece)?;
        let elements = bytes / 4;
        let gradient = self.gradient.as_f32();
        let windows = (gradient.len() / elements).max(1);
        let gradient = &gradient[place.piece % windows * elements..][..elements];
        let [Some(master), Some(first_moment), Some(second_moment)] = &mut place.leases else {
            return Err("a piece to update is incomplete".into());
        };
        let state = AdamWState {
            master: &mut master.as_f32_mut()[..elements],
            first_moment: &mut first_moment.as_f32_mut()[..elements],
            second_moment: &mut second_moment.as_f32_mut()[..elements],
        };
        Ok(adamw(&self.pool, &adamw_step(self.step), state, gradient, None)?)
    }
}
