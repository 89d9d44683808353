//! The examples run and end with what they promise. Cargo builds them beside the tests.

use std::path::PathBuf;
use std::process::Command;

/// Runs an example and answers the last line that it prints.
fn last_line(name: &str) -> String {
    // target/PROFILE/deps/THIS_TEST beside target/PROFILE/examples/NAME.
    let this = std::env::current_exe().unwrap();
    let profile = this.ancestors().nth(2).unwrap();
    let example: PathBuf = profile.join("examples").join(name);
    assert!(
        example.exists(),
        "{} is not built: `cargo test` builds it, and so does `cargo build --examples`",
        example.display()
    );
    let output = Command::new(&example).output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} ended with {}: {errors}\n{text}", output.status);
    text.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn the_engine_has_the_losses_of_plain_candle() {
    let line = last_line("wrap_candle_model");
    let difference = line.strip_prefix("largest difference of two losses: ");
    let difference: f32 =
        difference.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{line}"));
    assert!(difference < 1e-4, "{line}");
}

#[test]
fn a_resumed_research_loop_ends_with_the_same_bits() {
    assert_eq!(last_line("embed_in_research_loop"), "the digests are equal");
}
