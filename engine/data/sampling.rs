//! Text from a model: one token after another.

use candle_core::{DType, Result, Tensor};
use ferrozero_kernels::philox::Stream;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Seed of the choice.
    pub seed: u64,
}

/// Extends `prompt` by `count` tokens. `next_logits` is given tokens [1, T] with T at most `sequence`, and
/// answers logits [1, V].
///
/// # Errors
/// What `next_logits` and candle say.
pub fn generate(
    prompt: &[u32],
    count: usize,
    sequence: usize,
    sampling: Sampling,
    mut next_logits: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Vec<u32>> {
    let stream = Stream::new(sampling.seed, "sampling");
    let mut tokens = prompt.to_vec();
    for position in 0..count as u64 {
        let context = &tokens[tokens.len().saturating_sub(sequence)..];
        let context = Tensor::new(context, &candle_core::Device::Cpu)?.unsqueeze(0)?;
        let logits = next_logits(&context)?.squeeze(0)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        tokens.push(choose(&logits, sampling.temperature, 1.0, stream.uniform(position)));
    }
    Ok(tokens)
}

/// The token at which the cumulative probability passes `uniform`, among the most likely ones that have the
/// probability `top_p` together (Holtzman et al., arXiv 1904.09751).
pub fn choose(logits: &[f32], temperature: f64, top_p: f64, uniform: f64) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if temperature <= 0.0 {
        return logits.iter().position(|&logit| logit == largest).unwrap_or(0) as u32;
    }
    let mut weights: Vec<f64> =
        logits.iter().map(|&logit| ((f64::from(logit) - f64::from(largest)) / temperature).exp()).collect();
    if top_p < 1.0 {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        let mut left = top_p * weights.iter().sum::<f64>();
        for token in order {
            if left <= 0.0 {
                weights[token] = 0.0;
            }
            left -= weights[token];
        }
    }
    let mut left = uniform * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    weights.len().saturating_sub(1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_temperature_the_most_likely_token_is_taken() {
        // The next token is the last one plus one.
        let next = |tokens: &Tensor| {
            let last = tokens.flatten_all()?.to_vec1::<u32>()?.pop().unwrap_or(0) as usize;
            let logits: Vec<f32> = (0..10).map(|token| if token == last + 1 { 3.0 } else { 0.0 }).collect();
            Tensor::new(logits, &candle_core::Device::Cpu)?.unsqueeze(0)
        };
        let greedy = Sampling { temperature: 0.0, seed: 0 };
        assert_eq!(generate(&[1], 4, 2, greedy, next).unwrap(), [1, 2, 3, 4, 5]);
        let random = Sampling { temperature: 1.0, seed: 1 };
        let first = generate(&[1], 8, 2, random, next).unwrap();
        assert_eq!(generate(&[1], 8, 2, random, next).unwrap(), first);
    }

    #[test]
    fn choices_follow_the_probabilities() {
        let logits = [0f32, 3f32.ln()];
        let ones = (0..1000).filter(|&i| choose(&logits, 1.0, 1.0, f64::from(i) / 1000.0) == 1).count();
        assert!((740..=760).contains(&ones), "{ones}");
        let zeros =
            |top_p| (0..1000).filter(|&i| choose(&logits, 1.0, top_p, f64::from(i) / 1000.0) == 0).count();
        assert_eq!((zeros(0.7), zeros(0.8)), (0, 250));
    }
}
