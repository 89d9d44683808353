//! Keys and values of the tokens that a model has seen, so that the next token costs one token's work.

use candle_core::{Result, Tensor};

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
    ///
    /// # Errors
    /// What candle says.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let all = match &self.keys_values {
            Some((old_keys, old_values)) => {
                (Tensor::cat(&[old_keys, keys], 2)?, Tensor::cat(&[old_values, values], 2)?)
            }
            None => (keys.clone(), values.clone()),
        };
        self.keys_values = Some(all.clone());
        Ok(all)
    }
}
