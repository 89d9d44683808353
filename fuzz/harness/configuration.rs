//! What is done with a text that may be a configuration: by the fuzzer, and by the tests on the stored texts.

use ferrozero::internals::byte_size::ByteSize;
use ferrozero::internals::command::{Settings, TrainArguments, TrainSettings};
use std::path::Path;

/// Reads the text as a size and as settings in JSON. What is accepted comes back the same after it was
/// written.
pub fn resolve(text: &[u8]) {
    if let Some(size) = std::str::from_utf8(text).ok().and_then(|text| text.parse::<ByteSize>().ok()) {
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(text) else { return };
    let Ok(settings) = TrainSettings::resolve(&TrainArguments::default(), Some(value)) else { return };
    expect_sound(&settings);
}

/// Reads the text as settings in TOML; answers whether it was accepted.
pub fn resolve_toml(text: &[u8]) -> bool {
    from_text(text, "train.toml").is_some()
}

/// Reads the text as a configuration of DeepSpeed's; answers whether it was accepted. Where it says how large
/// a batch is, the settings have as many sequences.
pub fn resolve_deepspeed(text: &[u8]) -> bool {
    let Some(settings) = from_text(text, "ds_config.json") else { return false };
    let config = serde_json::from_slice::<serde_json::Value>(text).unwrap_or_default();
    if let Some(batch) = config.get("train_batch_size").and_then(serde_json::Value::as_u64) {
        assert_eq!((settings.run.batch * settings.run.accumulate) as u64, batch);
    }
    if let Some(batch) = config.get("train_micro_batch_size_per_gpu").and_then(serde_json::Value::as_u64) {
        assert_eq!(settings.run.batch as u64, batch);
    }
    true
}

fn from_text(text: &[u8], name: &str) -> Option<TrainSettings> {
    let text = std::str::from_utf8(text).ok()?;
    match TrainSettings::from_text(text, Path::new(name)) {
        Ok(settings) => {
            expect_sound(&settings);
            Some(settings)
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// Settings that were accepted can be computed with, and come back the same after they were written.
fn expect_sound(settings: &TrainSettings) {
    assert!(settings.model(1 << 20).parameter_count() < 1 << 50);
    let written = serde_json::to_value(settings);
    let again = written.map(|value| TrainSettings::resolve(&TrainArguments::default(), Some(value)));
    assert!(matches!(again, Ok(Ok(again)) if again == *settings));
}
