//! What measurements are reckoned with.

/// Seconds of a day.
#[cfg(feature = "cli")]
pub const SECONDS_PER_DAY: f64 = 86_400.0;

/// The middle of several numbers, of two middle ones the larger; NaN of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
