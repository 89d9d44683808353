//! Models as anyone may write them. One that cannot be trained ends with an error that says why: it never
//! hangs, and it never trains on wrong gradients in silence.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero::{AdamW, Config, CountingAllocator, Engine, Error, Placement, Segment, Tier, Trainer};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const WIDTH: usize = 8;

/// Counts what tensors take, for the tests of budgets. Each of those is a process of its own.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Longer than any of these models takes, on any machine.
const FOR_EVER: Duration = Duration::from_secs(120);

/// Runs something that must end. What panics in it panics here.
fn ends<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, ended) = channel();
    let thread = std::thread::spawn(move || {
        let value = run();
        let _ = sender.send(());
        value
    });
    if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(FOR_EVER) {
        panic!("it hangs");
    }
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A matrix.
struct Layer {
    weight: Tensor,
}

impl Layer {
    fn new(vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.3 };
        Ok(Self { weight: vb.get_with_hints((WIDTH, WIDTH), "weight", init)? })
    }

    fn of(&self, xs: &Tensor) -> Result<Tensor> {
        xs.matmul(&self.weight)?.tanh()
    }
}

fn segment(engine: &Engine, name: &str) -> Segment<Layer> {
    engine.segment(engine.var_builder().pp(name), Layer::new).unwrap()
}

fn inputs() -> Tensor {
    let values: Vec<f32> = (0..4 * WIDTH).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_vec(values, (4, WIDTH), &Device::Cpu).unwrap()
}

fn forward(segment: &Segment<Layer>, xs: &Tensor) -> Result<Tensor> {
    segment.call(&[xs], |layer, inputs| layer.of(&inputs[0]))
}

/// A trainer of a chain of two segments, whose loss is their output's mean times `factor`.
fn chain(config: Config, factor: f64) -> ferrozero::Result<(Trainer, impl Fn() -> Result<Tensor>)> {
    let engine = Engine::new(config)?;
    let (first, second) = (segment(&engine, "first"), segment(&engine, "second"));
    let loss = move || forward(&second, &forward(&first, &inputs())?)?.sqr()?.mean_all()? * factor;
    let plan = engine.plan(AdamW::default(), |_| loss())?;
    Ok((engine.trainer_from(plan)?, loss))
}

fn in_folder(folder: &Path) -> Config {
    Config { directory: Some(folder.join("run")), piece_bytes: Some(8192), ..Config::default() }
}

#[test]
fn settings_of_the_optimizer_that_are_no_numbers_are_refused() {
    type Setting = fn(&mut AdamW) -> &mut f64;
    let settings: [(&str, Setting); 5] = [
        ("learning_rate", |adamw| &mut adamw.learning_rate),
        ("beta1", |adamw| &mut adamw.beta1),
        ("beta2", |adamw| &mut adamw.beta2),
        ("epsilon", |adamw| &mut adamw.epsilon),
        ("weight_decay", |adamw| &mut adamw.weight_decay),
    ];
    let engine = Engine::new(Config::default()).unwrap();
    let first = segment(&engine, "first");
    for (name, setting) in settings {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-3, 1e300] {
            let mut adamw = AdamW::default();
            *setting(&mut adamw) = value;
            let error = engine.plan(adamw, |_| forward(&first, &inputs())?.sum_all()).map(drop).unwrap_err();
            assert!(matches!(&error, Error::Configuration(text) if text.contains(name)), "{error}");
        }
    }
    let (mut trainer, loss) = chain(Config::default(), 1.0).unwrap();
    for value in [f64::NAN, f64::INFINITY, -1e-3, 1e300] {
        let error = trainer.set_learning_rate(value).unwrap_err();
        assert!(matches!(&error, Error::Configuration(text) if text.contains("learning_rate")), "{error}");
    }
    assert_eq!(trainer.step(|_| loss()).unwrap().learning_rate, AdamW::default().learning_rate);
}

#[test]
fn a_state_that_is_not_finite_is_never_committed() {
    for (home, clip) in [
        (Tier::Device, None),
        (Tier::Host, None),
        (Tier::Disk, None),
        (Tier::Disk, Some(1e30)),
        (Tier::Device, Some(1e30)),
    ] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = Config { placement: Placement::All(home), clip, ..in_folder(folder.path()) };
        let (mut trainer, loss) = chain(config.clone(), 1.0).unwrap();
        trainer.step(|_| loss()).unwrap();
        trainer.commit(serde_json::Value::Null).unwrap();
        let good = trainer.weights_digest().unwrap();
        // Gradients are finite, and their squares are not.
        let failed = trainer.step(|_| loss()? * 1e25).map(drop);
        let error = failed.and_then(|()| trainer.commit(serde_json::Value::Null).map(drop)).unwrap_err();
        let Error::NonFiniteState { group, step, .. } = &error else { panic!("{home:?} {clip:?}: {error}") };
        assert!(["first", "second"].contains(&group.as_str()) && *step == 2, "{home:?}: {error}");
        trainer.commit(serde_json::Value::Null).unwrap_err();
        drop(trainer);
        let (resumed, _) = chain(Config { resume: true, ..config }, 1.0).unwrap();
        assert_eq!((resumed.steps(), resumed.weights_digest().unwrap()), (1, good));
    }
}

/// Plans and makes a step, and answers the first error.
fn plan_and_step(
    config: Config,
    make: impl FnOnce(&Engine) -> Box<dyn Fn() -> Result<Tensor> + Sync>,
) -> ferrozero::Result<f32> {
    let engine = Engine::new(config)?;
    let loss = make(&engine);
    let plan = engine.plan(AdamW::default(), |_| loss())?;
    Ok(engine.trainer_from(plan)?.step(|_| loss())?.loss)
}

#[test]
fn a_segment_that_captures_the_output_of_another_is_an_error_that_names_both() {
    let error = ends(|| {
        plan_and_step(Config::default(), |engine| {
            let (encoder, decoder) = (segment(engine, "encoder"), segment(engine, "decoder"));
            Box::new(move || {
                let encoded = forward(&encoder, &inputs())?;
                let output =
                    decoder.call(&[&inputs()], move |layer, inputs| layer.of(&(&inputs[0] + &encoded)?))?;
                output.sum_all()
            })
        })
        .unwrap_err()
    });
    assert!(
        matches!(&error, Error::NestedSegment { outer, inner } if outer == "decoder" && inner == "encoder")
    );
}

#[test]
fn a_segment_called_in_another_is_an_error_that_names_both() {
    let error = ends(|| {
        plan_and_step(Config::default(), |engine| {
            let (outer, inner) = (segment(engine, "outer"), segment(engine, "inner"));
            Box::new(move || {
                let inner = inner.clone();
                let output =
                    outer.call(&[&inputs()], move |layer, inputs| layer.of(&forward(&inner, &inputs[0])?))?;
                output.sum_all()
            })
        })
        .unwrap_err()
    });
    assert!(matches!(&error, Error::NestedSegment { outer, inner } if outer == "outer" && inner == "inner"));
}

/// The rehearsal does not see what the model does in a step only.
#[test]
fn a_segment_called_in_another_in_a_step_only_is_an_error_too() {
    let error = ends(|| {
        let engine = Engine::new(Config::default()).unwrap();
        let (outer, inner) = (segment(&engine, "outer"), segment(&engine, "inner"));
        let loss = |nested: bool| {
            let again = inner.clone();
            let xs = forward(&inner, &inputs())?;
            let output = outer.call(&[&xs], move |layer, inputs| match nested {
                true => layer.of(&forward(&again, &inputs[0])?),
                false => layer.of(&inputs[0]),
            })?;
            output.sum_all()
        };
        let plan = engine.plan(AdamW::default(), |_| loss(false)).unwrap();
        engine.trainer_from(plan).unwrap().step(|_| loss(true)).unwrap_err()
    });
    assert!(matches!(&error, Error::NestedSegment { outer, inner } if outer == "outer" && inner == "inner"));
}

#[test]
fn a_lock_that_is_held_through_the_loss_of_micro_batches_that_take_turns_is_an_error() {
    let error = ends(|| {
        let turn_limit = Duration::from_millis(200);
        let config = Config { accumulate: 2, vertical: Some(2), turn_limit, ..Config::default() };
        let (mut trainer, loss) = chain(config, 1.0).unwrap();
        let data = Mutex::new(());
        let held = || {
            let _guard = data.lock().unwrap();
            loss()
        };
        trainer.step(|_| held()).unwrap_err()
    });
    assert!(matches!(error, Error::Stuck { micro_batch: 1, .. }), "{error}");
}

#[test]
fn a_segment_that_computes_something_else_when_it_runs_again_is_an_error() {
    let engine = Engine::new(Config::default()).unwrap();
    let (first, second) = (segment(&engine, "first"), segment(&engine, "second"));
    let calls = Arc::new(AtomicU32::new(0));
    let loss = || {
        let calls = calls.clone();
        let output = second.call(&[&forward(&first, &inputs())?], move |layer, inputs| {
            // As a dropout that draws anew.
            let keeps = f64::from(calls.fetch_add(1, Ordering::Relaxed));
            layer.of(&inputs[0])? * keeps
        })?;
        output.sum_all()
    };
    let planned = engine.plan(AdamW::default(), |_| loss());
    let error = planned.and_then(|plan| engine.trainer_from(plan)?.step(|_| loss())).map(drop).unwrap_err();
    assert!(matches!(&error, Error::NotRepeatable { segment } if segment == "second"), "{error}");
}

/// Of several kinds of models whose segments go back in other orders than the reverse of that of their
/// forwards.
mod orders {
    use super::*;

    /// The gradients of one step, in the order of the parameters' names, of a model of segments `names`.
    fn gradients(
        config: Config,
        names: &[&str],
        loss: impl Fn(&dyn Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Tensor> + Sync,
    ) -> Vec<(String, Vec<f32>)> {
        let engine = Engine::new(config).unwrap();
        let segments: Vec<_> = names.iter().map(|name| (*name, segment(&engine, name))).collect();
        let run = |name: &str, xs: &Tensor| {
            let (_, segment) = segments.iter().find(|(known, _)| *known == name).unwrap();
            forward(segment, xs)
        };
        let loss = || loss(&run);
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let seen = Arc::new(Mutex::new(vec![]));
        let all = seen.clone();
        trainer.observe_gradients(move |gradient| {
            let values = gradient.values.flatten_all()?.to_vec1()?;
            all.lock().unwrap().push((gradient.name.to_owned(), values));
            Ok(())
        });
        trainer.step(|_| loss()).unwrap();
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.sort_by(|(one, _), (other, _)| one.cmp(other));
        seen
    }

    /// The same of candle alone, from the initial values of the engine's run.
    fn expected(
        names: &[&str],
        loss: impl Fn(&dyn Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Tensor>,
    ) -> Vec<(String, Vec<f32>)> {
        let engine = Engine::new(Config::default()).unwrap();
        let segments: Vec<_> = names.iter().map(|name| segment(&engine, name)).collect();
        let chain = || {
            let mut xs = inputs();
            for segment in &segments {
                xs = forward(segment, &xs)?;
            }
            xs.sum_all()
        };
        let plan = engine.plan(AdamW::default(), |_| chain()).unwrap();
        let trainer = engine.trainer_from(plan).unwrap();
        let weight = |name: &&str| {
            let values = trainer.parameter(&format!("{name}.weight")).unwrap();
            candle_core::Var::from_vec(values, (WIDTH, WIDTH), &Device::Cpu).unwrap()
        };
        let weights: Vec<_> = names.iter().map(|name| (*name, weight(name))).collect();
        let run = |name: &str, xs: &Tensor| {
            let (_, weight) = weights.iter().find(|(known, _)| *known == name).unwrap();
            Layer { weight: weight.as_tensor().clone() }.of(xs)
        };
        let gradients = loss(&run).unwrap().backward().unwrap();
        let mut all: Vec<_> = weights
            .iter()
            .filter_map(|(name, weight)| {
                let gradient = gradients.get(weight)?;
                Some((format!("{name}.weight"), gradient.flatten_all().unwrap().to_vec1().unwrap()))
            })
            .collect();
        all.sort_by(|(one, _), (other, _): &(String, _)| one.cmp(other));
        all
    }

    fn check(
        names: &[&str],
        loss: impl Fn(&dyn Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Tensor> + Sync + Copy,
    ) {
        let expected = expected(names, loss);
        assert_eq!(expected.len(), names.len());
        for (accumulate, vertical, kept) in [(1, 1, 0), (1, 1, names.len()), (2, 2, 0), (3, 2, 1)] {
            let config = Config {
                accumulate,
                vertical: Some(vertical),
                kept: Some(kept),
                placement: Placement::All(Tier::Host),
                ..Config::default()
            };
            let gradients = gradients(config, names, loss);
            assert_eq!(gradients.len(), accumulate * names.len());
            for (at, (name, values)) in gradients.iter().enumerate() {
                let (expected_name, expected_values) = &expected[at / accumulate];
                assert_eq!(name, expected_name);
                for (one, other) in values.iter().zip(expected_values) {
                    assert!((one - other).abs() <= 1e-5 * other.abs().max(1e-2), "{name}: {one} {other}");
                }
            }
        }
    }

    #[test]
    fn two_towers_are_trained_in_either_order_of_operands() {
        check(&["left", "right"], |run| {
            (run("left", &inputs())? - run("right", &inputs())?)?.sqr()?.sum_all()
        });
        check(&["left", "right"], |run| {
            let (left, right) = (run("left", &inputs())?, run("right", &inputs())?);
            (right - left)?.sqr()?.sum_all()
        });
    }

    #[test]
    fn towers_of_several_segments_that_meet_are_trained() {
        check(&["a", "b", "c", "d", "end"], |run| {
            let left = run("b", &run("a", &inputs())?)?;
            let right = run("d", &run("c", &inputs())?)?;
            run("end", &Tensor::cat(&[&right, &left], 0)?)?.sqr()?.sum_all()
        });
        check(&["trunk", "left", "right"], |run| {
            let trunk = run("trunk", &inputs())?;
            let (left, right) = (run("left", &trunk)?, run("right", &trunk)?);
            (&trunk * (right * left)?)?.sum_all()
        });
    }
}

#[test]
fn frozen_and_detached_segments_run_beside_those_that_are_trained() {
    for detached in [false, true] {
        for kept in [0, 2] {
            let engine = Engine::new(Config { kept: Some(kept), ..Config::default() }).unwrap();
            engine.freeze(|name, _| name.starts_with("teacher")).unwrap();
            let (teacher, student) = (segment(&engine, "teacher"), segment(&engine, "student"));
            let loss = || {
                let student = forward(&student, &inputs())?;
                let teacher = forward(&teacher, &inputs())?;
                let teacher = if detached { teacher.detach() } else { teacher };
                (student - teacher)?.sqr()?.mean_all()
            };
            let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
            let mut trainer = engine.trainer_from(plan).unwrap();
            let before = trainer.parameter("teacher.weight").unwrap();
            let first = trainer.step(|_| loss()).unwrap().loss;
            let second = trainer.step(|_| loss()).unwrap().loss;
            assert!(second < first, "{second} {first}");
            assert_eq!(trainer.parameter("teacher.weight").unwrap(), before);
        }
    }
}

#[test]
fn a_segment_may_read_its_first_input_twice() {
    // As two inputs, and as a view that it has captured.
    type Square = fn(&Segment<Layer>, &Tensor) -> Result<Tensor>;
    let squares: [Square; 3] = [
        |segment, xs| segment.call(&[xs], |layer, inputs| layer.of(&inputs[0])? * &inputs[0].detach()),
        |segment, xs| segment.call(&[xs, &xs.detach()], |layer, inputs| layer.of(&inputs[0])? * &inputs[1]),
        |segment, xs| {
            let view = xs.detach();
            segment.call(&[xs], move |layer, inputs| layer.of(&inputs[0])? * &view)
        },
    ];
    let digests = squares.map(|square| {
        let engine =
            Engine::new(Config { placement: Placement::All(Tier::Host), ..Config::default() }).unwrap();
        let (first, second) = (segment(&engine, "first"), segment(&engine, "second"));
        let loss = || square(&second, &forward(&first, &inputs())?)?.sum_all();
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        trainer.step(|_| loss()).unwrap();
        trainer.weights_digest().unwrap()
    });
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[0], digests[2]);
}

#[test]
fn dropout_draws_the_same_again_whatever_the_plan() {
    let run = |config: Config, probability: f32| {
        let engine = Engine::new(Config { seed: 5, accumulate: 2, ..config }).unwrap();
        let (first, second) = (segment(&engine, "first"), segment(&engine, "second"));
        let loss = || {
            let xs = ferrozero::dropout(&forward(&first, &inputs())?, probability)?;
            let output = second.call(&[&xs], move |layer, inputs| {
                let hidden = ferrozero::dropout(&layer.of(&inputs[0])?, probability)?;
                ferrozero::dropout(&layer.of(&hidden)?, probability)
            })?;
            output.sqr()?.sum_all()
        };
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let losses = [0; 2].map(|_| trainer.step(|_| loss()).unwrap().loss);
        let evaluated = [0; 2].map(|_| trainer.evaluate(|| loss()?.to_scalar::<f32>()).unwrap());
        assert_eq!(evaluated[0], evaluated[1]);
        (losses, trainer.weights_digest().unwrap())
    };
    let host = || Config { placement: Placement::All(Tier::Host), ..Config::default() };
    let expected = run(host(), 0.5);
    for (vertical, kept) in [(1, 2), (2, 0), (2, 1)] {
        let config = Config { vertical: Some(vertical), kept: Some(kept), ..host() };
        assert_eq!(run(config, 0.5), expected, "{vertical} {kept}");
    }
    assert_ne!(run(host(), 0.0), expected);
    let outside = ferrozero::dropout(&inputs(), 0.5).unwrap_err();
    assert!(outside.to_string().contains("outside of Trainer::step"), "{outside}");
}

#[test]
fn a_batch_that_is_larger_than_the_planned_one_is_an_error_with_both_shapes() {
    let engine = Engine::new(Config { memory_bytes: Some(64 << 20), ..Config::default() }).unwrap();
    let first = segment(&engine, "first");
    let loss = |rows: usize| forward(&first, &inputs().narrow(0, 0, 2)?.repeat((rows / 2, 1))?)?.sum_all();
    let plan = engine.plan(AdamW::default(), |_| loss(4)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    trainer.step(|_| loss(4)).unwrap();
    trainer.step(|_| loss(2)).unwrap();
    let error = trainer.step(|_| loss(1024)).unwrap_err();
    let Error::LargerThanPlanned { segment, found, planned } = &error else { panic!("{error}") };
    assert_eq!((segment.as_str(), &found[..], &planned[..]), ("first", &[1024, WIDTH][..], &[4, WIDTH][..]));
}
