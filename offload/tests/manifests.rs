//! Whatever is in a manifest's place, a store is opened or refused: without a panic, and without taking more
//! memory than the document and the files deserve. The documents are those that the fuzzer starts from.

#[path = "../../fuzz/harness/manifest.rs"]
mod manifest;
#[path = "../../fuzz/harness/mutation.rs"]
mod mutation;

use ferrozero_offload::memory;
use std::path::Path;

#[global_allocator]
static ALLOCATOR: memory::CountingAllocator = memory::CountingAllocator;

/// Changes of each stored document.
const CHANGES: usize = 10_000;

const MEMORY_BYTES: u64 = 4 << 20;

#[test]
fn stored_and_changed_manifests_are_opened_or_refused_within_bounded_memory() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/manifest");
    let corpus = mutation::corpus(&folder);
    let good: Vec<_> = ["empty_store", "good", "in_place", "striped"].map(str::to_owned).into();
    let mut mutations = mutation::Mutations(1);
    let mut opened_changes = 0;
    memory::reset_peak();
    let before_bytes = memory::current_bytes();
    for (index, (name, document)) in corpus.iter().enumerate() {
        assert_eq!(manifest::open(document), good.contains(name), "{name}");
        for _ in 0..CHANGES {
            let changed = mutations.change(document, &corpus[(index + 1) % corpus.len()].1);
            manifest::open(&changed);
            opened_changes += usize::from(manifest::open(&manifest::sealed(&changed)));
        }
    }
    assert!(opened_changes > 0, "no change got behind the checksum");
    let taken_bytes = memory::peak_bytes() - before_bytes;
    assert!(taken_bytes < MEMORY_BYTES, "{taken_bytes} bytes were taken at once");
}

#[test]
fn the_documented_manifest_is_one() {
    let page = include_str!("../../docs/format.md");
    let example = page.split("```json").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let document: String = example.lines().map(str::trim).collect();
    assert!(manifest::open(format!("{document}\n").as_bytes()), "{document}");
}
