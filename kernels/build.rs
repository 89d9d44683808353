//! Compiles `cuda/*.cu` to PTX, which the crate embeds. Does nothing without the `cuda` feature.
//!
//! | variable | meaning |
//! |---|---|
//! | `NVCC` | the compiler; otherwise `$CUDA_HOME/bin/nvcc`, otherwise the first `nvcc` in `PATH` |
//! | `CUDA_COMPUTE_CAP` | the oldest architecture to run on, 80 by default; the driver compiles the PTX for newer ones |

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    for variable in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=cuda");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let compiler = compiler();
    let output = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let mut sources: Vec<PathBuf> =
        std::fs::read_dir("cuda")?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    for source in sources {
        println!("cargo:rerun-if-changed={}", source.display());
        compile(&compiler, &source, &output)?;
    }
    Ok(())
}

fn compiler() -> PathBuf {
    if let Some(compiler) = env::var_os("NVCC") {
        return compiler.into();
    }
    let toolkit = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin").join("nvcc"));
    toolkit.filter(|compiler| compiler.exists()).unwrap_or_else(|| "nvcc".into())
}

/// Without fast-math, and without contraction to fused multiply-add: results are those of the CPU's loops
/// where the order of operations is.
fn compile(compiler: &Path, source: &Path, output: &Path) -> Result<(), Box<dyn Error>> {
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".to_owned());
    let mut command = Command::new(compiler);
    command.args(["--ptx", "-O3", "-std=c++17", "-fmad=false"]);
    command.arg(format!("-arch=compute_{capability}"));
    command.arg("--output-directory").arg(output).arg(source);
    let result = command.output().map_err(|error| {
        format!(
            "the feature `cuda` needs the CUDA toolkit's compiler, and {} did not start ({error}): install \
             the toolkit, or set NVCC or CUDA_HOME",
            compiler.display()
        )
    })?;
    if !result.status.success() {
        let messages = String::from_utf8_lossy(&result.stderr);
        return Err(format!("{} could not be compiled:\n{messages}", source.display()).into());
    }
    Ok(())
}
