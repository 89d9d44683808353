//! `cargo +nightly fuzz run deepspeed`: any text in the place of a configuration of DeepSpeed's gives
//! settings or an error.
#![no_main]

#[allow(dead_code, reason = "shared with the other targets")]
#[path = "../harness/configuration.rs"]
mod configuration;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    configuration::resolve_deepspeed(text);
});
