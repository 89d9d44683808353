//! The engine computes what candle computes: a GPT of four layers, trained by the engine from disk, against
//! the same model composed of candle's own operations, whole in memory, with a reference AdamW in plain
//! candle.

use candle_core::{D, Device, Result, Tensor, Var, bail};
use ferrozero::internals::models::gpt::{Block, Gpt, GptConfig};
use ferrozero::{AdamW, BackendChoice, Config, Engine, Placement, Tier, Trainer};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const STEPS: u64 = 20;

fn config() -> GptConfig {
    GptConfig { vocabulary: 96, layers: 4, hidden: 64, heads: 4, sequence: 32 }
}

/// Inputs and targets of a step, [2, 32], from a congruential generator.
fn batch(step: u64) -> Result<(Tensor, Tensor)> {
    let mut state = step + 1;
    let tokens: Vec<u32> = (0..2 * 33)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % 96) as u32
        })
        .collect();
    let tokens = Tensor::from_vec(tokens, (2, 33), &Device::Cpu)?;
    Ok((tokens.narrow(1, 0, 32)?.contiguous()?, tokens.narrow(1, 1, 32)?.contiguous()?))
}

type Weights = BTreeMap<String, Var>;

fn layer_norm(xs: &Tensor, weights: &Weights, name: &str) -> Result<Tensor> {
    let centered = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centered.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
    normal
        .broadcast_mul(&weights[&format!("{name}.weight")])?
        .broadcast_add(&weights[&format!("{name}.bias")])
}

fn linear(xs: &Tensor, weights: &Weights, name: &str) -> Result<Tensor> {
    let (b, t, c) = xs.dims3()?;
    let product = xs.reshape((b * t, c))?.matmul(&weights[&format!("{name}.weight")].t()?)?;
    product.broadcast_add(&weights[&format!("{name}.bias")])?.reshape((b, t, ()))
}

fn attention(xs: &Tensor, weights: &Weights, name: &str, heads: usize) -> Result<Tensor> {
    let (b, t, c) = xs.dims3()?;
    let qkv = linear(xs, weights, &format!("{name}.c_attn"))?;
    let part = |index: usize| {
        qkv.narrow(2, index * c, c)?.reshape((b, t, heads, c / heads))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? / ((c / heads) as f64).sqrt())?;
    let mask: Vec<f32> = (0..t * t).map(|i| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 }).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, t), &Device::Cpu)?)?;
    let attended = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
    linear(&attended.transpose(1, 2)?.reshape((b, t, c))?, weights, &format!("{name}.c_proj"))
}

fn composed_loss(weights: &Weights, config: &GptConfig, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (b, t) = inputs.dims2()?;
    let wte = weights["wte.weight"].as_tensor();
    let embedded = wte.index_select(&inputs.flatten_all()?, 0)?.reshape((b, t, config.hidden))?;
    let mut xs = embedded.broadcast_add(&weights["wpe.weight"].narrow(0, 0, t)?)?;
    for i in 0..config.layers {
        let name = |part: &str| format!("h.{i}.{part}");
        let normal = layer_norm(&xs, weights, &name("ln_1"))?;
        xs = (xs + attention(&normal, weights, &name("attn"), config.heads)?)?;
        let hidden = linear(&layer_norm(&xs, weights, &name("ln_2"))?, weights, &name("mlp.c_fc"))?.gelu()?;
        xs = (xs + linear(&hidden, weights, &name("mlp.c_proj"))?)?;
    }
    let logits = layer_norm(&xs, weights, "ln_f")?.flatten(0, 1)?.matmul(&wte.t()?)?;
    candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)
}

/// AdamW in plain candle operations, one parameter at a time.
struct ReferenceAdamW {
    moments: BTreeMap<String, (Tensor, Tensor)>,
}

impl ReferenceAdamW {
    fn step(&mut self, weights: &Weights, loss: &Tensor, number: i32) -> Result<()> {
        let gradients = loss.backward()?;
        for (name, weight) in weights {
            let gradient = gradients.get(weight).unwrap();
            let zeros = || Ok((weight.zeros_like()?, weight.zeros_like()?));
            let (m, v) = self.moments.remove(name).map_or_else(zeros, Result::Ok)?;
            let m = ((m * 0.9)? + (gradient * (1.0 - 0.9))?)?;
            let v = ((v * 0.999)? + (gradient.sqr()? * (1.0 - 0.999))?)?;
            let m_hat = (&m / (1.0 - 0.9f64.powi(number)))?;
            let v_hat = (&v / (1.0 - 0.999f64.powi(number)))?;
            let decay = if weight.rank() >= 2 { 0.01 } else { 0.0 };
            let kept = (weight.as_tensor() * (1.0 - 1e-3 * decay))?;
            weight.set(&(kept - (m_hat / (v_hat.sqrt()? + 1e-8)?)? * 1e-3)?)?;
            self.moments.insert(name.clone(), (m, v));
        }
        Ok(())
    }
}

/// The trainer's parameters for plain candle.
fn weights(trainer: &Trainer) -> Weights {
    let weight = |(name, shape): (String, Vec<usize>)| {
        let values = Tensor::from_vec(trainer.parameter(&name).unwrap(), shape, &Device::Cpu).unwrap();
        (name, Var::from_tensor(&values).unwrap())
    };
    trainer.parameters().into_iter().map(weight).collect()
}

fn relative(ours: f32, reference: f32) -> f32 {
    (ours - reference).abs() / reference.abs()
}

#[test]
fn twenty_steps_from_disk_have_the_losses_of_plain_candle_in_memory() {
    let config = config();
    let engine = Engine::new(Config {
        placement: Placement::All(Tier::Disk),
        backend: BackendChoice::Memory,
        piece_bytes: Some(16384),
        boundaries: Some(Tier::Disk),
        ..Config::default()
    })
    .unwrap();
    let make = |vb, _| engine.segment(vb, |vb| Block::new(&config, vb));
    let model = Gpt::new(&config, engine.var_builder(), make).unwrap();
    let loss = |step: u64| {
        let (inputs, targets) = batch(step)?;
        model.loss(&inputs, &targets)
    };
    let plan = engine.plan(AdamW::default(), |_| loss(0)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    let weights = weights(&trainer);
    assert_eq!(
        weights.values().map(|weight| weight.elem_count() as u64).sum::<u64>(),
        config.parameter_count()
    );
    let mut reference = ReferenceAdamW { moments: BTreeMap::new() };
    for step in 0..STEPS {
        let (inputs, targets) = batch(step).unwrap();
        let plain = composed_loss(&weights, &config, &inputs, &targets).unwrap();
        reference.step(&weights, &plain, step as i32 + 1).unwrap();
        let plain = plain.to_scalar::<f32>().unwrap();
        let ours = trainer.step(|_| loss(step)).unwrap().loss;
        assert!(relative(ours, plain) < 1e-5, "step {step}: {ours}, and plain candle {plain}");
    }
}

#[test]
fn gradients_that_are_observed_are_those_of_plain_candle_each_once_a_micro_batch() {
    const MICRO_BATCHES: usize = 2;
    for (vertical, tier) in [(1, Tier::Device), (1, Tier::Disk), (MICRO_BATCHES, Tier::Disk)] {
        let config = config();
        let engine = Engine::new(Config {
            placement: Placement::All(tier),
            backend: BackendChoice::Memory,
            piece_bytes: Some(16384),
            accumulate: MICRO_BATCHES,
            vertical: Some(vertical),
            ..Config::default()
        })
        .unwrap();
        engine.freeze(|name, _| name == "h.1.ln_1.bias").unwrap();
        let make = |vb, _| engine.segment(vb, |vb| Block::new(&config, vb));
        let model = Gpt::new(&config, engine.var_builder(), make).unwrap();
        let loss = |micro_batch: usize| {
            let (inputs, targets) = batch(micro_batch as u64)?;
            model.loss(&inputs, &targets)
        };
        let plan = engine.plan(AdamW::default(), |_| loss(0)).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let weights = weights(&trainer);
        let seen = Arc::new(Mutex::new(BTreeMap::new()));
        let found = seen.clone();
        trainer.observe_gradients(move |gradient| {
            let values = gradient.values.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(gradient.loss_scale, 1.0);
            let key = (gradient.name.to_owned(), gradient.micro_batch);
            match found.lock().unwrap().insert(key, values) {
                Some(_) => bail!("{} was shown twice", gradient.name),
                None => Ok(()),
            }
        });
        trainer.step(loss).unwrap();
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        let trained = weights.len() - 1;
        assert_eq!(seen.len(), MICRO_BATCHES * trained, "all but the frozen one");
        for micro_batch in 0..MICRO_BATCHES {
            let (inputs, targets) = batch(micro_batch as u64).unwrap();
            let plain = composed_loss(&weights, &config, &inputs, &targets).unwrap().backward().unwrap();
            for (name, weight) in weights.iter().filter(|(name, _)| *name != "h.1.ln_1.bias") {
                let plain = plain.get(weight).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let ours = &seen[&(name.clone(), micro_batch)];
                let largest = plain.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
                assert!(largest > 0.0);
                for (ours, plain) in ours.iter().zip(&plain) {
                    assert!(
                        (ours - plain).abs() <= 1e-4 * largest,
                        "{name}: {ours}, and plain candle {plain}"
                    );
                }
            }
        }
    }
}

/// The losses that `scripts/torch_reference.py` wrote, from the engine's own initial values.
#[test]
fn twenty_steps_have_the_losses_of_pytorch() {
    let text = include_str!("../data/torch_reference.json");
    let reference: serde_json::Value = serde_json::from_str(text).unwrap();
    let losses: Vec<f32> =
        reference["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap() as f32).collect();
    assert_eq!(losses.len() as u64, STEPS);
    let config = config();
    let engine = Engine::new(Config::default()).unwrap();
    let make = |vb, _| engine.segment(vb, |vb| Block::new(&config, vb));
    let model = Gpt::new(&config, engine.var_builder(), make).unwrap();
    let loss = |step: u64| {
        let (inputs, targets) = batch(step)?;
        model.loss(&inputs, &targets)
    };
    let plan = engine.plan(AdamW::default(), |_| loss(0)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    if let Some(path) = std::env::var_os("FERROZERO_EXPORT_INITIAL") {
        trainer.export_safetensors(path.as_ref()).unwrap();
    }
    for (step, &expected) in losses.iter().enumerate() {
        let ours = trainer.step(|_| loss(step as u64)).unwrap().loss;
        assert!(relative(ours, expected) < 1e-4, "step {step}: {ours}, and PyTorch {expected}");
    }
}
