//! Learning rates over the steps of a run.

use std::f64::consts::PI;

/// Linear warm-up to a peak, then half a cosine down to a floor (Loshchilov and Hutter, "SGDR", arXiv
/// 1608.03983).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// Highest rate.
    pub peak: f64,
    /// Steps of the warm-up; the last of them has the peak.
    pub warmup: u64,
    /// Steps of the run; from there on the rate is the floor.
    pub steps: u64,
    /// Lowest rate.
    pub floor: f64,
}

impl LearningRate {
    /// The rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        let Self { peak, warmup, steps, floor } = *self;
        if step < warmup {
            return peak * (step + 1) as f64 / warmup as f64;
        }
        if step >= steps {
            return floor;
        }
        let progress = (step - warmup) as f64 / (steps - warmup) as f64;
        floor + (peak - floor) * 0.5 * (1.0 + (PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_reaches_the_peak_and_the_cosine_the_floor() {
        let rate = LearningRate { peak: 1.0, warmup: 4, steps: 14, floor: 0.1 };
        let rates: Vec<f64> = (0..20).map(|step| rate.at(step)).collect();
        assert_eq!(rates[..5], [0.25, 0.5, 0.75, 1.0, 1.0]);
        assert!((rates[9] - 0.55).abs() < 1e-12, "half way down at half time");
        assert!(rates[4..15].windows(2).all(|pair| pair[0] >= pair[1]));
        assert_eq!(rates[14..], [0.1; 6]);
    }

    #[test]
    fn edges_are_numbers() {
        let no_warm_up = LearningRate { peak: 1.0, warmup: 0, steps: 2, floor: 0.0 };
        assert_eq!((no_warm_up.at(0), no_warm_up.at(2)), (1.0, 0.0));
        let all_warm_up = LearningRate { peak: 1.0, warmup: 2, steps: 2, floor: 0.5 };
        assert_eq!((all_warm_up.at(1), all_warm_up.at(2)), (1.0, 0.5));
    }
}
