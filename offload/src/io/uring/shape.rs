//! How large parts are and how many are in flight: measured once for each device and remembered.
//!
//! What a disk likes best differs from disk to disk, and no user should have to know it. So a store that is
//! made on a disk not seen before reads a little from its own, still empty files in several ways and keeps
//! the fastest. Reads decide, so that the measurement wears the disk by little more than the one region that
//! it has to write first; but what reads faster is kept only if it does not write more slowly.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use io_uring::types;
use serde::{Deserialize, Serialize};

use super::*;
use crate::{Arena, Budget, Lease, PAGE_BYTES, Tier, io::Verb, io::directory::OpenFile};

/// Size and number of the parts that are in flight at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    /// Most bytes of one part, a multiple of [`PAGE_BYTES`].
    pub(super) part_bytes: usize,
    /// Parts in flight at once.
    pub(super) depth: usize,
}

/// Most parts in flight, over all directories.
const DEPTH_MAX: usize = 64;

/// Submission entries: all parts and the wake-up.
pub(super) const ENTRIES: u32 = 2 * DEPTH_MAX as u32;

/// What is right for most drives, and stays unless another way is clearly faster. Large parts cost the least
/// time of the processor, which the optimizer wants; the kernel splits what is too long for the drive.
const DEFAULT: Shape = Shape { part_bytes: 4 << 20, depth: 16 };

/// Ways to try, the default first.
const CANDIDATES: [Shape; 4] = [
    DEFAULT,
    Shape { part_bytes: 4 << 20, depth: 8 },
    Shape { part_bytes: 1 << 20, depth: 32 },
    Shape { part_bytes: 256 << 10, depth: 32 },
];

/// Seconds of each way in one round.
type Round = [f64; CANDIDATES.len()];

/// Largest part that is believed when a file says so.
const PART_BYTES_MAX: usize = 4 << 20;

/// Bytes that are written once and then read in each way.
const REGION_BYTES: u64 = 128 << 20;

/// Smallest file that is worth a measurement.
const FILE_BYTES_MIN: u64 = 4 * REGION_BYTES;

/// Times that each way is tried, and the fewest that mean anything.
const ROUNDS: usize = 5;
const ROUNDS_MIN: usize = 3;

/// After this the measurement ends with what it knows.
const TIME_MAX: Duration = Duration::from_millis(1000);

/// To replace the default, a way must take less than this part of its time, and in every round: others may be
/// using the disk.
const CLEARLY_FASTER: f64 = 0.95;

impl Shape {
    /// The same for each of several directories, within the ring's places.
    pub(super) fn over(self, directories: usize) -> Self {
        Self { depth: self.depth.saturating_mul(directories).min(DEPTH_MAX), ..self }
    }

    fn is_sound(self) -> bool {
        let is_size = self.part_bytes.is_multiple_of(PAGE_BYTES) && self.part_bytes <= PART_BYTES_MAX;
        is_size && self.part_bytes > 0 && (1..=DEPTH_MAX).contains(&self.depth)
    }
}

/// The shape for these files. Only files that `are_new`, so that nothing in them is lost, are written to.
pub(super) fn choose(ring: &mut IoUring, files: &[OpenFile], are_new: bool) -> Shape {
    let Some(first) = files.first().filter(|first| first.is_direct) else { return DEFAULT };
    let Ok(metadata) = first.file.metadata() else { return DEFAULT };
    if metadata.len() < FILE_BYTES_MIN {
        return DEFAULT;
    }
    let device = device_name(&first.file, metadata.dev());
    let cache = Cache::of_user();
    if let Some(shape) = cache.as_ref().and_then(|cache| cache.load().remove(&device)) {
        return shape;
    }
    if !are_new {
        return DEFAULT;
    }
    match measure(ring, &first.file, REGION_BYTES, TIME_MAX) {
        Ok(shape) => {
            tracing::info!(device, ?shape, "measured the disk");
            if let Some(cache) = cache {
                cache.save(device, shape);
            }
            shape
        }
        // The first transfer will meet the same error and report it.
        Err(error) => {
            tracing::info!(device, %error, "could not measure the disk");
            DEFAULT
        }
    }
}

/// Device and file system: either may change what is fast.
fn device_name(file: &File, device: u64) -> String {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let kind = rustix::fs::fstatfs(file).map_or(0, |statistics| statistics.f_type);
    format!("{major}:{minor} {kind:x}")
}

/// Writes a region of a file, reads it in all ways, in turns, and writes some of it again if that is worth
/// it.
fn measure(ring: &mut IoUring, file: &File, region_bytes: u64, time_max: Duration) -> io::Result<Shape> {
    let deadline = Instant::now() + time_max;
    // Gone before the store is made, and so before anything large is allocated.
    let budget = Budget::new(Tier::Host, PART_BYTES_MAX as u64);
    let mut buffer = Arena::new(&budget, PART_BYTES_MAX)
        .and_then(|arena| arena.lease(PART_BYTES_MAX))
        .map_err(io::Error::other)?;
    // Space that was never written reads as zeros without the disk.
    sweep((ring, file), Verb::Write, DEFAULT, region_bytes, &mut buffer)?;
    let mut rounds = Vec::with_capacity(ROUNDS);
    'rounds: for _ in 0..ROUNDS {
        let mut round = [0.0; CANDIDATES.len()];
        for (shape, taken_s) in CANDIDATES.into_iter().zip(&mut round) {
            if Instant::now() >= deadline {
                break 'rounds;
            }
            *taken_s = sweep((ring, file), Verb::Read, shape, region_bytes, &mut buffer)?;
        }
        rounds.push(round);
    }
    let challenger = fastest(&rounds);
    if challenger == DEFAULT {
        return Ok(DEFAULT);
    }
    let mut writes_s = [0.0; 2];
    for _ in 0..ROUNDS_MIN {
        for (shape, taken_s) in [DEFAULT, challenger].into_iter().zip(&mut writes_s) {
            *taken_s += sweep((ring, file), Verb::Write, shape, region_bytes / 2, &mut buffer)?;
        }
    }
    Ok(if writes_s[1] <= writes_s[0] { challenger } else { DEFAULT })
}

/// The way that was clearly faster than the default in every round, by the most; else the default.
fn fastest(rounds: &[Round]) -> Shape {
    let worst_ratio = |way: usize| rounds.iter().map(|round| round[way] / round[0]).fold(0.0, f64::max);
    let ways = CANDIDATES.into_iter().enumerate().map(|(way, shape)| (shape, worst_ratio(way)));
    let fastest = ways.min_by(|(_, one), (_, other)| one.total_cmp(other));
    let is_clear = |ratio: f64| rounds.len() >= ROUNDS_MIN && ratio < CLEARLY_FASTER;
    fastest.filter(|&(_, ratio)| is_clear(ratio)).map_or(DEFAULT, |(shape, _)| shape)
}

/// Moves a region of a file once; answers the seconds that it took.
fn sweep(
    (ring, file): (&mut IoUring, &File),
    verb: Verb,
    shape: Shape,
    region_bytes: u64,
    buffer: &mut Lease,
) -> io::Result<f64> {
    let (started, file) = (Instant::now(), types::Fd(file.as_raw_fd()));
    let memory = buffer.padded_mut();
    let part_bytes = shape.part_bytes.min(memory.len());
    let mut offsets = (0..region_bytes).step_by(part_bytes);
    let (mut in_flight, mut result) = (0, Ok(()));
    loop {
        while in_flight < shape.depth && result.is_ok() {
            let Some(offset_bytes) = offsets.next() else { break };
            let length = part_bytes as u32;
            let entry = match verb {
                Verb::Read => {
                    opcode::Read::new(file, memory.as_mut_ptr(), length).offset(offset_bytes).build()
                }
                Verb::Write => opcode::Write::new(file, memory.as_ptr(), length).offset(offset_bytes).build(),
            };
            // SAFETY: the buffer is as long as a part and is borrowed until all parts have completed, below.
            // What several parts leave in it at once is never looked at.
            match unsafe { ring.submission().push(&entry) } {
                Ok(()) => in_flight += 1,
                Err(_) => result = Err(io::Error::other("the ring is full")),
            }
        }
        if in_flight == 0 {
            return result.map(|()| started.elapsed().as_secs_f64());
        }
        // Whatever the error, the kernel may still be using the buffer: there is nothing to do but to try
        // again.
        if ring.submit_and_wait(1).is_err_and(|error| error.kind() != io::ErrorKind::Interrupted) {
            thread::sleep(Duration::from_millis(1));
        }
        for completion in ring.completion() {
            in_flight -= 1;
            match usize::try_from(completion.result()) {
                Ok(moved_bytes) if moved_bytes == part_bytes => {}
                Ok(_) => result = Err(io::Error::other("a short transfer")),
                Err(_) => result = Err(io::Error::from_raw_os_error(-completion.result())),
            }
        }
    }
}

/// Shapes by device, in a file of the user's. It only saves time: what cannot be read is measured again, and
/// what cannot be written is measured every time.
struct Cache {
    path: PathBuf,
}

type Shapes = BTreeMap<String, Shape>;

impl Cache {
    /// `ferrozero/disk.json` in the user's cache folder; none where the system knows no such folder.
    fn of_user() -> Option<Self> {
        let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(Self { path: caches.join("ferrozero").join("disk.json") })
    }

    fn load(&self) -> Shapes {
        let text = fs::read(&self.path).unwrap_or_default();
        let mut shapes: Shapes = serde_json::from_slice(&text).unwrap_or_default();
        shapes.retain(|_, shape| shape.is_sound());
        shapes
    }

    fn save(&self, device: String, shape: Shape) {
        let mut shapes = self.load();
        shapes.insert(device, shape);
        let new_path = self.path.with_extension(format!("{}.new", std::process::id()));
        let saved = || -> io::Result<()> {
            fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))?;
            fs::write(&new_path, serde_json::to_vec(&shapes)?)?;
            // In one step, so that no other process reads half a file.
            fs::rename(&new_path, &self.path)
        };
        if let Err(error) = saved() {
            let _ = fs::remove_file(&new_path);
            tracing::debug!(path = %self.path.display(), %error, "the disk's measurement was not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_stays_unless_another_way_is_clearly_faster() {
        let rounds = |way: usize, times_s: &[f64]| -> Vec<Round> {
            let round = |&taken_s: &f64| {
                let mut round = [1.0; CANDIDATES.len()];
                round[way] = taken_s;
                round
            };
            times_s.iter().map(round).collect()
        };
        assert_eq!(fastest(&rounds(2, &[0.8, 0.9, 0.7])), CANDIDATES[2]);
        assert_eq!(fastest(&rounds(2, &[0.97, 0.97, 0.97])), DEFAULT);
        assert_eq!(fastest(&rounds(3, &[0.5, 0.5, 1.1])), DEFAULT, "slower once");
        assert_eq!(fastest(&rounds(3, &[0.5, 0.5])), DEFAULT, "too few rounds");
        assert_eq!(fastest(&[]), DEFAULT, "nothing was measured in time");
        for shape in CANDIDATES {
            assert!(shape.is_sound() && REGION_BYTES.is_multiple_of(shape.part_bytes as u64), "{shape:?}");
            assert!(shape.over(3).is_sound() && shape.over(usize::MAX).depth == DEPTH_MAX);
        }
    }

    #[test]
    fn a_measurement_reads_the_file_and_reports_a_disk_that_fails() {
        let Ok(mut ring) = IoUring::new(ENTRIES) else { return println!("skipping: no io_uring") };
        let file = tempfile::tempfile().unwrap();
        let shape = measure(&mut ring, &file, 8 * PART_BYTES_MAX as u64, TIME_MAX).unwrap();
        assert!(CANDIDATES.contains(&shape));
        assert_eq!(file.metadata().unwrap().len(), 8 * PART_BYTES_MAX as u64, "the region and no more");
        // A file that ends early, and one that cannot be read at all: an error, and nothing left in flight.
        let mut buffer =
            Arena::new(&Budget::new(Tier::Host, 4 << 20), 4 << 20).unwrap().lease(4 << 20).unwrap();
        file.set_len(5 << 20).unwrap();
        assert!(sweep((&mut ring, &file), Verb::Read, DEFAULT, 16 << 20, &mut buffer).is_err());
        let read_only = File::open("/proc/self/exe").unwrap();
        assert!(measure(&mut ring, &read_only, REGION_BYTES, TIME_MAX).is_err());
        assert_eq!(ring.completion().count(), 0);
    }

    #[test]
    fn the_cache_keeps_what_is_sound_and_stands_for_nothing_when_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { path: folder.path().join("deep").join("disk.json") };
        assert!(cache.load().is_empty());
        cache.save("254:0 ef53".into(), CANDIDATES[3]);
        cache.save("8:1 ef53".into(), DEFAULT);
        let expected = [("254:0 ef53".to_owned(), CANDIDATES[3]), ("8:1 ef53".to_owned(), DEFAULT)];
        assert_eq!(cache.load(), Shapes::from(expected));
        let unsound = r#"{"a":{"part_bytes":4096,"depth":0},"b":{"part_bytes":1,"depth":8},
            "c":{"part_bytes":4096,"depth":8}}"#;
        for (text, devices) in [("", 0), ("{", 0), ("[1]", 0), (r#"{"a":7}"#, 0), (unsound, 1)] {
            fs::write(&cache.path, text).unwrap();
            assert_eq!(cache.load().len(), devices, "{text}");
        }
        // A folder where the file should be: nothing is kept and nothing fails.
        let blocked = Cache { path: folder.path().join("deep") };
        blocked.save("8:1 ef53".into(), DEFAULT);
        assert!(blocked.load().is_empty());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
