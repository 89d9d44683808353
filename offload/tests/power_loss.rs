//! The power goes at every instant of a run, with every kind of luck for what was not yet durable: the last
//! commit is there, whole.

mod common;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use common::*;
use ferrozero_offload::{
    io::{FaultPlan, FileId, FileSpec, Io, Mem, OnDone, Request, Verb},
    *,
};
use serde_json::json;

/// What reached the disk, in order.
#[derive(Clone)]
enum Event {
    Write { file: FileId, offset_bytes: u64, bytes: Vec<u8> },
    Sync { file: FileId },
    SaveDocument { name: String, bytes: Vec<u8> },
}

/// A disk in memory that keeps a journal.
struct Journal {
    inner: Mem,
    events: Mutex<Vec<Event>>,
    files: Mutex<Vec<FileSpec>>,
}

impl Journal {
    fn new() -> Arc<Self> {
        let inner = Mem::new(&FaultPlan::default()).unwrap();
        Arc::new(Self { inner, events: Mutex::default(), files: Mutex::default() })
    }

    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl Io for Journal {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        *self.files.lock().unwrap() = files.to_vec();
        self.inner.allocate_files(files)
    }
    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.inner.open_files(files)
    }
    fn submit(&self, request: Request, on_done: OnDone) {
        if request.verb() == Verb::Write {
            let bytes = request.buffer().to_vec();
            self.note(Event::Write { file: request.file(), offset_bytes: request.offset_bytes(), bytes });
        }
        self.inner.submit(request, on_done);
    }
    fn sync(&self, file: FileId) -> Result<(), Error> {
        self.note(Event::Sync { file });
        self.inner.sync(file)
    }
    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.note(Event::SaveDocument { name: name.to_owned(), bytes: bytes.to_vec() });
        self.inner.save_document(name, bytes)
    }
    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        self.inner.load_document(name)
    }
    fn check_files(&self) -> Result<(), Error> {
        self.inner.check_files()
    }
    fn check_paths(&self) -> Result<(), Error> {
        self.inner.check_paths()
    }
    fn path_of(&self, name: &str) -> PathBuf {
        self.inner.path_of(name)
    }
    fn notices(&self) -> Vec<Notice> {
        Vec::new()
    }
}

/// Numbers that look random and are the same in every run.
struct Luck(u64);

impl Luck {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A disk after the power went: pages that were written and not synced are there, or not, as luck has it.
fn disk_after(events: &[Event], files: &[FileSpec], arena: &Arena, luck: &mut Luck) -> Arc<dyn Io> {
    let disk = Arc::new(Mem::new(&FaultPlan::default()).unwrap());
    disk.allocate_files(files).unwrap();
    for (index, event) in events.iter().enumerate() {
        match event {
            Event::Sync { .. } => {}
            Event::SaveDocument { name, bytes } => disk.save_document(name, bytes).unwrap(),
            Event::Write { file, offset_bytes, bytes } => {
                let is_durable = events[index..]
                    .iter()
                    .any(|later| matches!(later, Event::Sync { file: synced } if synced == file));
                for (page, page_bytes) in bytes.chunks(PAGE_BYTES).enumerate() {
                    if is_durable || luck.below(2) == 0 {
                        let at = offset_bytes + (page * PAGE_BYTES) as u64;
                        write_page(&*disk, *file, at, page_bytes, arena);
                    }
                }
            }
        }
    }
    disk
}

fn write_page(disk: &dyn Io, file: FileId, offset_bytes: u64, bytes: &[u8], arena: &Arena) {
    let mut lease = arena.lease(PAGE_BYTES).unwrap();
    lease.copy_from_slice(bytes);
    let (ticket, on_done) = Ticket::new();
    disk.submit(Request::new(Verb::Write, file, offset_bytes, PAGE_BYTES, lease).unwrap(), Box::new(on_done));
    ticket.wait().result.unwrap();
}

const GENERATIONS: u64 = 5;

/// A run that was journaled.
struct Run {
    events: Vec<Event>,
    files: Vec<FileSpec>,
    pieces: Vec<(ExtentId, usize)>,
    /// The round of each piece in each generation.
    rounds: Vec<Vec<u64>>,
}

/// Writes pieces as luck has it, none to three times, and commits, some generations long.
fn run(options: &StoreOptions, arena: &Arena, luck: &mut Luck) -> Run {
    let journal = Journal::new();
    let store = Store::create_on(journal.clone(), state("weights", 5 * 8192 + 100), options).unwrap();
    let all = pieces(&store);
    // All pieces are there from the first commit on.
    let mut rounds = vec![vec![0; all.len()]];
    for generation in 1..=GENERATIONS {
        let mut now = rounds[generation as usize - 1].clone();
        for (&piece, round) in all.iter().zip(&mut now) {
            for again in 0..if generation == 1 { 1 } else { luck.below(3) } {
                *round = generation * 10 + again;
                write(&store, arena, piece, *round).unwrap();
            }
        }
        rounds.push(now);
        assert_eq!(store.commit(json!({ "generation": generation })).unwrap(), generation);
    }
    drop(store);
    let events = journal.events.lock().unwrap().clone();
    let files = journal.files.lock().unwrap().clone();
    Run { events, files, pieces: all, rounds }
}

/// Opens what is left after the power went at every instant; answers how often there was a commit, and how
/// often the last one was being overwritten.
fn lose_power_everywhere(run: &Run, arena: &Arena, luck: &mut Luck) -> (usize, usize) {
    let (mut whole, mut overwritten) = (0, 0);
    for cut in 0..=run.events.len() {
        let events = &run.events[..cut];
        let manifests: Vec<serde_json::Value> = events
            .iter()
            .filter_map(|event| match event {
                Event::SaveDocument { name, bytes } if name == "manifest.json" => {
                    Some(serde_json::from_slice(bytes).unwrap())
                }
                _ => None,
            })
            .collect();
        for _ in 0..4 {
            let opened = Store::open_on(disk_after(events, &run.files, arena, luck));
            let Some(manifest) = manifests.last() else {
                assert!(matches!(opened, Err(Error::NoCommit { .. })));
                continue;
            };
            let saved = manifest["generation"].as_u64().unwrap();
            if manifest["overwriting"] == true {
                match opened {
                    Err(Error::Overwritten { generation, .. }) => assert_eq!(generation, saved),
                    other => panic!("{:?}", other.map(drop)),
                }
                overwritten += 1;
                continue;
            }
            let store = opened.unwrap();
            let commit = store.committed().unwrap();
            assert_eq!((commit.generation, &commit.application["generation"]), (saved, &json!(saved)));
            for (&piece, &round) in run.pieces.iter().zip(&run.rounds[saved as usize]) {
                expect_round(&store, arena, piece, round);
            }
            whole += 1;
        }
    }
    (whole, overwritten)
}

#[test]
fn the_last_commit_survives_a_power_loss_at_every_instant() {
    let (arena, mut luck) = (arena(1 << 20), Luck(7));
    for stripes in [vec![], vec!["/one".into(), "/two".into()]] {
        let run = run(&StoreOptions { stripes, ..of_pieces(8192) }, &arena, &mut luck);
        let (whole, overwritten) = lose_power_everywhere(&run, &arena, &mut luck);
        assert!(whole > 4 * GENERATIONS as usize);
        assert_eq!(overwritten, 0);
    }
}

#[test]
fn in_place_a_power_loss_leaves_a_whole_commit_or_a_store_that_says_it_has_none() {
    let (arena, mut luck) = (arena(1 << 20), Luck(7));
    for stripes in [vec![], vec!["/one".into()]] {
        let options = StoreOptions { in_place: true, stripes, ..of_pieces(8192) };
        let run = run(&options, &arena, &mut luck);
        let (whole, overwritten) = lose_power_everywhere(&run, &arena, &mut luck);
        assert!(whole >= 4 * GENERATIONS as usize && overwritten > 0, "{whole} {overwritten}");
    }
}
