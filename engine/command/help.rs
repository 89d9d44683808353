//! What `--help` tells beside the options: examples that can be copied.

pub const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 an error that is told on standard error, 2 a command line that is not understood,
130 ended at once by a second Ctrl-C.

FERROZERO_LOG=debug writes on standard error what the engine does, FERROZERO_LOG=trace every operation too.";

pub const TRAIN: &str = "\
Examples:
  ferrozero train
  ferrozero train --data book.txt --layers 6 --hidden 384 --heads 6 --steps 300 --dir book-run
  ferrozero train --dir book-run --resume --steps 600
  ferrozero train --quiet --tensorboard events
  ferrozero train --json > steps.jsonl

Ctrl-C finishes the step, commits and stops; a second one stops at once.";

pub const FINETUNE: &str = "\
Examples:
  ferrozero finetune SmolLM2-135M --data answers.jsonl --out tuned
  ferrozero finetune Llama-3.2-1B --data answers.jsonl --out adapters --lora-rank 16 --memory 4GiB
  ferrozero finetune model.gguf --tokenizer tokenizer.json --data book.txt --out tuned --epochs 2
  ferrozero finetune SmolLM2-135M --data answers.jsonl --out tuned --json --trace trace.json > steps.jsonl

Ctrl-C finishes the step, commits and writes the result so far; --resume goes on.";

pub const GENERATE: &str = "\
Examples:
  ferrozero generate SmolLM2-135M --prompt \"Once upon a time\"
  ferrozero generate tuned --prompt \"Question: why?\" --tokens 200 --temperature 0 --memory 1GiB
  ferrozero generate SmolLM2-135M-Instruct --chat --system Briefly. --prompt \"Question: why?\"";

pub const REPORT: &str = "\
Examples:
  ferrozero report ferrozero-run
  ferrozero report book-run -o book.html

The page is one file that needs no network. A run that goes on can be looked at too.";

pub const INSPECT: &str = "\
Examples:
  ferrozero inspect ferrozero-run
  ferrozero inspect ferrozero-run --json";

pub const VERIFY: &str = "\
Examples:
  ferrozero verify ferrozero-run
  ferrozero verify ferrozero-run --json";

pub const COPY: &str = "\
Examples:
  ferrozero copy ferrozero-run backup
  ferrozero copy ferrozero-run /mnt/a/run --stripe /mnt/b/run";

pub const EXPORT: &str = "\
Examples:
  ferrozero export ferrozero-run model.safetensors";

pub const IMPORT: &str = "\
Examples:
  ferrozero import model.safetensors new-run && ferrozero train --resume --dir new-run";

pub const PROBE: &str = "\
Examples:
  ferrozero probe
  ferrozero probe --device cuda:0
  ferrozero probe --dir /mnt/nvme/run --out workstation.json --again";

pub const PLAN: &str = "\
Examples:
  ferrozero probe && ferrozero plan --machine machine.json --memory 384MiB
  ferrozero plan --model gpt3-13b --device rtx4090-24g --host 128GiB --nvme 7GB/s --seq 1024
  ferrozero plan --model llama/config.json --device h100-80g --host 128GiB --nvme nvme-gen4 --json
  ferrozero plan --model gpt2 --device rtx4090-24g --host 64GiB --nvme nvme-gen4 --max-model

Memory and time of computing are estimated from the model's shape. `ferrozero train` measures both
before it plans.";

pub const CONFIG: &str = "\
Examples:
  ferrozero config explain ds_config.json
  ferrozero config explain --for finetune finetune.toml
  ferrozero config schema > train.schema.json";

pub const COMPLETIONS: &str = "\
Examples:
  ferrozero completions bash > ~/.local/share/bash-completion/completions/ferrozero
  ferrozero completions zsh > ~/.zfunc/_ferrozero";

pub const MAN: &str = "\
Examples:
  ferrozero man > ferrozero.1 && man ./ferrozero.1";

pub const BENCH: &str = "\
Examples:
  ferrozero bench adamw --elements 16777216
  ferrozero bench copy --device cuda:0
  ferrozero bench io --dir /mnt/nvme/bench --bytes 4GiB
  ferrozero bench ops --rounds 5
  ferrozero bench scale --hidden 2048 --heads 16 --grants 1GiB,4GiB,16GiB
  ferrozero bench step --placement disk --against device --json";

#[cfg(test)]
mod tests {
    use super::super::CommandLine;
    use clap::CommandFactory;

    #[test]
    fn every_command_has_examples_of_itself() {
        for command in CommandLine::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let name = command.get_name();
            assert!(help.starts_with("Examples:\n"), "{name}: {help}");
            assert!(help.contains(&format!("ferrozero {name}")), "{name}: {help}");
        }
    }

    #[test]
    fn what_examples_show_is_understood() {
        for command in CommandLine::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for example in help.lines().filter_map(|line| line.strip_prefix("  ferrozero ")) {
                let example =
                    example.replace("\"Once upon a time\"", "text").replace("\"Question: why?\"", "text");
                let first = example.split([';', '&', '>']).next().unwrap_or_default();
                let line = std::iter::once("ferrozero").chain(first.split_whitespace());
                let parsed = CommandLine::command().try_get_matches_from(line);
                assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
            }
        }
    }
}
