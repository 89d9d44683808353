//! Initial values of parameters, by any part of a tensor at a time.

use crate::philox::Stream;
use candle_nn::Init;
use candle_nn::init::NormalOrUniform;

/// Fills `out` with elements `first_element` and following of the tensor `name`. Each element depends on
/// seed, name and its own position alone. The distributions are those of candle-nn's `Init`.
pub fn initialize(
    init: &Init,
    shape: &[usize],
    seed: u64,
    name: &str,
    first_element: usize,
    out: &mut [f32],
) {
    let stream = Stream::new(seed, name);
    let normal = |out: &mut [f32], mean: f64, stdev: f64| {
        for (position, value) in (first_element as u64..).zip(out) {
            *value = (mean + stdev * stream.normal(position)) as f32;
        }
    };
    let uniform = |out: &mut [f32], low: f64, high: f64| {
        for (position, value) in (first_element as u64..).zip(out) {
            *value = (low + (high - low) * stream.uniform(position)) as f32;
        }
    };
    match *init {
        Init::Const(value) => out.fill(value as f32),
        Init::Randn { mean, stdev } => normal(out, mean, stdev),
        Init::Uniform { lo, up } => uniform(out, lo, up),
        Init::Kaiming { dist, fan, non_linearity } => {
            let fan = fan.for_shape(&shape.into());
            let stdev = non_linearity.gain() / (fan as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => normal(out, 0.0, stdev),
                NormalOrUniform::Uniform => uniform(out, -3f64.sqrt() * stdev, 3f64.sqrt() * stdev),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [Init; 4] = [
        Init::Const(0.25),
        Init::Randn { mean: 1.0, stdev: 0.5 },
        Init::Uniform { lo: -2.0, up: 3.0 },
        candle_nn::init::DEFAULT_KAIMING_UNIFORM,
    ];

    fn whole(init: &Init, name: &str) -> Vec<f32> {
        let mut out = vec![0.0; 20 * 30];
        initialize(init, &[20, 30], 5, name, 0, &mut out);
        out
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_bits(kind in 0..KINDS.len(), cut in 0usize..600) {
            let expected = whole(&KINDS[kind], "w");
            let mut out = vec![0.0; 600];
            let (front, back) = out.split_at_mut(cut);
            initialize(&KINDS[kind], &[20, 30], 5, "w", 0, front);
            initialize(&KINDS[kind], &[20, 30], 5, "w", cut, back);
            prop_assert_eq!(out, expected);
        }
    }

    #[test]
    fn bounds_are_those_of_candle() {
        // Kaiming uniform over 30 inputs with the gain of ReLU.
        let bound = 3f32.sqrt() * 2f32.sqrt() / 30f32.sqrt();
        let values = whole(&KINDS[3], "w");
        assert!(values.iter().all(|value| value.abs() <= bound));
        assert!(values.iter().any(|value| value.abs() > 0.95 * bound));
        assert!(whole(&KINDS[2], "w").iter().all(|value| (-2.0..3.0).contains(value)));
        assert_eq!(whole(&KINDS[0], "w"), vec![0.25; 600]);
        assert_ne!(whole(&KINDS[1], "w"), whole(&KINDS[1], "v"));
    }
}
