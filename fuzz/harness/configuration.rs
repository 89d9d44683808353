//! What is done with a text that may be a configuration: by the fuzzer, and by the tests on the stored texts.

use ferrozero::byte_size::ByteSize;
use ferrozero::command::{TrainArguments, TrainSettings};

/// Reads the text as a size and as settings. What is accepted comes back the same after it was written.
pub fn resolve(text: &[u8]) {
    if let Some(size) = std::str::from_utf8(text).ok().and_then(|text| text.parse::<ByteSize>().ok()) {
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(text) else { return };
    let Ok(settings) = TrainSettings::resolve(&TrainArguments::default(), Some(value)) else { return };
    // Sizes that were accepted are sizes that can be computed with.
    assert!(settings.model(1 << 20).parameter_count() < 1 << 50);
    let written = serde_json::to_value(&settings);
    let again = written.map(|value| TrainSettings::resolve(&TrainArguments::default(), Some(value)));
    assert!(matches!(again, Ok(Ok(again)) if again == settings));
}
