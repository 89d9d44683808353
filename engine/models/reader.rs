//! Reads Hugging Face's configurations.

use crate::error::{Error, Result};
use serde_json::Value;

/// Reads a member of a configuration.
pub(super) struct Reader<'a> {
    pub(super) value: &'a Value,
    pub(super) source: &'a str,
}

impl Reader<'_> {
    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.value.get(key).cloned().unwrap_or_default();
        Error::Configuration(format!("{}: {key} is {found} and must be {expected}", self.source))
    }

    pub(super) fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let limit = 1 << 32;
        match (self.present(key).map(Value::as_u64), default) {
            (Some(Some(size)), _) if size > 0 && size < limit => Ok(size as usize),
            (None, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    pub(super) fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.present(key).map(Value::as_f64), default) {
            (Some(Some(number)), _) if number.is_finite() && number > 0.0 => Ok(number),
            (None, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a number above 0")),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.present(key)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.wrong(key, "a truth value")))
    }
}
