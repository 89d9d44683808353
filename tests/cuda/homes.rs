//! Which homes a plan finds by itself on a device with memory of its own.

use super::{BLOCKS, homes, on_cuda, tokens, train, trainer};
use ferrozero::internals::planner::machine::Machine;
use ferrozero::{Config, Placement, Tier};

/// Of the model's own tensors: more than they take.
const WORKING_BYTES: u64 = 16 << 20;

/// Where states are best at home on the device, as many as fit.
fn slow_bus() -> Machine {
    let numbers = serde_json::json!({
        "disk_read_bytes_per_s": 1e9,
        "disk_write_bytes_per_s": 1e9,
        "upload_bytes_per_s": 1e6,
        "download_bytes_per_s": 1e6,
        "optimizer_bytes_per_s": 1e9,
        "device_memory_bytes_per_s": 1e12,
    });
    serde_json::from_value(numbers).unwrap()
}

#[test]
fn groups_come_home_to_the_device_by_themselves_as_its_memory_allows() {
    let Some(base) = on_cuda() else { return };
    let expected = train(Config { device: base.device.clone(), ..homes(Tier::Host) }, BLOCKS, 2).unwrap();
    let config = |device_memory_bytes: u64| Config {
        device: base.device.clone(),
        placement: Placement::Auto,
        device_memory_bytes: Some(device_memory_bytes),
        memory_bytes: Some(64 << 20),
        working_bytes: Some(WORKING_BYTES),
        machine: Some(slow_bus()),
        ..homes(Tier::Host)
    };
    let at_home = |device_memory_bytes: u64| {
        let (mut trainer, model) = trainer(config(device_memory_bytes), BLOCKS).unwrap();
        for step in 0..2 {
            trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch))).unwrap();
        }
        assert!(trainer.plan().device_bytes() <= device_memory_bytes);
        let found = trainer.plan().placements().iter().filter(|home| home.master == Tier::Device).count();
        (found, trainer.weights_digest().unwrap(), trainer.plan().device_bytes())
    };
    let groups = BLOCKS + 1;
    let (all, digest, most_bytes) = at_home(1 << 30);
    assert_eq!((all, &digest), (groups, &expected.1));
    // A little less than all of them need: some come home, and some do not.
    let (some, digest, _) = at_home(most_bytes - 64 * 1024);
    assert!(some > 0 && some < groups, "{some} of {groups}");
    assert_eq!(digest, expected.1);
}
