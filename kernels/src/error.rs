//! The errors of the numeric loops.

/// What a numeric loop refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Runs that must have the same length have not.
    #[error("{name} has {found} elements where {expected} are needed")]
    Length {
        /// Which run.
        name: &'static str,
        /// Its elements.
        found: usize,
        /// The elements that it must have.
        expected: usize,
    },
    /// A setting is not one that the arithmetic is defined for.
    #[error("{name} is {value}; it must be {needed}")]
    Setting {
        /// Which setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        needed: &'static str,
    },
    /// A run of bytes does not start where its elements could.
    #[error("{name} must start at a multiple of {needed} bytes")]
    Alignment {
        /// Which run.
        name: &'static str,
        /// Multiple that its address must be, in bytes.
        needed: usize,
    },
    /// The system gave no threads.
    #[error("threads could not be started: {0}")]
    Threads(String),
}

pub(crate) fn same_length(name: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Length { name, found, expected }) }
}
