//! Whatever is in a configuration's place gives settings or an error, and settings that are accepted can be computed
//! with. The texts are those that the fuzzer starts from.

#[path = "../fuzz/harness/configuration.rs"]
mod configuration;
#[path = "../fuzz/harness/mutation.rs"]
mod mutation;

use ferrozero::command::{RunArguments, TrainArguments, TrainSettings};
use std::path::Path;

/// Changes of each stored text.
const CHANGES: usize = 30_000;

#[test]
fn stored_and_changed_configurations_are_settings_or_an_error() {
    let corpus = mutation::corpus(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/configuration"));
    let mut mutations = mutation::Mutations(1);
    for (index, (_, text)) in corpus.iter().enumerate() {
        configuration::resolve(text);
        for _ in 0..CHANGES {
            configuration::resolve(&mutations.change(text, &corpus[(index + 1) % corpus.len()].1));
        }
    }
}

#[test]
fn a_file_that_is_refused_is_named() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/configuration");
    let accepted = ["all", "object", "small"];
    for (name, _) in mutation::corpus(&folder) {
        let run = RunArguments { config: Some(folder.join(&name)), ..RunArguments::default() };
        let arguments = TrainArguments { run, ..TrainArguments::default() };
        match TrainSettings::resolve(&arguments, None) {
            Ok(_) => assert!(accepted.contains(&name.as_str()), "{name} was accepted"),
            Err(error) => {
                assert!(!accepted.contains(&name.as_str()), "{name}: {error}");
                // What is wrong only together with other settings names them instead.
                let named = error.to_string().contains(&name) || name == "huge";
                assert!(named, "{name}: {error}");
            }
        }
    }
}
