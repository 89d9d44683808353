//! Computing in bf16 and f16 over masters in f32: where still never changes what, the losses stay near those of f32, and a
//! step whose gradients overflow in f16 changes nothing.

mod support;

use candle_core::DType;
use ferrozero::{BackendChoice, Config, Placement, Tier};
use support::{tokens, train, trainer};

const BLOCKS: usize = 3;

fn config(dtype: DType, tier: Tier) -> Config {
    Config {
        dtype,
        placement: Placement::All(tier),
        piece_bytes: Some(8192),
        backend: BackendChoice::Memory,
        ..Config::default()
    }
}

#[test]
fn every_placement_gives_the_same_bits() {
    for dtype in [DType::BF16, DType::F16] {
        for (clip, accumulate) in [(None, 1), (Some(0.05), 2)] {
            let with = |config: Config| Config { clip, accumulate, ..config };
            let expected = train(with(config(dtype, Tier::Host)), BLOCKS, 3).unwrap();
            let slots = Config { slots: Some(1), look_ahead: Some(1), ..config(dtype, Tier::Disk) };
            let boundaries = Config { boundaries: Some(Tier::Disk), ..config(dtype, Tier::Disk) };
            for (name, config) in [("slots", slots), ("boundaries", boundaries)] {
                let found = train(with(config), BLOCKS, 3).unwrap();
                assert_eq!(found, expected, "{dtype:?}, {name}, clip {clip:?}, {accumulate} micro-batches");
            }
        }
    }
}

#[test]
fn losses_stay_near_those_of_f32() {
    let (expected, _) = train(Config::default(), BLOCKS, 20).unwrap();
    assert!(expected[19] < expected[0]);
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        let (found, _) = train(config(dtype, Tier::Host), BLOCKS, 20).unwrap();
        for (expected, found) in expected.iter().zip(&found) {
            assert!((expected - found).abs() <= tolerance * expected.abs(), "{dtype:?}: {found}, {expected}");
        }
    }
}

#[test]
fn states_on_the_device_are_refused_where_it_computes_in_another_type() {
    let error = train(config(DType::BF16, Tier::Device), 1, 1).unwrap_err().to_string();
    assert!(error.contains("on the device") && error.contains("f32"), "{error}");
    let error = train(config(DType::F64, Tier::Host), 1, 1).unwrap_err().to_string();
    assert!(error.contains("F64") && error.contains("bf16"), "{error}");
}

#[test]
fn a_step_that_overflows_in_f16_is_skipped_and_changes_nothing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = Config {
        directory: Some(folder.path().join("run")),
        backend: BackendChoice::Auto,
        ..config(DType::F16, Tier::Disk)
    };
    let (mut trained, model) = trainer(config.clone(), BLOCKS).unwrap();
    let first = trained.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
    assert!(!first.skipped && first.gradient_norm.is_finite());
    let before = trained.weights_digest().unwrap();

    // Gradients that the scale of the loss, 2^15 at first, puts beyond the largest number of f16.
    let large = |micro_batch| model.loss(&tokens(1, micro_batch))? * 1000.0;
    let mut skipped = 0;
    while trained.step(large).unwrap().skipped {
        skipped += 1;
        assert_eq!(trained.weights_digest().unwrap(), before, "skipped {skipped}");
        assert_eq!(trained.skipped_steps(), skipped);
        assert!(skipped < 16, "the scale is not halved");
    }
    assert!(skipped > 0);
    assert_ne!(trained.weights_digest().unwrap(), before);

    // The scale is part of the commit: the run that resumes does not have to find it again.
    trained.commit(serde_json::Value::Null).unwrap();
    drop((trained, model));
    let (mut resumed, model) = trainer(Config { resume: true, ..config }, BLOCKS).unwrap();
    assert_eq!(resumed.skipped_steps(), skipped);
    let next = resumed.step(|micro_batch| model.loss(&tokens(2, micro_batch))? * 1000.0).unwrap();
    assert!(!next.skipped);
}

#[test]
fn what_overflows_at_every_scale_is_an_error() {
    let (mut trainer, model) = trainer(config(DType::F16, Tier::Host), 1).unwrap();
    // The gradient of the largest finite loss.
    let error = (0..40).find_map(|_| {
        let step =
            trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))?.to_dtype(DType::F32)? * 1e8);
        step.err()
    });
    let error = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("infinite or NaN"), "{error}");
}
