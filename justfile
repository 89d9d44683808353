# Everyday commands (https://just.systems). Each is a line that you can also type.

# Lists the commands.
default:
    @just --list

# Formats all code.
format:
    cargo fmt --all

# Checks format and lints, without and with the `cuda` feature. No CUDA toolkit needed.
lint:
    cargo fmt --all -- --check
    cargo clippy --workspace --all-targets -- -D warnings
    scripts/lint_cuda

# Runs all tests, or those whose name contains FILTER.
test filter="":
    cargo test --workspace {{ filter }}

# Runs what CI runs.
ci:
    .ci/run

# Runs the CUDA tests on the software CUDA driver: eager, late, random, ci or all.
cuda mode="all":
    scripts/cuda_check {{ mode }}

# Builds the documentation and opens it.
doc:
    cargo doc --workspace --no-deps --open

# Measures, for example: just bench adamw --rounds 3
bench *arguments:
    cargo run --release -- bench {{ arguments }}

# Checks licences, advisories and sources of dependencies (needs cargo-deny).
deny:
    cargo deny check

# Lists what each crate would publish.
package:
    cargo package --workspace --list
