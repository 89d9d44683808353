//! Keys and values of the tokens that a model has seen, so that the next token costs one token's work.

use candle_core::{Result, Tensor};
use ferrozero_kernels::ops;

/// Keys and values of one layer, both [B, K, S, D]: K heads of width D, S tokens so far.
#[derive(Default)]
pub struct LayerCache {
    keys_values: Option<(Tensor, Tensor)>,
}

impl LayerCache {
    /// Tokens in it, S.
    pub fn tokens(&self) -> usize {
        self.keys_values.as_ref().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Appends keys and values [B, K, T, D] of the tokens that follow, and gives those of all.
    fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let all = match &self.keys_values {
            Some((old_keys, old_values)) => {
                (Tensor::cat(&[old_keys, keys], 2)?, Tensor::cat(&[old_values, values], 2)?)
            }
            None => (keys.clone(), values.clone()),
        };
        self.keys_values = Some(all.clone());
        Ok(all)
    }

    /// Attention of `queries` [B, H, T, D] of the tokens that follow, with their `keys` and `values` [B, K, T, D], over all
    /// tokens: [B, T, H·D]. H is a multiple of K.
    ///
    /// # Errors
    /// What candle says.
    pub fn attend(&mut self, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let (b, h, t, d) = queries.dims4()?;
        let (keys, values) = self.append(keys, values)?; // [B, K, S, D]
        let (_, k, s, _) = keys.dims4()?;
        let shared = h / k;
        // The queries of one key head are rows of one product.
        let scores = queries.reshape((b, k, shared * t, d))?.matmul(&keys.t()?)?;
        let weights =
            ops::causal_softmax(&scores.reshape((b, k, shared, t, s))?, 1.0 / (d as f32).sqrt(), None)?;
        let attended = weights.reshape((b, k, shared * t, s))?.matmul(&values)?; // [B, K, H/K·T, D]
        attended.reshape((b, h, t, d))?.transpose(1, 2)?.reshape((b, t, h * d))
    }
}
