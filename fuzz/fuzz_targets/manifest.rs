//! `cargo +nightly fuzz run manifest`: any document in a manifest's place is opened or refused.
#![no_main]

#[path = "../harness/manifest.rs"]
mod manifest;

libfuzzer_sys::fuzz_target!(|document: &[u8]| {
    manifest::open(document);
    manifest::open(&manifest::sealed(document));
});
