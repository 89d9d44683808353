//! Where never changes what: losses and weights have the same bits for every placement, disk backend, number
//! of slots, look-ahead, pieces of state, gradient sets, moment of updates, piece size, number of threads,
//! home of boundaries, number of micro-batches that run vertically, and number of segments that are not
//! computed again.

use crate::support::{tokens, train, trainer};
use ferrozero::internals::schedule::buffer_plan::GroupPlacement;
use ferrozero::{BackendChoice, Config, Placement, Tier, Updates};

const BLOCKS: usize = 4;
const STEPS: u64 = 3;

/// A way to run, and its name for the message when it differs.
struct Way {
    name: String,
    config: Config,
    /// Keeps the folder of a run on disk until the run is over.
    _folder: Option<tempfile::TempDir>,
}

fn way(name: impl Into<String>, config: Config) -> Way {
    Way { name: name.into(), config, _folder: None }
}

fn on_disk(name: &str, config: Config) -> Way {
    // Not in memory-backed /tmp: direct I/O should be what is tested where the system has it.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = Config { directory: Some(folder.path().join("run")), ..config };
    Way { name: name.into(), config, _folder: Some(folder) }
}

fn ways() -> Vec<Way> {
    let homes =
        |tier| Config { placement: Placement::All(tier), piece_bytes: Some(8192), ..Config::default() };
    let mut ways = vec![way("host", homes(Tier::Host)), way("device", homes(Tier::Device))];
    for backend in [BackendChoice::Uring, BackendChoice::Pool] {
        ways.push(on_disk(&format!("disk, {backend:?}"), Config { backend, ..homes(Tier::Disk) }));
    }
    let memory = || Config { backend: BackendChoice::Memory, ..homes(Tier::Disk) };
    for slots in 1..=3 {
        for look_ahead in [1, 2, 5] {
            let name = format!("{slots} slots, {look_ahead} pieces ahead");
            ways.push(way(name, Config { slots: Some(slots), look_ahead: Some(look_ahead), ..memory() }));
        }
    }
    for (state_pieces, gradient_sets) in [(4, 1), (8, 3)] {
        let name = format!("{state_pieces} pieces of state, {gradient_sets} gradient sets");
        let (state_pieces, gradient_sets) = (Some(state_pieces), Some(gradient_sets));
        ways.push(way(name, Config { state_pieces, gradient_sets, ..memory() }));
    }
    for piece_bytes in [4096, 12288, 1 << 20] {
        ways.push(way(
            format!("pieces of {piece_bytes}"),
            Config { piece_bytes: Some(piece_bytes), ..memory() },
        ));
    }
    for threads in [1, 2] {
        ways.push(way(format!("{threads} threads"), Config { threads: Some(threads), ..memory() }));
    }
    for boundaries in [Tier::Host, Tier::Disk] {
        for slots in 1..=3 {
            ways.push(way(
                format!("boundaries on {boundaries}, {slots} slots"),
                Config { boundaries: Some(boundaries), slots: Some(slots), ..memory() },
            ));
        }
    }
    for (kept, boundaries) in [(1, Tier::Device), (2, Tier::Disk), (3, Tier::Host), (BLOCKS, Tier::Disk)] {
        ways.push(way(
            format!("{kept} graphs kept, boundaries on {boundaries}"),
            Config { kept: Some(kept), boundaries: Some(boundaries), ..memory() },
        ));
    }
    for mixed in [
        GroupPlacement {
            master: Tier::Device,
            first_moment: Tier::Disk,
            second_moment: Tier::Host,
            gradient: Tier::Disk,
        },
        GroupPlacement {
            master: Tier::Disk,
            first_moment: Tier::Host,
            second_moment: Tier::Device,
            gradient: Tier::Host,
        },
        GroupPlacement {
            master: Tier::Host,
            first_moment: Tier::Device,
            second_moment: Tier::Disk,
            gradient: Tier::Device,
        },
    ] {
        ways.push(way(format!("{mixed:?}"), Config { placement: Placement::Each(mixed), ..memory() }));
    }
    ways
}

/// Every way with its micro-batches one after another, and with some or all of them vertical.
fn ways_of(accumulate: usize) -> impl Iterator<Item = Way> {
    let alone = ways().into_iter();
    let vertical = ways().into_iter().enumerate().filter(move |_| accumulate > 1).map(move |(index, way)| {
        let vertical = 2 + index % (accumulate - 1);
        let config = Config { vertical: Some(vertical), ..way.config };
        Way { name: format!("{}, {vertical} vertical", way.name), config, ..way }
    });
    alone.chain(vertical)
}

/// Runs every way with and without clipping, and with one and four micro-batches.
fn one_digest(clip: Option<f64>, accumulate: usize) {
    let with = |config: Config| Config { clip, accumulate, ..config };
    let reference = Config { placement: Placement::All(Tier::Device), ..Config::default() };
    let expected = train(with(Config { vertical: Some(1), ..reference }), BLOCKS, STEPS).unwrap();
    for way in ways_of(accumulate) {
        let found = match train(with(way.config), BLOCKS, STEPS) {
            Err(ferrozero::Error::Offload(ferrozero_offload::Error::UringUnavailable { source })) => {
                println!("skipped {}: io_uring is not available here ({source})", way.name);
                continue;
            }
            found => found.unwrap_or_else(|error| panic!("{}: {error}", way.name)),
        };
        assert_eq!(found, expected, "{} (clip {clip:?}, {accumulate} micro-batches)", way.name);
    }
}

#[test]
fn without_clipping() {
    one_digest(None, 1);
}

#[test]
fn with_clipping() {
    one_digest(Some(0.05), 1);
}

#[test]
fn without_clipping_over_four_micro_batches() {
    one_digest(None, 4);
}

#[test]
fn with_clipping_over_four_micro_batches() {
    one_digest(Some(0.05), 4);
}

#[test]
fn whenever_updates_are_made() {
    let with = |updates| Config { clip: Some(0.05), updates, ..Config::default() };
    let expected = train(with(None), BLOCKS, STEPS).unwrap();
    for tier in [Tier::Device, Tier::Disk] {
        for updates in [Updates::AtOnce, Updates::NextForward] {
            let homes = Config {
                placement: Placement::All(tier),
                backend: BackendChoice::Memory,
                ..with(Some(updates))
            };
            assert_eq!(train(homes, BLOCKS, STEPS).unwrap(), expected, "{tier}, {updates:?}");
        }
    }
}

#[test]
fn a_clip_that_is_never_reached_changes_nothing() {
    let unclipped = train(Config::default(), BLOCKS, STEPS).unwrap();
    assert_eq!(train(Config { clip: Some(1e9), ..Config::default() }, BLOCKS, STEPS).unwrap(), unclipped);
    assert_ne!(train(Config { clip: Some(0.05), ..Config::default() }, BLOCKS, STEPS).unwrap(), unclipped);
}

/// Here nothing counts the heap, so what the run says of device memory is what it leased.
#[test]
fn what_each_way_leases_is_what_its_plan_said_to_the_byte() {
    for (clip, accumulate) in [(None, 1), (Some(0.05), 2), (None, 3)] {
        for Way { name, config, _folder } in ways_of(accumulate) {
            let (mut trainer, model) = match trainer(Config { clip, accumulate, ..config }, BLOCKS) {
                Err(ferrozero::Error::Offload(ferrozero_offload::Error::UringUnavailable { .. })) => {
                    println!("skipped {name}: io_uring is not available here");
                    continue;
                }
                made => made.unwrap(),
            };
            trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
            let (usage, plan) = (trainer.usage(), trainer.plan());
            assert_eq!(usage.peak_host_bytes, plan.host_bytes(), "{name}");
            assert_eq!(usage.peak_device_bytes, plan.device_buffer_bytes(), "{name}");
        }
    }
}

#[test]
fn another_seed_gives_other_weights() {
    let default = train(Config::default(), 1, 1).unwrap();
    assert_ne!(train(Config { seed: 1, ..Config::default() }, 1, 1).unwrap(), default);
}
