//! How fast a machine is, and how much it holds: measured by `ferrozero probe`, or described from the
//! catalogue.

use crate::error::{Error, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A machine's numbers. What is none is not known, and for memory not limited.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What it is, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Folder whose disk was measured; none where the numbers are not a measurement's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Processors that computing, copies and the optimizer share; none: a device computes, and nothing is
    /// shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processors: Option<usize>,
    /// Bytes of host memory that a run may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_memory_bytes: Option<u64>,
    /// Bytes of the memory of a device that has its own; none: the processor computes, in the host's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_memory_bytes: Option<u64>,
    /// Bytes of the disk that a run may use; 0 where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Bytes a second that are read from disk while nothing is written.
    pub disk_read_bytes_per_s: f64,
    /// Bytes a second that are written to disk while nothing is read.
    pub disk_write_bytes_per_s: f64,
    /// Bytes a second of both while both are under way; none: neither takes from the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mixed_bytes_per_s: Option<f64>,
    /// Bytes a second that go from host to device.
    pub upload_bytes_per_s: f64,
    /// Bytes a second that are copied or accumulated from device to host.
    pub download_bytes_per_s: f64,
    /// Bytes a second that the optimizer reads and writes: 28 a parameter.
    pub optimizer_bytes_per_s: f64,
    /// Bytes a second that all processors together read and write in the host's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes_per_s: Option<f64>,
    /// Bytes a second that a device with memory of its own reads and writes there; none: more than matters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_memory_bytes_per_s: Option<f64>,
    /// Floating-point operations a second of matrix products in f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matmul_f32_flop_per_s: Option<f64>,
    /// Floating-point operations a second of matrix products in bf16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matmul_bf16_flop_per_s: Option<f64>,
    /// Floating-point operations a second of causal attention in f32, counted as 4·T·C a token of a sequence
    /// of T tokens and width C, with what the mask hides; none: as of matrix products.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_f32_flop_per_s: Option<f64>,
    /// The same in bf16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_bf16_flop_per_s: Option<f64>,
}

impl Machine {
    /// Reads a machine's numbers.
    ///
    /// # Errors
    /// [`Error::File`], and [`Error::Configuration`] where a number is missing, unknown or none that a
    /// machine has.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::file(path))?;
        let wrong = |what: String| Error::Configuration(format!("{}: {what}", path.display()));
        let machine: Self = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        machine.check().map_err(|error| match error {
            Error::Configuration(what) => wrong(what),
            other => other,
        })?;
        Ok(machine)
    }

    /// Refuses numbers that no machine has, with which a plan would have no end.
    ///
    /// # Errors
    /// [`Error::Configuration`] names the number.
    pub fn check(&self) -> Result<()> {
        let numbers = [
            ("disk_read_bytes_per_s", Some(self.disk_read_bytes_per_s)),
            ("disk_write_bytes_per_s", Some(self.disk_write_bytes_per_s)),
            ("disk_mixed_bytes_per_s", self.disk_mixed_bytes_per_s),
            ("upload_bytes_per_s", Some(self.upload_bytes_per_s)),
            ("download_bytes_per_s", Some(self.download_bytes_per_s)),
            ("optimizer_bytes_per_s", Some(self.optimizer_bytes_per_s)),
            ("memory_bytes_per_s", self.memory_bytes_per_s),
            ("device_memory_bytes_per_s", self.device_memory_bytes_per_s),
            ("matmul_f32_flop_per_s", self.matmul_f32_flop_per_s),
            ("matmul_bf16_flop_per_s", self.matmul_bf16_flop_per_s),
            ("attention_f32_flop_per_s", self.attention_f32_flop_per_s),
            ("attention_bf16_flop_per_s", self.attention_bf16_flop_per_s),
        ];
        let is_wrong = |speed: &f64| !speed.is_finite() || *speed < 1.0;
        if let Some((name, speed)) =
            numbers.iter().find_map(|(name, speed)| speed.filter(is_wrong).map(|speed| (name, speed)))
        {
            let text = format!("the machine's {name} is {speed:e}: it must be finite and at least 1");
            return Err(Error::Configuration(text));
        }
        match self.processors {
            Some(0) => Err(Error::Configuration("the machine's processors are 0: it must have one".into())),
            _ => Ok(()),
        }
    }

    /// What `ferrozero probe` has written to `machine.json` in the current folder, if it measured the disk of
    /// `directory`, and with a device as this one is.
    pub fn probed(directory: &Path, device: &Device) -> Option<Self> {
        Self::from_file(Path::new("machine.json")).ok().filter(|machine| machine.is_of(directory, device))
    }

    /// Whether the disk of `directory` was measured, with a device as this one is.
    pub fn is_of(&self, directory: &Path, device: &Device) -> bool {
        let is_here = self
            .directory
            .as_deref()
            .is_some_and(|measured| canonical(directory).is_some_and(|directory| directory == measured));
        is_here && self.is_apart() == device.is_cuda()
    }

    /// Writes the numbers.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = Error::file(path);
        let mut text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))?;
        text.push('\n');
        std::fs::write(path, text).map_err(failed)
    }

    /// Whether the device has memory of its own.
    pub fn is_apart(&self) -> bool {
        self.device_memory_bytes.is_some()
    }
}

/// The whole path of a folder that may not have been made yet.
fn canonical(directory: &Path) -> Option<PathBuf> {
    directory.ancestors().find_map(|made| {
        let whole = if made.as_os_str().is_empty() { Path::new(".") } else { made };
        let rest = directory.strip_prefix(made).ok()?;
        let whole = whole.canonicalize().ok()?;
        Some(if rest.as_os_str().is_empty() { whole } else { whole.join(rest) })
    })
}
