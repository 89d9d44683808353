//! What the store's tests share: the table of backends, and a few lines each would otherwise repeat.
#![allow(dead_code)]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ferrozero_offload::{
    io::{FaultPlan, Faulty, Io, Mem, Pool, Uring},
    *,
};

/// Something whose files outlive a store, so that another one can be opened on them.
pub enum Disk {
    Uring(tempfile::TempDir),
    Pool(tempfile::TempDir),
    Mem(Arc<Mem>),
}

/// One of each backend. io_uring is left out, with a line that says so, where the system forbids it.
pub fn disks() -> Vec<Disk> {
    disks_in(&std::env::temp_dir())
}

/// As [`disks`], on a file system in memory where there is one: for tests that wait for the disk thousands of
/// times.
pub fn quick_disks() -> Vec<Disk> {
    disks_in(&quick_folder())
}

pub fn quick_folder() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if tempfile::tempdir_in(&memory).is_ok() { memory } else { std::env::temp_dir() }
}

/// Those of [`disks`] whose files are in a directory: memory makes no system calls that could fail but
/// transfers.
pub fn directories() -> Vec<Disk> {
    disks().into_iter().filter(|disk| disk.path().is_some()).collect()
}

fn disks_in(folder: &Path) -> Vec<Disk> {
    let directory = || tempfile::tempdir_in(folder).unwrap();
    let uring = directory();
    let mut disks =
        vec![Disk::Pool(directory()), Disk::Mem(Arc::new(Mem::new(&FaultPlan::default()).unwrap()))];
    match Uring::new(uring.path(), &FaultPlan::default()) {
        Ok(_) => disks.push(Disk::Uring(uring)),
        Err(error) => println!("skipping io_uring: {error}"),
    }
    disks
}

impl Disk {
    pub fn io(&self, faults: &FaultPlan) -> Arc<dyn Io> {
        let io: Arc<dyn Io> = match self {
            Disk::Uring(directory) => Arc::new(Uring::new(directory.path(), faults).unwrap()),
            Disk::Pool(directory) => Arc::new(Pool::new(directory.path(), faults).unwrap()),
            Disk::Mem(mem) => Arc::new(mem.reopen(faults).unwrap()),
        };
        Arc::new(Faulty::new(io, faults))
    }

    pub fn create(&self, specs: Vec<ExtentSpec>, piece_bytes: usize) -> Store {
        self.create_with(specs, &of_pieces(piece_bytes))
    }

    pub fn create_with(&self, specs: Vec<ExtentSpec>, options: &StoreOptions) -> Store {
        Store::create_on(self.io(&FaultPlan::default()), specs, options).unwrap()
    }

    pub fn open(&self) -> Store {
        Store::open_on(self.io(&FaultPlan::default())).unwrap()
    }

    /// Directories for the stripes of a store on this disk, made if need be.
    pub fn stripes(&self, count: usize) -> Vec<PathBuf> {
        let root = self.path().unwrap_or(Path::new("/"));
        let stripes: Vec<_> = (1..=count).map(|number| root.join(format!("stripe-{number}"))).collect();
        for stripe in stripes.iter().filter(|_| self.path().is_some()) {
            std::fs::create_dir_all(stripe).unwrap();
        }
        stripes
    }

    pub fn path(&self) -> Option<&Path> {
        match self {
            Disk::Uring(directory) | Disk::Pool(directory) => Some(directory.path()),
            Disk::Mem(_) => None,
        }
    }
}

pub fn of_pieces(piece_bytes: usize) -> StoreOptions {
    StoreOptions { piece_bytes, ..StoreOptions::default() }
}

pub fn spec(name: &str, bytes: u64, kind: ExtentKind) -> ExtentSpec {
    ExtentSpec { name: name.to_owned(), bytes, kind }
}

pub fn state(name: &str, bytes: u64) -> Vec<ExtentSpec> {
    vec![spec(name, bytes, ExtentKind::State)]
}

pub fn arena(bytes: usize) -> Arena {
    Arena::new(&Budget::new(Tier::Host, 1 << 30), bytes).unwrap()
}

/// Bytes that differ between pieces and rounds.
pub fn pattern(extent: ExtentId, piece: usize, round: u64, bytes: &mut [u8]) {
    let seed = format!("{extent:?}/{piece}/{round}");
    let mut value = seed
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    for byte in bytes {
        value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (value >> 56) as u8;
    }
}

/// Every piece of every extent.
pub fn pieces(store: &Store) -> Vec<(ExtentId, usize)> {
    let ids = store.extents().iter().map(|extent| store.extent(&extent.spec.name).unwrap());
    ids.flat_map(|id| (0..store.piece_count(id).unwrap()).map(move |piece| (id, piece))).collect()
}

pub fn write(
    store: &Store,
    arena: &Arena,
    (extent, piece): (ExtentId, usize),
    round: u64,
) -> Result<(), Error> {
    let mut lease = arena.lease(store.piece_bytes_of(extent, piece)?)?;
    pattern(extent, piece, round, &mut lease);
    let (ticket, on_done) = Ticket::new();
    store.write(extent, piece, lease, on_done);
    ticket.wait().result
}

pub fn read(store: &Store, arena: &Arena, (extent, piece): (ExtentId, usize)) -> Result<Lease, Error> {
    let lease = arena.lease(store.piece_bytes_of(extent, piece)?)?;
    let (ticket, on_done) = Ticket::new();
    store.read(extent, piece, lease, on_done);
    let done = ticket.wait();
    done.result.map(|()| done.lease)
}

/// Writes all pieces at once.
pub fn write_all(store: &Store, arena: &Arena, round: u64) {
    let mut tickets = Vec::new();
    for (extent, piece) in pieces(store) {
        let mut lease = arena.lease(store.piece_bytes_of(extent, piece).unwrap()).unwrap();
        pattern(extent, piece, round, &mut lease);
        let (ticket, on_done) = Ticket::new();
        store.write(extent, piece, lease, on_done);
        tickets.push(ticket);
    }
    for ticket in tickets {
        ticket.wait().result.unwrap();
    }
}

/// Reads a piece and checks that it has the bytes of a round.
#[track_caller]
pub fn expect_round(store: &Store, arena: &Arena, piece: (ExtentId, usize), round: u64) {
    let lease = read(store, arena, piece).unwrap();
    let mut expected = vec![0; lease.len()];
    pattern(piece.0, piece.1, round, &mut expected);
    assert!(lease[..] == expected, "{piece:?} does not have the bytes of round {round}");
}
