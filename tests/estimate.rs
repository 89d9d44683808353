//! What the planner estimates of a model, against the model. One test, because the allocator counts the whole
//! process.

use candle_core::{DType, Device, Tensor};
use ferrozero::internals::estimate::model_shape::ModelShape;
use ferrozero::internals::estimate::question::Question;
use ferrozero::internals::models::gpt::{Gpt, GptConfig, StreamedBlock};
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::planner::machine::Machine;
use ferrozero::{AdamW, Choices, Config, CountingAllocator, Engine, Placement, Products, Tier};

// What a rehearsal measures is what this allocator counts.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Device memory of a plan that is made of a shape, against that of the engine, which measures the model.
#[test]
fn estimated_memory_is_near_what_a_rehearsal_measures() {
    let mut ratios = vec![];
    for (layers, hidden, heads, batch, sequence, vertical, kept, tiles) in [
        (4, 128, 4, 4, 64, 1, 0, 1),
        (2, 256, 8, 8, 128, 1, 0, 1),
        (6, 192, 4, 2, 128, 1, 0, 1),
        (4, 192, 4, 4, 128, 4, 0, 1),
        (8, 128, 4, 4, 64, 1, 8, 1),
        (6, 192, 4, 4, 128, 3, 4, 1),
        (4, 256, 4, 1, 64, 1, 0, 4),
        (4, 192, 4, 4, 128, 1, 0, 3),
        (4, 192, 4, 4, 128, 1, 6, 3),
    ] {
        let config = GptConfig { vocabulary: 256, layers, hidden, heads, sequence };
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let engine = Engine::new(Config {
            directory: Some(folder.path().join("run")),
            placement: Placement::All(Tier::Disk),
            boundaries: Some(Tier::Device),
            clip: Some(1.0),
            slots: Some(2),
            accumulate: vertical,
            vertical: Some(vertical),
            kept: Some(kept),
            ..Config::default()
        })
        .unwrap();
        let none = Adapting::default();
        let block = |vb, _| StreamedBlock::from_config(&engine, &config, &none, tiles, vb);
        let model = Gpt::new(&config, engine.var_builder(), block).unwrap();
        let tokens = Tensor::zeros((batch, sequence), DType::U32, &Device::Cpu).unwrap();
        let plan = engine.plan(AdamW::default(), |_| model.loss(&tokens, &tokens)).unwrap();
        let choices = Choices {
            placement: Placement::All(Tier::Disk),
            boundaries: Some(Tier::Device),
            slots: Some(2),
            vertical: Some(vertical),
            kept: Some(kept),
            ..Choices::default()
        };
        let mut shape = ModelShape::gpt(256, layers, hidden, heads, sequence);
        shape.perceptron_tiles = tiles;
        assert_eq!(shape.parameters(), plan.layout().parameter_elements());
        let machine = Machine {
            disk_read_bytes_per_s: 2e9,
            disk_write_bytes_per_s: 2e9,
            upload_bytes_per_s: 8e9,
            download_bytes_per_s: 8e9,
            optimizer_bytes_per_s: 20e9,
            matmul_f32_flop_per_s: Some(1e11),
            ..Machine::default()
        };
        let question = Question {
            shape,
            batch,
            sequence,
            accumulate: vertical,
            clip: true,
            in_place: false,
            ranks: 1,
            machine,
            products: Products::F32,
            choices,
        };
        let answer = question.answer().unwrap();
        let ratio = answer.plan.device_bytes() as f64 / plan.device_bytes() as f64;
        println!(
            "{layers} × {hidden}, {vertical} × {batch} × {sequence}, {kept} kept, {tiles} tiles: {ratio:.2}"
        );
        ratios.push(ratio);
    }
    assert!(ratios.iter().all(|ratio| (0.65..1.35).contains(ratio)), "{ratios:?}");
}
