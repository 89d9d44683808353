//! What a user of the command line can do about the library's errors. The library knows no options.

use crate::data::error::DataError;
use std::error::Error;

/// Settings as the library calls them, and the options that set them.
const OPTIONS: [(&str, &str); 4] = [
    ("Config::device_memory_bytes", "--device-memory"),
    ("Config::memory_bytes", "--memory"),
    ("Config::directory", "--dir"),
    ("Config::resume", "--resume"),
];

/// An error's text, with the options in the place of the library's settings.
pub fn in_options(text: String) -> String {
    OPTIONS.iter().fold(text, |text, (setting, option)| text.replace(setting, option))
}

/// The option that helps where the text names no setting.
pub fn advice(error: &(dyn Error + 'static)) -> Option<&'static str> {
    match error.downcast_ref()? {
        DataError::Empty { .. } => Some("name a text file, or a folder with text files, by --data PATH"),
        DataError::TooSmall { .. } => Some("use more text, or a shorter --seq"),
        DataError::Tokenizer { .. } => Some("give another tokenizer by --tokenizer FILE"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrozero_offload::Tier;

    #[test]
    fn the_command_line_names_options_and_the_library_settings() {
        for (tier, setting, option) in [
            (Tier::Host, "Config::memory_bytes", "raise --memory to"),
            (Tier::Device, "Config::device_memory_bytes", "raise --device-memory to"),
        ] {
            let (needed_bytes, budget_bytes, least_bytes) = (3, 2, 3);
            let culprit = "all of it".to_owned();
            let error =
                crate::Error::BudgetTooSmall { tier, needed_bytes, budget_bytes, least_bytes, culprit };
            let text = error.to_string();
            assert!(text.contains(setting) && !text.contains("--"), "{text}");
            assert!(in_options(text.clone()).contains(option), "{text}");
        }
        let error: Box<dyn Error> = Box::new(DataError::Empty { place: "attic".into() });
        assert!(advice(&*error).is_some_and(|text| text.contains("--data")));
        assert!(!error.to_string().contains("--"));
    }
}
