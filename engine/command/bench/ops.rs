//! `ferrozero bench ops`: forward and backward of each fused operation, in turns with the same composed of
//! candle's own.
//!
//! B: sequences, T: tokens of a sequence, C: width, H: heads, D = C/H, V: vocabulary.

use super::super::{CommandResult, configuration};
use super::{Spread, spread};
use crate::command::settings::ProductType;
use crate::models::gpt::{Block, GptConfig};
use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use ferrozero_kernels::ops::{self, Products};
use ferrozero_kernels::philox::Stream;
use ferrozero_offload::memory;
use serde_json::json;
use std::io::BufRead;
use std::time::Instant;

/// Memory of freed tensors that is kept for the next ones.
const KEPT_BYTES: u64 = 4 << 30;

/// Sizes to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct OpsArguments {
    /// Sequences
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Width of the model
    #[arg(long, default_value_t = 768)]
    hidden: usize,
    /// Attention heads
    #[arg(long, default_value_t = 12)]
    heads: usize,
    /// Different tokens
    #[arg(long, default_value_t = 32_000)]
    vocab: usize,
    /// What ours multiply matrices as
    #[arg(long, value_enum, default_value_t)]
    products: ProductType,
    /// Measured rounds of each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Write the result as JSON
    #[arg(long)]
    json: bool,
    /// Run the operation named on each line of standard input once, and write its seconds
    #[arg(long, hide = true, value_enum)]
    serve: Option<Side>,
}

/// Which of the two is measured.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Side {
    Ours,
    Composed,
}

type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// An operation beside what it replaces.
struct Case {
    name: &'static str,
    /// Inputs that receive gradients.
    inputs: Vec<Var>,
    ours: Operation,
    composed: Operation,
}

impl Case {
    fn new(
        name: &'static str,
        shapes: &[&[usize]],
        ours: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
        composed: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
    ) -> Result<Self> {
        let inputs = shapes.iter().map(|shape| Var::randn(0f32, 1.0, *shape, &Device::Cpu));
        let inputs = inputs.collect::<Result<_>>()?;
        Ok(Self { name, inputs, ours: Box::new(ours), composed: Box::new(composed) })
    }

    /// Seconds of one forward and backward of one of the two.
    fn run(&self, side: Side, products: Products) -> Result<f64> {
        let inputs: Vec<Tensor> = self.inputs.iter().map(|input| input.as_tensor().clone()).collect();
        let operation = match side {
            Side::Ours => &self.ours,
            Side::Composed => &self.composed,
        };
        let started = Instant::now();
        ops::with_products(products, || ops::backward(&ops::before_backward(|| operation(&inputs))?))?;
        Ok(started.elapsed().as_secs_f64())
    }
}

/// 0 where a token sees another, −∞ where that is later: [T, T].
fn causal_mask(tokens: usize) -> Result<Tensor> {
    let hidden = |at: usize| if at % tokens <= at / tokens { 0.0 } else { f32::NEG_INFINITY };
    Tensor::from_vec((0..tokens * tokens).map(hidden).collect::<Vec<f32>>(), (tokens, tokens), &Device::Cpu)
}

fn layer_norm(xs: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let centred = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// `xs` [B, T, in], `weight` [out, in].
fn linear(xs: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    xs.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)
}

/// `qkv` [B, T, 3C].
fn attention(qkv: &Tensor, heads: usize, mask: &Tensor) -> Result<Tensor> {
    let (b, t, width) = qkv.dims3()?;
    let (c, d) = (width / 3, width / 3 / heads);
    let part = |index: usize| {
        qkv.narrow(2, index * c, c)?.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous() // [B, H, T, D]
    };
    let scores = (part(0)?.matmul(&part(1)?.t()?)? / (d as f64).sqrt())?.broadcast_add(mask)?;
    let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&part(2)?)?;
    mixed.transpose(1, 2)?.reshape((b, t, c))
}

/// A transformer block of candle's own operations, with the parameters of ours in the order of `names`.
fn composed_block(p: &[Tensor], heads: usize, mask: &Tensor) -> Result<Tensor> {
    let xs = &p[0];
    let attended = attention(&linear(&layer_norm(xs, &p[1], &p[2])?, &p[3], &p[4])?, heads, mask)?;
    let xs = (xs + linear(&attended, &p[5], &p[6])?)?;
    let hidden = linear(&layer_norm(&xs, &p[7], &p[8])?, &p[9], &p[10])?.gelu()?;
    &xs + linear(&hidden, &p[11], &p[12])?
}

const BLOCK_PARAMETERS: [&str; 12] = [
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
];

fn block(arguments: &OpsArguments, mask: Tensor) -> Result<Case> {
    let OpsArguments { batch: b, seq: t, hidden: c, heads, .. } = *arguments;
    let config = GptConfig { vocabulary: 1, layers: 1, hidden: c, heads, sequence: t };
    let variables = VarMap::new();
    let ours = Block::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let mut inputs = vec![Var::randn(0f32, 1.0, (b, t, c), &Device::Cpu)?];
    {
        let made = variables.data().lock().map_err(|_| candle_core::Error::Msg("poisoned".into()))?;
        for name in BLOCK_PARAMETERS {
            let variable = made.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no {name}")))?;
            inputs.push(variable.clone());
        }
    }
    Ok(Case {
        name: "block",
        inputs,
        ours: Box::new(move |x| ours.forward(&x[0])),
        composed: Box::new(move |x| composed_block(x, heads, &mask)),
    })
}

fn cases(arguments: &OpsArguments) -> Result<Vec<Case>> {
    let OpsArguments { batch: b, seq: t, hidden: c, heads: h, vocab: v, .. } = *arguments;
    let (rows, d) = (b * t, c / h);
    let device = &Device::Cpu;
    let random = Stream::new(1, "tokens");
    let tokens = (0..rows as u64).map(|i| (random.integer(i) % v as u64) as u32).collect::<Vec<_>>();
    let tokens = Tensor::from_vec(tokens, rows, device)?;
    let [same, theirs, of_logits, composed_of_logits, of_hidden] = [(); 5].map(|()| tokens.clone());
    let mask = causal_mask(t)?;
    let angles = Tensor::randn(0f32, 1.0, (t, d / 2), device)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let tables = [&cos, &sin].map(|table| table.reshape((1, 1, t, d / 2))?.broadcast_as((b, h, t, d / 2)));
    let [wide_cos, wide_sin] = tables;
    let (wide_cos, wide_sin) = (wide_cos?, wide_sin?);
    let composed_rope = move |x: &[Tensor]| {
        let (first, second) = (x[0].narrow(3, 0, d / 2)?, x[0].narrow(3, d / 2, d / 2)?);
        let turned = ((&first * &wide_cos)? - (&second * &wide_sin)?)?;
        Tensor::cat(&[turned, ((&first * &wide_sin)? + (&second * &wide_cos)?)?], 3)
    };
    let attention_mask = mask.clone();
    Ok(vec![
        Case::new(
            "linear",
            &[&[b, t, c], &[4 * c, c], &[4 * c]],
            |x| ops::linear(&x[0], &x[1], Some(&x[2])),
            |x| linear(&x[0], &x[1], &x[2]),
        )?,
        Case::new(
            "layer_norm",
            &[&[b, t, c], &[c], &[c]],
            |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-5),
            |x| layer_norm(&x[0], &x[1], &x[2]),
        )?,
        Case::new(
            "rms_norm",
            &[&[b, t, c], &[c]],
            |x| ops::rms_norm(&x[0], &x[1], 1e-5),
            |x| {
                let mean = (x[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?;
                x[0].broadcast_div(&mean.sqrt()?)?.broadcast_mul(&x[1])
            },
        )?,
        Case::new("gelu", &[&[b, t, 4 * c]], |x| ops::gelu(&x[0]), |x| x[0].gelu())?,
        Case::new("swiglu", &[&[b, t, 8 * c]], |x| ops::swiglu(&x[0]), |x| candle_nn::ops::swiglu(&x[0]))?,
        Case::new("rope", &[&[b, h, t, d]], move |x| ops::rope(&x[0], &cos, &sin), composed_rope)?,
        Case::new(
            "causal_attention",
            &[&[b, t, 3 * c]],
            move |x| ops::causal_attention(&x[0], h, None),
            move |x| attention(&x[0], h, &attention_mask),
        )?,
        Case::new(
            "embedding",
            &[&[v, c]],
            move |x| ops::embedding(&x[0], &same),
            move |x| x[0].index_select(&theirs, 0),
        )?,
        Case::new(
            "cross_entropy",
            &[&[rows, v]],
            move |x| ops::cross_entropy(&x[0], &of_logits),
            move |x| candle_nn::loss::cross_entropy(&x[0], &composed_of_logits),
        )?,
        Case::new(
            "linear_cross_entropy",
            &[&[rows, c], &[v, c]],
            move |x| ops::linear_cross_entropy(&x[0], &x[1], &of_hidden),
            move |x| candle_nn::loss::cross_entropy(&x[0].matmul(&x[1].t()?)?, &tokens),
        )?,
        block(arguments, mask)?,
    ])
}

/// Runs the bench, or one of its processes.
pub fn run(arguments: OpsArguments) -> CommandResult {
    let OpsArguments { batch, seq, hidden, heads, vocab, .. } = arguments;
    if heads == 0 || !hidden.is_multiple_of(2 * heads) || [batch, seq, hidden, vocab].contains(&0) {
        let message = "bench ops: sizes must be at least 1, and --hidden a multiple of twice the --heads";
        return Err(configuration(message.into()).into());
    }
    let products = Products::from(arguments.products);
    if !products.is_native() {
        let message =
            "bench ops: this processor has no matrix tiles for bf16, or the system does not grant them";
        return Err(configuration(message.into()).into());
    }
    // As in a run, whose plan grants freed tensors their memory for the next ones.
    memory::set_cache_limit_bytes(memory::current_bytes() + KEPT_BYTES);
    let cases = cases(&arguments)?;
    if let Some(side) = arguments.serve {
        for line in std::io::stdin().lock().lines() {
            let name = line?;
            let case = cases.iter().find(|case| case.name == name);
            let case =
                case.ok_or_else(|| configuration(format!("bench ops: there is no operation {name}")))?;
            println!("{}", case.run(side, products)?);
        }
        return Ok(());
    }
    let mut rows = vec![];
    for case in &cases {
        let (mut ours, mut composed) = (vec![], vec![]);
        // The first round warms both up.
        for round in 0..=arguments.rounds {
            let times = (case.run(Side::Ours, products)?, case.run(Side::Composed, products)?);
            if round > 0 {
                ours.push(times.0);
                composed.push(times.1);
            }
        }
        eprintln!("measured {}", case.name);
        rows.push((case.name, spread(ours), spread(composed)));
    }
    report(&arguments, &rows);
    Ok(())
}

fn report(arguments: &OpsArguments, rows: &[(&str, Spread, Spread)]) {
    if arguments.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, ours, composed)| {
                let ratio = composed.median / ours.median;
                json!({ "operation": name, "ours_s": ours, "composed_s": composed, "ratio": ratio })
            })
            .collect();
        println!("{}", json!({ "operations": rows }));
        return;
    }
    println!("| forward and backward | ours | least to most | composed of candle's | its time / ours |");
    println!("|---|---|---|---|---|");
    for (name, ours, composed) in rows {
        let ms = |seconds: f64| format!("{:.1}", 1e3 * seconds);
        println!(
            "| {name} | {} ms | {} to {} | {} ms | {:.1} |",
            ms(ours.median),
            ms(ours.least),
            ms(ours.most),
            ms(composed.median),
            composed.median / ours.median,
        );
    }
}
