//! A wait between streams that is left out is seen.

use super::{folder, homes, on_cuda, train};
use ferrozero::testing::{CudaCall, CudaFailure, CudaFault, CudaLane};
use ferrozero::{Config, Tier};

/// What the software driver says of the runs below is read from a file of theirs, named like this.
const RACES: &str = "SIMCUDA_RACE_FILE";
const FORGOTTEN: &str = "FERROZERO_TEST_FORGOTTEN_WAIT";

fn lane(name: &str) -> CudaLane {
    match name {
        "upload" => CudaLane::Upload,
        "download" => CudaLane::Download,
        "optimizer" => CudaLane::Optimizer,
        _ => CudaLane::Compute,
    }
}

/// Runs in a process of its own, which [`a_wait_that_is_forgotten_is_seen`] starts.
#[test]
#[ignore = "part of another test"]
fn forgets_a_wait() {
    let Some(base) = on_cuda() else { return };
    let forgotten = std::env::var(FORGOTTEN).unwrap_or_default();
    let fault = forgotten.split_once(' ').map(|(name, index)| CudaFault {
        call: CudaCall::Wait(lane(name)),
        index: index.parse().unwrap(),
        how: CudaFailure::Forgotten,
    });
    let boundaries = Some(Tier::Host);
    let tier = if forgotten.starts_with("optimizer") { Tier::Device } else { Tier::Disk };
    let config = Config { device: base.device, slots: Some(1), boundaries, cuda_fault: fault, ..homes(tier) };
    // Wrong numbers may stop it.
    let _ = train(config, 2, 1);
}

/// The proof that the runs above would have found a missing order between streams: the same engine without
/// one wait, which is one of the first twelve of each stream.
#[test]
fn a_wait_that_is_forgotten_is_seen() {
    if std::env::var(RACES).is_err() {
        println!("skipped: only the software driver sees which accesses are not ordered");
        return;
    }
    if !super::runs_at_once() {
        println!("skipped: one mode of the driver shows it as well as all");
        return;
    }
    let folder = folder();
    let sees = |forgotten: &str| {
        let races = folder.path().join(forgotten);
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "orders::forgets_a_wait", "--ignored"])
            .env(FORGOTTEN, forgotten)
            // Each operation runs when it is enqueued: the driver then takes least for ordered that only
            // happened to be.
            .env("SIMCUDA_MODE", "eager")
            .env(RACES, &races)
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        std::fs::metadata(races).is_ok_and(|file| file.len() > 0)
    };
    assert!(!sees("none"), "no wait is forgotten");
    // Most waits come after something that has been waited for anyway, so not each of them can be missed.
    for name in ["compute", "upload", "download", "optimizer"] {
        let seen = (0..12).find(|index| sees(&format!("{name} {index}")));
        println!("the first forgotten wait of the {name} stream that was seen: {seen:?}");
        assert!(seen.is_some(), "{name}");
    }
}
