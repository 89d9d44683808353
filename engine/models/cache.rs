//! Keys and values of the tokens that a model has seen, so that the next token costs one token's work.

use crate::sync::lock;
use candle_core::{Result, Tensor};
use ferrozero_kernels::ops;
use std::sync::{Arc, Mutex};

/// Scores that exist together while a prompt is attended to, if one row of all heads has not more.
const SCORES: usize = 1 << 20;

/// Bytes in f32 that [`LayerCache::attend`] takes at most beside its arguments, its result and the keys and
/// values: the scores of some query rows for `tokens` keys in each of `heads` query heads, the weights that
/// they become, and what these attend to.
pub fn scores_bytes(heads: usize, tokens: usize) -> u64 {
    3 * 4 * SCORES.max(heads * tokens) as u64
}

/// Keys and values of one layer, of all tokens so far or of those that the next one still sees.
#[derive(Default)]
pub struct LayerCache {
    tokens: usize,
    /// Both [B, K, S, D]: K heads of width D, S tokens.
    keys_values: Option<(Tensor, Tensor)>,
}

impl LayerCache {
    /// Tokens that it has seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The keys and values that are kept, with those [B, K, T, D] of the tokens that follow behind them.
    fn followed_by(&self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        match &self.keys_values {
            Some((old_keys, old_values)) => {
                Ok((Tensor::cat(&[old_keys, keys], 2)?, Tensor::cat(&[old_values, values], 2)?))
            }
            None => Ok((keys.clone(), values.clone())),
        }
    }

    /// Keeps what the next token sees: of a window all but one, which is the next token's own.
    fn keep(&mut self, keys: Tensor, values: Tensor, window: Option<usize>) -> Result<()> {
        let s = keys.dim(2)?;
        let kept = window.map_or(s, |window| s.min(window.saturating_sub(1)));
        let last = |xs: Tensor| if kept < s { xs.narrow(2, s - kept, kept)?.contiguous() } else { Ok(xs) };
        self.keys_values = if kept > 0 { Some((last(keys)?, last(values)?)) } else { None };
        Ok(())
    }

    /// Attention of `queries` [B, H, T, D] of the tokens that follow, with their `keys` and `values` [B, K,
    /// T, D], over all tokens or the last ones of a `window`, which is the same at every call: [B, T, H·D]. H
    /// is a multiple of K. Query rows run some at a time, with the keys that they see, so that memory does
    /// not grow with T·S.
    ///
    /// # Errors
    /// What candle says.
    pub fn attend(
        &mut self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        window: Option<usize>,
    ) -> Result<Tensor> {
        let (b, h, t, d) = queries.dims4()?;
        let (keys, values) = self.followed_by(keys, values)?; // [B, K, S, D]
        let (_, k, s, _) = keys.dims4()?;
        let shared = h / k;
        let rows = (SCORES / (b * h * s).max(1)).max(1);
        let attended = (0..t).step_by(rows).map(|first| {
            let rows = rows.min(t - first);
            // The last key that the first of the rows sees, and behind it those of the others.
            let own = s - t + first;
            let first_key = window.map_or(0, |window| (own + 1).saturating_sub(window));
            let seen = own + rows - first_key;
            let [keys, values] = [&keys, &values].map(|xs| xs.narrow(2, first_key, seen)); // [B, K, seen, D]
            // The queries of one key head are rows of one product.
            let queries = queries.narrow(2, first, rows)?.reshape((b, k, shared * rows, d))?;
            let scores = queries.matmul(&keys?.t()?)?.reshape((b, k, shared, rows, seen))?;
            let weights = ops::causal_softmax(&scores, 1.0 / (d as f32).sqrt(), window)?;
            // [B, K, H/K·rows, D]
            let attended = weights.reshape((b, k, shared * rows, seen))?.matmul(&values?)?;
            attended.reshape((b, h, rows, d))?.transpose(1, 2)?.reshape((b, rows, h * d))
        });
        let attended = Tensor::cat(&attended.collect::<Result<Vec<_>>>()?, 1)?; // [B, T, H·D]
        self.keep(keys, values, window)?;
        self.tokens += t;
        Ok(attended)
    }
}

/// Keys and values of all layers of a model; they are locked while a layer runs.
#[derive(Clone, Default)]
pub struct Cache(Arc<Mutex<Vec<LayerCache>>>);

impl Cache {
    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        lock(&self.0).first().map_or(0, LayerCache::tokens)
    }

    /// Runs a block of a number with its part of the cache.
    pub(super) fn with<T>(&self, number: usize, run: impl FnOnce(&mut LayerCache) -> T) -> T {
        let mut layers = lock(&self.0);
        if layers.len() <= number {
            layers.resize_with(number + 1, LayerCache::default);
        }
        run(&mut layers[number])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Of 2,000 tokens in 4 heads, some hundred rows run together.
    #[test]
    fn a_long_prompt_is_attended_to_in_parts_as_the_whole() {
        let (tokens, heads, key_value_heads, width) = (2000, 4, 2, 4);
        let wave = |heads: usize, step: f64| {
            let angles = Tensor::arange(0f32, (tokens * heads * width) as f32, &Device::Cpu)?;
            (angles * step)?.sin()?.reshape((1, tokens, heads * width))
        };
        let [q, k, v] = [(heads, 0.7), (key_value_heads, 1.3), (key_value_heads, 2.1)]
            .map(|(heads, step)| wave(heads, step).unwrap());
        let split = |xs: &Tensor| {
            let heads = xs.dim(2)? / width;
            xs.reshape((1, tokens, heads, width))?.transpose(1, 2)?.contiguous()
        };
        for window in [None, Some(300)] {
            let expected = ops::grouped_causal_attention(&q, &k, &v, heads, key_value_heads, window).unwrap();
            let [q, k, v] = [&q, &k, &v].map(|xs| split(xs).unwrap());
            let found = LayerCache::default().attend(&q, &k, &v, window).unwrap();
            let furthest = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap();
            let furthest = furthest.max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(furthest < 1e-5, "{window:?}: {furthest}");
        }
    }

    #[test]
    fn tokens_in_parts_are_attended_to_as_all_at_once_and_only_what_is_seen_is_kept() {
        let (tokens, heads, key_value_heads, width) = (11, 4, 2, 3);
        let wave = |heads: usize, step: f64| {
            let count = (tokens * heads * width) as u32;
            let angles = Tensor::arange(0, count, &Device::Cpu)?.to_dtype(candle_core::DType::F32)?;
            (angles * step)?.sin()?.reshape((1, tokens, heads * width))
        };
        let [q, k, v] = [(heads, 0.7), (key_value_heads, 1.3), (key_value_heads, 2.1)]
            .map(|(heads, step)| wave(heads, step).unwrap());
        let part = |xs: &Tensor, first: usize, count: usize| {
            let heads = xs.dim(2)? / width;
            let xs = xs.narrow(1, first, count)?.reshape((1, count, heads, width))?;
            xs.transpose(1, 2)?.contiguous()
        };
        for window in [None, Some(1), Some(2), Some(4), Some(11), Some(20)] {
            let all = ops::grouped_causal_attention(&q, &k, &v, heads, key_value_heads, window).unwrap();
            for parts in [&[11][..], &[1; 11], &[3, 1, 1, 6], &[7, 4]] {
                let mut cache = LayerCache::default();
                for &count in parts {
                    let first = cache.tokens();
                    let [q, k, v] = [&q, &k, &v].map(|xs| part(xs, first, count).unwrap());
                    let found = cache.attend(&q, &k, &v, window).unwrap();
                    let expected = all.narrow(1, first, count).unwrap();
                    let furthest = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap();
                    let furthest = furthest.max(0).unwrap().to_scalar::<f32>().unwrap();
                    assert!(furthest < 1e-5, "{window:?} in {parts:?}, token {first}: {furthest}");
                    let kept = cache.keys_values.as_ref().map_or(0, |(keys, _)| keys.dims()[2]);
                    let seen = window.map_or(usize::MAX, |window| window - 1);
                    assert_eq!(kept, seen.min(first + count), "{window:?} in {parts:?}");
                }
                assert_eq!(cache.tokens(), tokens);
            }
        }
    }
}
