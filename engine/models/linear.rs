//! A linear layer, with an adapter of low rank beside it where one is asked for.

use super::block::Units;
use crate::error::Error;
use crate::schedule::tile::Cut;
use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};
use ferrozero_kernels::ops;
use serde::{Deserialize, Serialize};

/// Which layers get an adapter of low rank, and which (Hu et al., "LoRA", arXiv 2106.09685).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Adapting {
    /// Width of the adapters; 0: none.
    pub rank: usize,
    /// The adapters' outputs are multiplied with `alpha / rank`.
    pub alpha: f64,
    /// Ends of the names of the layers that get one, as `q_proj` or `mlp.c_proj`.
    pub targets: Vec<String>,
}

/// Last parts of the names of an adapter's two matrices.
const LORA_A: &str = "lora_A.weight";
const LORA_B: &str = "lora_B.weight";

impl Adapting {
    /// Factor on the adapters' outputs.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Whether the layer of a name has an adapter.
    fn adapts(&self, layer: &str) -> bool {
        self.rank > 0 && self.targets.iter().any(|target| is_named(layer, target))
    }

    /// Adapters for those of a model's linear `layers` that `targets` name, or for all of them if none is
    /// named.
    ///
    /// # Errors
    /// [`Error::Configuration`] for a target that names no layer.
    pub(super) fn new(rank: usize, alpha: f64, targets: &[String], layers: &[&str]) -> Result<Self, Error> {
        if let Some(unknown) =
            targets.iter().find(|target| !layers.iter().any(|layer| is_named(layer, target)))
        {
            return Err(Error::Configuration(format!(
                "no layer of this model has a name that ends with {unknown}; there are {}",
                layers.join(", ")
            )));
        }
        let all = || layers.iter().map(|layer| (*layer).to_owned()).collect();
        Ok(Self { rank, alpha, targets: if targets.is_empty() { all() } else { targets.to_vec() } })
    }

    /// Names of the adapter's two matrices [rank, in] and [out, rank] beside the weight of a name, if it is a
    /// weight.
    pub fn adapter_of(weight: &str) -> Option<[String; 2]> {
        let layer = weight.strip_suffix("weight")?;
        Some([LORA_A, LORA_B].map(|name| format!("{layer}{name}")))
    }

    /// Whether a parameter belongs to an adapter.
    pub fn is_adapter(name: &str) -> bool {
        name.ends_with(LORA_A) || name.ends_with(LORA_B)
    }
}

/// Whether a layer's name is `target` or ends with it, as PEFT compares them.
fn is_named(layer: &str, target: &str) -> bool {
    layer.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// `xs·weightᵀ + bias`, and with an adapter `+ alpha/rank·xs·aᵀ·bᵀ`.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    /// [rank, in], [out, rank] and the factor.
    adapter: Option<(Tensor, Tensor, f64)>,
}

impl Linear {
    /// A layer with a weight [out, in]. The second matrix of an adapter starts at zero: at first it changes
    /// nothing.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub fn new(
        inputs: usize,
        outputs: usize,
        bias: bool,
        init: Init,
        adapting: &Adapting,
        vb: VarBuilder,
    ) -> candle_core::Result<Self> {
        Self::cut(inputs, outputs, bias, init, adapting, None, vb)
    }

    /// Some outputs, which are rows of the weight, of a layer of `inputs`. Of an adapter the first matrix is
    /// that of all of them.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub(super) fn of_outputs(
        inputs: usize,
        outputs: &Units,
        bias: bool,
        init: Init,
        adapting: &Adapting,
        vb: VarBuilder,
    ) -> candle_core::Result<Self> {
        let cut = (!outputs.are_all()).then(|| Cut::Rows(outputs.range.clone()));
        Self::cut(inputs, outputs.range.len(), bias, init, adapting, cut, vb)
    }

    /// Some inputs, which are columns of the weight, of a layer with `outputs`: a part of each output's sum.
    /// The bias, if there is one, is added by the last part. Of an adapter the second matrix is that of all
    /// of them.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub(super) fn of_inputs(
        inputs: &Units,
        outputs: usize,
        bias: bool,
        init: Init,
        adapting: &Adapting,
        vb: VarBuilder,
    ) -> candle_core::Result<Self> {
        let cut = (!inputs.are_all()).then(|| Cut::Columns(inputs.range.clone(), inputs.all));
        Self::cut(inputs.range.len(), outputs, bias && inputs.are_last(), init, adapting, cut, vb)
    }

    fn cut(
        inputs: usize,
        outputs: usize,
        bias: bool,
        init: Init,
        adapting: &Adapting,
        cut: Option<Cut>,
        vb: VarBuilder,
    ) -> candle_core::Result<Self> {
        // Where what is cut with the outputs is, and what is cut with the inputs.
        let whole = || vb.clone();
        let part = |cut: &Cut| vb.pp(cut);
        let (of_outputs, of_inputs, of_both) = match &cut {
            None => (whole(), whole(), whole()),
            Some(cut @ Cut::Rows(_)) => (part(cut), whole(), part(cut)),
            Some(cut @ Cut::Columns(..)) => (whole(), part(cut), part(cut)),
        };
        let make_bias = || of_outputs.get_with_hints(outputs, "bias", Init::Const(0.0));
        let adapter = match adapting.adapts(&vb.prefix()) {
            false => None,
            true => {
                // As PEFT, which takes the default of PyTorch's linear layers.
                let all_inputs = match &cut {
                    Some(Cut::Columns(_, all)) => *all,
                    _ => inputs,
                };
                let bound = 1.0 / (all_inputs as f64).sqrt();
                let init = Init::Uniform { lo: -bound, up: bound };
                let a = of_inputs.get_with_hints((adapting.rank, inputs), LORA_A, init)?;
                let b = of_outputs.get_with_hints((outputs, adapting.rank), LORA_B, Init::Const(0.0))?;
                Some((a, b, adapting.scale()))
            }
        };
        Ok(Self {
            weight: of_both.get_with_hints((outputs, inputs), "weight", init)?,
            bias: bias.then(make_bias).transpose()?,
            adapter,
        })
    }

    /// `xs` [.., in] to [.., out].
    ///
    /// # Errors
    /// What the operations say.
    pub fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let ys = ops::linear(xs, &self.weight, self.bias.as_ref())?;
        match &self.adapter {
            None => Ok(ys),
            Some((a, b, scale)) => {
                let low = (ops::linear(xs, a, None)? * *scale)?; // [.., rank]
                ys + ops::linear(&low, b, None)?
            }
        }
    }

    /// `residual + self.forward(xs)`, as the end of a block.
    ///
    /// # Errors
    /// What the operations say.
    pub fn close(&self, residual: &Tensor, xs: &Tensor) -> candle_core::Result<Tensor> {
        match self.adapter {
            None => ops::closing_linear(residual, xs, &self.weight, self.bias.as_ref()),
            Some(_) => residual + self.forward(xs)?,
        }
    }
}
