//! Things that the user should hear of and that stop nothing.

/// A fallback that was taken: worth a line of the report, no reason to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Short and stable, for programs: `arena-not-pinned`, `uring-unavailable`, …
    pub code: &'static str,
    /// One sentence for people.
    pub text: String,
}

impl Notice {
    pub(crate) fn new(code: &'static str, text: impl Into<String>) -> Self {
        let text = text.into();
        tracing::info!(code, text);
        Self { code, text }
    }
}
