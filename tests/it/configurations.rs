//! Whatever is in a configuration's place gives settings or an error, and settings that are accepted can be
//! computed with. The texts are those that the fuzzer starts from.

#[path = "../../fuzz/harness/configuration.rs"]
mod configuration;
#[path = "../../fuzz/harness/mutation.rs"]
mod mutation;

use ferrozero::internals::command::{RunArguments, TrainArguments, TrainSettings};
use std::path::Path;

/// Changes of each stored text.
const CHANGES: usize = 30_000;

type Corpus = Vec<(String, Vec<u8>)>;

fn corpus(folder: &str) -> Corpus {
    mutation::corpus(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(folder))
}

/// Changes to the texts of a folder, the same in every run.
fn change_all(corpus: &Corpus, mut read: impl FnMut(&[u8])) {
    let mut mutations = mutation::Mutations(1);
    for (index, (_, text)) in corpus.iter().enumerate() {
        for _ in 0..CHANGES {
            read(&mutations.change(text, &corpus[(index + 1) % corpus.len()].1));
        }
    }
}

/// Reads all texts and changes to them; those that are accepted as they are must be these.
fn expect_accepted(corpus: &Corpus, read: fn(&[u8]) -> bool, expected: &[&str]) {
    let accepted: Vec<_> = corpus.iter().filter(|(_, text)| read(text)).map(|(name, _)| name).collect();
    assert_eq!(accepted, expected);
    let mut changed = 0;
    change_all(corpus, |text| changed += usize::from(read(text)));
    assert!(changed > corpus.len(), "only {changed} changes were accepted");
}

#[test]
fn stored_and_changed_configurations_are_settings_or_an_error() {
    let corpus = corpus("configuration");
    corpus.iter().for_each(|(_, text)| configuration::resolve(text));
    change_all(&corpus, configuration::resolve);
}

#[test]
fn stored_and_changed_texts_in_toml_are_settings_or_an_error() {
    let expected = ["all", "comment", "deepspeed", "empty", "negative_zero", "strings"];
    expect_accepted(&corpus("toml"), configuration::resolve_toml, &expected);
}

#[test]
fn stored_and_changed_configurations_of_deepspeed_are_settings_or_an_error() {
    let expected = [
        "all",
        "auto",
        "batch_alone",
        "batch_of_accumulation",
        "bf16",
        "folder_number",
        "folder_root",
        "fp16",
        "warmup",
    ];
    expect_accepted(&corpus("deepspeed"), configuration::resolve_deepspeed, &expected);
}

#[test]
fn a_file_that_is_refused_is_named() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/configuration");
    let accepted = ["all", "object", "small"];
    for (name, _) in corpus("configuration") {
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
