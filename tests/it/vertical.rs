//! Micro-batches that run vertically: what they spare, how they fail, and what is refused. That they have the
//! bits of micro-batches that run one after another is in `bitwise`.

use crate::support::{Block, tokens, train, trainer};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Module, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use ferrozero::internals::schedule::operation::Operation;
use ferrozero::{AdamW, BackendChoice, Config, Engine, Error, Placement, Segment, Tier, Trainer};
use std::panic::{AssertUnwindSafe, catch_unwind};

const BLOCKS: usize = 3;
const MICRO_BATCHES: usize = 4;

fn config(vertical: Option<usize>) -> Config {
    Config {
        placement: Placement::All(Tier::Disk),
        backend: BackendChoice::Memory,
        piece_bytes: Some(8192),
        slots: Some(2),
        accumulate: MICRO_BATCHES,
        vertical,
        ..Config::default()
    }
}

/// Blocks, one after another.
struct Stack {
    blocks: Vec<Segment<Block>>,
    inputs: Tensor,
}

impl Stack {
    fn new(engine: &Engine) -> Self {
        let vb = engine.var_builder();
        let block = |i| engine.segment(vb.pp(format!("h.{i}")), |vb| Block::new(vb, 8)).unwrap();
        let inputs = Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap();
        Self { blocks: (0..BLOCKS).map(block).collect(), inputs }
    }

    /// The loss of a micro-batch, with something done to the input of each block and to the last output.
    fn loss(&self, micro_batch: usize, between: impl Fn(usize, Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let mut xs = (&self.inputs * (1.0 + micro_batch as f64))?;
        for (index, block) in self.blocks.iter().enumerate() {
            xs = block.forward(&between(index, xs)?)?;
        }
        between(BLOCKS, xs)?.sqr()?.mean_all()
    }
}

fn stack(vertical: usize) -> (Trainer, Stack) {
    let engine = Engine::new(config(Some(vertical))).unwrap();
    let stack = Stack::new(&engine);
    let plan = engine.plan(AdamW::default(), |_| stack.loss(0, |_, xs| Ok(xs))).unwrap();
    (engine.trainer_from(plan).unwrap(), stack)
}

/// Every place where a micro-batch can fail: its number, and the blocks before it fails.
fn places() -> impl Iterator<Item = (usize, usize)> {
    (0..MICRO_BATCHES).flat_map(|micro_batch| (0..=BLOCKS).map(move |blocks| (micro_batch, blocks)))
}

/// A failure ends the step with the error that it is, and the trainer with it.
fn ends_with(
    (mut trainer, stack): (Trainer, Stack),
    case: &str,
    between: impl Fn(usize, usize, Tensor) -> Result<Tensor> + Sync,
    is_expected: impl Fn(&Error) -> bool,
) {
    trainer.step(|micro_batch| stack.loss(micro_batch, |_, xs| Ok(xs))).unwrap();
    let failing = |micro_batch| stack.loss(micro_batch, |index, xs| between(micro_batch, index, xs));
    let error = trainer.step(failing).unwrap_err();
    assert!(is_expected(&error), "{case}: {error:?}");
    let after = trainer.step(|micro_batch| stack.loss(micro_batch, |_, xs| Ok(xs)));
    assert!(matches!(after, Err(Error::Stopped(_))), "{case}");
}

#[test]
fn an_error_in_the_forward_of_one_micro_batch_ends_the_step_with_it() {
    for vertical in [2, MICRO_BATCHES] {
        for place in places() {
            let fails = |micro_batch, index, xs| match (micro_batch, index) == place {
                true => bail!("the user's own error"),
                false => Ok(xs),
            };
            let is_it = |error: &Error| {
                matches!(error, Error::Candle(_)) && error.to_string().contains("the user's own error")
            };
            ends_with(stack(vertical), &format!("{place:?}"), fails, is_it);
        }
    }
}

/// Has no gradient to give.
struct NoGradient;

impl CustomOp1 for NoGradient {
    fn name(&self) -> &'static str {
        "no gradient"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((storage.clone(), layout.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        bail!("the user's own error on the way back")
    }
}

#[test]
fn an_error_in_the_backward_of_one_micro_batch_ends_the_step_with_it() {
    // What goes into the first block needs no gradient.
    for place in places().filter(|(_, blocks)| *blocks > 0) {
        let fails = |micro_batch, index, xs: Tensor| match (micro_batch, index) == place {
            true => xs.apply_op1(NoGradient),
            false => Ok(xs),
        };
        let is_it = |error: &Error| error.to_string().contains("the user's own error on the way back");
        ends_with(stack(MICRO_BATCHES), &format!("{place:?}"), fails, is_it);
    }
}

#[test]
fn a_loss_that_is_no_number_in_one_micro_batch_is_told() {
    for failing in 0..MICRO_BATCHES {
        let infinite = |micro_batch, index, xs: Tensor| match (micro_batch, index) == (failing, BLOCKS) {
            true => xs * f64::INFINITY,
            false => Ok(xs),
        };
        let is_it = |error: &Error| matches!(error, Error::NonFiniteLoss { step: 2, .. });
        ends_with(stack(MICRO_BATCHES), &format!("{failing}"), infinite, is_it);
    }
}

#[test]
fn a_panic_in_the_users_loss_comes_through_and_stops_the_trainer() {
    for (place, vertical) in places().flat_map(|place| [1, MICRO_BATCHES].map(|vertical| (place, vertical))) {
        let (mut trainer, stack) = stack(vertical);
        let fails = |micro_batch| {
            stack.loss(micro_batch, |index, xs| {
                assert!((micro_batch, index) != place, "the user's own panic");
                Ok(xs)
            })
        };
        let panic = catch_unwind(AssertUnwindSafe(|| trainer.step(fails))).unwrap_err();
        assert_eq!(*panic.downcast::<&str>().unwrap(), "the user's own panic", "{place:?}");
        let after = trainer.step(|micro_batch| stack.loss(micro_batch, |_, xs| Ok(xs)));
        assert!(matches!(after, Err(Error::Stopped(_))), "{place:?}");
    }
}

#[test]
fn another_order_of_segments_in_one_micro_batch_is_an_error() {
    for changed in 0..MICRO_BATCHES {
        let (mut trainer, stack) = stack(MICRO_BATCHES);
        let error = trainer.step(|micro_batch| {
            if micro_batch != changed {
                return stack.loss(micro_batch, |_, xs| Ok(xs));
            }
            let backwards = stack.blocks.iter().rev();
            let xs = backwards.into_iter().try_fold(stack.inputs.clone(), |xs, block| block.forward(&xs))?;
            xs.sqr()?.mean_all()
        });
        let error = error.unwrap_err();
        assert!(matches!(error, Error::OrderChanged { .. }), "{changed}: {error}");
    }
}

#[test]
fn parameters_cross_once_for_all_micro_batches() {
    let uploads = |accumulate, vertical| {
        let config = Config { accumulate, ..config(Some(vertical)) };
        let (trainer, _) = trainer(config, BLOCKS).unwrap();
        let schedule = trainer.plan().train_schedule();
        schedule.iter().filter(|operation| matches!(operation, Operation::Upload { .. })).count()
    };
    let of_one = uploads(1, 1);
    assert_eq!(uploads(MICRO_BATCHES, MICRO_BATCHES), of_one);
    assert!(uploads(MICRO_BATCHES, 1) > 2 * of_one);
    let bytes = |vertical| {
        let (mut trainer, model) = trainer(config(Some(vertical)), BLOCKS).unwrap();
        let before = trainer.usage().read_bytes;
        trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
        trainer.weights_digest().unwrap();
        trainer.usage().read_bytes - before
    };
    assert!(2 * bytes(MICRO_BATCHES) < bytes(1));
}

#[test]
fn an_evaluation_between_steps_is_the_same() {
    let losses = |vertical| {
        let (mut trainer, model) = trainer(config(Some(vertical)), BLOCKS).unwrap();
        let mut losses = vec![];
        for step in 0..2 {
            losses.push(trainer.evaluate(|| model.loss(&tokens(9, 0))?.to_scalar::<f32>()).unwrap());
            trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch))).unwrap();
        }
        losses
    };
    assert_eq!(losses(MICRO_BATCHES), losses(1));
}

/// Each micro-batch has its own gradients of a resident parameter that segments use.
#[test]
fn a_parameter_tied_across_segments_has_the_bits_of_micro_batches_one_after_another() {
    let run = |vertical: usize| {
        let engine = Engine::new(config(Some(vertical))).unwrap();
        let vb = engine.var_builder();
        let root = vb.clone();
        let make = |vb: VarBuilder<'static>| {
            let init = Init::Randn { mean: 0.0, stdev: 0.1 };
            let shared = root.get_with_hints((4, 4), "shared", init)?;
            Ok((vb.get_with_hints((4, 4), "own", init)?, shared))
        };
        let segments: Vec<_> = (0..2).map(|i| engine.segment(vb.pp(i), make).unwrap()).collect();
        let xs = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let loss = |micro_batch: usize| {
            let mut ys = (&xs * (0.3 + micro_batch as f64))?;
            for segment in &segments {
                ys = segment.call(&[&ys], |(own, shared), inputs| inputs[0].matmul(own)?.matmul(shared))?;
            }
            (ys - 1.0)?.sqr()?.mean_all()
        };
        let plan = engine.plan(AdamW::default(), |_| loss(0)).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let losses: Vec<f32> = (0..3).map(|_| trainer.step(loss).unwrap().loss).collect();
        (losses, trainer.weights_digest().unwrap())
    };
    assert_eq!(run(MICRO_BATCHES), run(1));
    assert_eq!(run(3), run(1));
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    for vertical in [0, MICRO_BATCHES + 1] {
        let error = train(config(Some(vertical)), BLOCKS, 1).unwrap_err();
        assert!(matches!(error, Error::Configuration(_)), "{error}");
        assert!(error.to_string().contains(&format!("vertical is {vertical}")), "{error}");
    }
}

/// Its gradients are summed in the order of its runs within a micro-batch, which vertically would be another
/// one.
#[test]
fn a_segment_that_runs_twice_is_refused_vertically_and_runs_one_after_another_by_itself() {
    let planned = |vertical| {
        let engine = Engine::new(config(vertical)).unwrap();
        let block = engine.segment(engine.var_builder().pp("shared"), |vb| Block::new(vb, 8)).unwrap();
        let xs = Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap();
        engine.plan(AdamW::default(), |_| block.forward(&block.forward(&xs)?)?.sqr()?.mean_all())
    };
    let error = planned(Some(2)).unwrap_err();
    assert!(error.to_string().contains("runs twice"), "{error}");
    assert_eq!(planned(None).unwrap().depths().vertical, 1);
}
