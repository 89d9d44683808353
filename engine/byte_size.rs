//! Sizes as people write them: 512MiB.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A number of bytes, written and read as `512MiB`, `16GiB`, `1GB` or `4096`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("{text:?} is not a size: write it as 512MiB, 1.5GiB, 2GB or a number of bytes");
        let trimmed = text.trim();
        let with_unit = UNITS.iter().find_map(|(unit, factor)| {
            let (number, found) = trimmed.split_at_checked(trimmed.len().checked_sub(unit.len())?)?;
            found.eq_ignore_ascii_case(unit).then_some((number, *factor))
        });
        let without = || (trimmed.strip_suffix(['B', 'b']).unwrap_or(trimmed), 1);
        let (number, factor) = with_unit.unwrap_or_else(without);
        let number = number.trim();
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self).ok_or_else(refuse);
        }
        let bytes = number.parse::<f64>().map_err(|_| refuse())? * factor as f64;
        if (0.0..9e18).contains(&bytes) { Ok(Self(bytes.round() as u64)) } else { Err(refuse()) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let whole = UNITS[..4].iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor));
        match whole {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<String> for ByteSize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(feature = "cli")]
impl schemars::JsonSchema for ByteSize {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A number of bytes: 512MiB, 16GiB, 1GB or 4096",
        })
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases =
            [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2_000_000_000), ("4096", 4096), ("7b", 7)];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "MiB", "-1GiB", "12 apples", "1e30GiB", "99999999999TiB", "nan", "ä", "5\u{212a}iB"]
        {
            assert!(text.parse::<ByteSize>().unwrap_err().contains("512MiB"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
    }
}
