//! `cargo +nightly fuzz run configuration`: any text in a configuration's place gives settings or an error.
#![no_main]

#[allow(dead_code, reason = "shared with the other targets")]
#[path = "../harness/configuration.rs"]
mod configuration;

libfuzzer_sys::fuzz_target!(|text: &[u8]| configuration::resolve(text));
