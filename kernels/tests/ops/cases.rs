//! The table of operations that every promise is tested on.

use candle_core::{D, DType, Device, Result, Tensor};
use ferrozero_kernels::ops;

type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Sync>;

/// One operation on inputs of one shape, beside the same composed of candle's own operations.
pub struct Case {
    pub name: String,
    /// Shapes of the inputs that receive gradients.
    pub shapes: Vec<Vec<usize>>,
    pub ours: Operation,
    /// Runs in any float dtype.
    pub composed: Operation,
}

impl Case {
    fn new(
        name: &str,
        shapes: &[&[usize]],
        ours: impl Fn(&[Tensor]) -> Result<Tensor> + Sync + 'static,
        composed: impl Fn(&[Tensor]) -> Result<Tensor> + Sync + 'static,
    ) -> Self {
        let name = format!("{name} {shapes:?}");
        let shapes = shapes.iter().map(|shape| shape.to_vec()).collect();
        Case { name, shapes, ours: Box::new(ours), composed: Box::new(composed) }
    }

    /// Random inputs, the same at each call.
    pub fn inputs(&self) -> Vec<Tensor> {
        let seeds = 1..;
        self.shapes.iter().zip(seeds).map(|(shape, seed)| random(shape, seed)).collect()
    }
}

/// Sums of three uniform numbers, in −3..3, from a hash of seed and index.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let uniform = |counter: u64| {
        let mut bits = (counter ^ seed.rotate_left(32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let count = shape.iter().product::<usize>() as u64;
    let elements: Vec<f32> = (0..count).map(|i| (0..3).map(|part| uniform(3 * i + part)).sum()).collect();
    Tensor::from_vec(elements, shape, &Device::Cpu).unwrap()
}

/// A constant where the inputs are, so that a case runs on any device.
fn beside(input: &Tensor, constant: &Tensor) -> Result<Tensor> {
    let dtype = if constant.dtype() == DType::U32 { DType::U32 } else { input.dtype() };
    constant.to_device(input.device())?.to_dtype(dtype)
}

fn targets(rows: usize, vocabulary_size: usize) -> Tensor {
    let targets: Vec<u32> = (0..rows).map(|row| ((row * 7 + 3) % vocabulary_size) as u32).collect();
    Tensor::from_vec(targets, rows, &Device::Cpu).unwrap()
}

/// Small shapes with sizes that no vector width divides; some span more than one block.
pub fn small() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, width) in [(1, 1), (3, 17), (5, 33), (2, 40)] {
        cases.extend(element_cases(&[rows, 2, width]));
        cases.push(layer_norm(&[rows, 2, width + 1]));
        cases.push(rms_norm(&[rows, 2, width]));
        cases.push(softmax(&[rows, width]));
    }
    cases.push(layer_norm(&[67, 3]));
    for (query_rows, columns) in [(1, 1), (1, 9), (3, 3), (17, 17), (5, 33)] {
        cases.push(causal_softmax(2, query_rows, columns, None));
    }
    for window in WINDOWS_OF_17 {
        cases.push(causal_softmax(2, 5, 17, Some(window)));
    }
    for (positions, pairs, batched) in [(1, 1, false), (5, 3, false), (17, 4, true)] {
        cases.extend(rope_cases(2, 3, positions, pairs, batched));
    }
    for (rows, in_width, out_width) in [(1, 1, 1), (3, 17, 5), (17, 3, 33), (67, 2, 3)] {
        cases.extend(linear_cases(rows, in_width, out_width));
    }
    for (batch, positions, heads, head_width) in [(1, 1, 1, 1), (2, 3, 3, 2), (1, 17, 2, 5), (1, 67, 1, 1)] {
        cases.push(causal_attention(batch, positions, heads, head_width, None));
    }
    for window in WINDOWS_OF_17 {
        cases.push(causal_attention(1, 17, 2, 3, Some(window)));
    }
    for (batch, positions, heads, keys, head_width) in [(1, 1, 1, 1, 1), (2, 3, 6, 2, 2), (1, 67, 3, 1, 5)] {
        cases.push(grouped_causal_attention(batch, positions, (heads, keys), head_width, None));
    }
    cases.push(grouped_causal_attention(2, 17, (4, 2), 3, Some(5)));
    for (rows, width, vocabulary_size) in [(1, 1, 1), (3, 17, 5), (40, 3, 8), (17, 2, 33)] {
        cases.push(embedding(rows, width, vocabulary_size));
    }
    for (rows, vocabulary_size) in [(1, 1), (3, 17), (17, 33)] {
        cases.push(cross_entropy(rows, vocabulary_size));
        cases.push(linear_cross_entropy(rows, 3, vocabulary_size));
    }
    cases
}

/// The least, at the ends of 17 positions, above them, and in between.
const WINDOWS_OF_17: [usize; 6] = [1, 2, 7, 16, 17, 40];

/// Shapes that give more than two thread blocks to every kernel, with widths that vectors divide and others.
#[allow(dead_code, reason = "the CPU has other loops than kernels")]
pub fn several_blocks() -> Vec<Case> {
    let mut cases = element_cases(&[9, 259]);
    cases.extend(element_cases(&[3, 3, 260]));
    cases.push(layer_norm(&[130, 514]));
    cases.push(rms_norm(&[130, 516]));
    for columns in [35, 36] {
        cases.push(softmax(&[3, columns]));
        cases.push(causal_softmax(1, 5, columns, None));
        cases.push(causal_softmax(1, 5, columns, Some(19)));
    }
    for pairs in [32, 33] {
        cases.extend(rope_cases(2, 3, 11, pairs, true));
    }
    cases.extend(linear_cases(130, 3, 518).into_iter().filter(|case| case.shapes.len() == 3));
    for window in [None, Some(1), Some(17), Some(40)] {
        cases.push(causal_attention(2, 37, 3, 5, window));
    }
    cases.push(grouped_causal_attention(2, 37, (6, 3), 4, Some(17)));
    // Tokens 1, 5, 3, 1 and 4: the last two blocks of the gradient have one of their own.
    cases.push(embedding(5, 36, 11));
    for vocabulary_size in [33, 36] {
        cases.push(cross_entropy(260, vocabulary_size));
    }
    cases.push(linear_cross_entropy(260, 9, 66));
    cases
}

/// Rows of more than four elements for each of 256 threads, and more tokens and targets than there are
/// threads.
#[allow(dead_code, reason = "the CPU has other loops than kernels")]
pub fn wide_rows() -> Vec<Case> {
    let mut cases = vec![embedding(301, 1030, 5), cross_entropy(260, 3)];
    for width in [1030, 1032] {
        cases.push(layer_norm(&[2, width]));
        cases.push(rms_norm(&[2, width]));
        cases.push(softmax(&[2, width]));
        cases.push(causal_softmax(1, 2, width, Some(601)));
        cases.push(cross_entropy(2, width));
    }
    cases
}

/// Shapes that give several tasks to every threaded loop and product, and several tiles of logits.
#[allow(dead_code, reason = "kernels have other loops than the CPU")]
pub fn large() -> Vec<Case> {
    let mut cases = element_cases(&[3, 129, 258]);
    cases.push(layer_norm(&[301, 193]));
    cases.push(rms_norm(&[301, 193]));
    cases.push(softmax(&[301, 193]));
    cases.push(causal_softmax(5, 129, 131, None));
    cases.push(causal_softmax(5, 129, 131, Some(67)));
    cases.extend(rope_cases(2, 3, 129, 33, true));
    cases.extend(linear_cases(301, 193, 257));
    // Windows of less than a block of rows, of one, of more, and of all positions.
    for window in [None, Some(1), Some(33), Some(64), Some(65), Some(100), Some(150)] {
        cases.push(causal_attention(2, 150, 3, 17, window));
        cases.push(grouped_causal_attention(2, 150, (6, 3), 17, window));
    }
    cases.push(embedding(1101, 301, 193));
    cases.push(cross_entropy(301, 193));
    cases.push(linear_cross_entropy(1101, 17, 2100));
    cases
}

fn element_cases(shape: &[usize]) -> Vec<Case> {
    let mut doubled = shape.to_vec();
    doubled[shape.len() - 1] *= 2;
    vec![
        Case::new("gelu", &[shape], |x| ops::gelu(&x[0]), |x| x[0].gelu()),
        Case::new("silu", &[shape], |x| ops::silu(&x[0]), |x| x[0].silu()),
        Case::new("gated_silu", &[shape, shape], |x| ops::gated_silu(&x[0], &x[1]), |x| x[0].silu()? * &x[1]),
        Case::new("swiglu", &[&doubled], |x| ops::swiglu(&x[0]), |x| candle_nn::ops::swiglu(&x[0])),
    ]
}

const EPS: f32 = 1e-5;

fn layer_norm(shape: &[usize]) -> Case {
    let width = [shape[shape.len() - 1]];
    let composed = |x: &[Tensor]| {
        let centred = x[0].broadcast_sub(&x[0].mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normalised = centred.broadcast_div(&(variance + f64::from(EPS))?.sqrt()?)?;
        normalised.broadcast_mul(&x[1])?.broadcast_add(&x[2])
    };
    let ours = |x: &[Tensor]| ops::layer_norm(&x[0], &x[1], &x[2], EPS);
    Case::new("layer_norm", &[shape, &width, &width], ours, composed)
}

fn rms_norm(shape: &[usize]) -> Case {
    let width = [shape[shape.len() - 1]];
    let composed = |x: &[Tensor]| {
        let mean_square = x[0].sqr()?.mean_keepdim(D::Minus1)?;
        x[0].broadcast_div(&(mean_square + f64::from(EPS))?.sqrt()?)?.broadcast_mul(&x[1])
    };
    Case::new("rms_norm", &[shape, &width], |x| ops::rms_norm(&x[0], &x[1], EPS), composed)
}

fn softmax(shape: &[usize]) -> Case {
    let composed = |x: &[Tensor]| candle_nn::ops::softmax(&x[0], D::Minus1);
    Case::new("softmax_last_dim", &[shape], |x| ops::softmax_last_dim(&x[0]), composed)
}

/// 0 where a row sees a column, −∞ elsewhere: `[query_rows, columns]`.
fn causal_mask(query_rows: usize, columns: usize, window: Option<usize>, dtype: DType) -> Result<Tensor> {
    let hidden = |i: usize, j: usize| {
        let own = i + columns - query_rows;
        let within = window.is_none_or(|window| j + window > own);
        if j <= own && within { 0.0 } else { f32::NEG_INFINITY }
    };
    let mask: Vec<f32> = (0..query_rows * columns).map(|at| hidden(at / columns, at % columns)).collect();
    Tensor::from_vec(mask, (query_rows, columns), &Device::Cpu)?.to_dtype(dtype)
}

fn causal_softmax(matrices: usize, query_rows: usize, columns: usize, window: Option<usize>) -> Case {
    let composed = move |x: &[Tensor]| {
        let mask = causal_mask(query_rows, columns, window, x[0].dtype())?;
        candle_nn::ops::softmax(&(&x[0] * 0.7)?.broadcast_add(&mask)?, D::Minus1)
    };
    let ours = move |x: &[Tensor]| ops::causal_softmax(&x[0], 0.7, window);
    Case::new(
        &format!("causal_softmax, window {window:?}"),
        &[&[matrices, query_rows, columns]],
        ours,
        composed,
    )
}

fn rope_cases(batch: usize, heads: usize, positions: usize, pairs: usize, batched: bool) -> Vec<Case> {
    let table_positions = positions + 2;
    let table_shape =
        if batched { vec![batch, table_positions, pairs] } else { vec![table_positions, pairs] };
    let angles = random(&table_shape, 99);
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let composed = |interleaved: bool| {
        let tables = [cos.clone(), sin.clone()];
        move |x: &[Tensor]| {
            let tables = tables.iter().map(|table| {
                let sequences = if batched { batch } else { 1 };
                let table = table.reshape((sequences, 1, table_positions, pairs))?.narrow(2, 0, positions)?;
                table.to_dtype(x[0].dtype())?.broadcast_as((batch, heads, positions, pairs))
            });
            let tables = tables.collect::<Result<Vec<_>>>()?;
            let (pair_dimension, shape) = match interleaved {
                true => (4, (batch, heads, positions, pairs, 2)),
                false => (3, (batch, heads, positions, 2, pairs)),
            };
            let split = x[0].reshape(shape)?;
            let (a, b) = (split.get_on_dim(pair_dimension, 0)?, split.get_on_dim(pair_dimension, 1)?);
            let rotated_a = ((&a * &tables[0])? - (&b * &tables[1])?)?;
            let rotated_b = ((&a * &tables[1])? + (&b * &tables[0])?)?;
            Tensor::stack(&[rotated_a, rotated_b], pair_dimension)?.reshape(x[0].shape())
        }
    };
    let shape = [batch, heads, positions, 2 * pairs];
    let halves = {
        let (cos, sin) = (cos.clone(), sin.clone());
        move |x: &[Tensor]| ops::rope(&x[0], &beside(&x[0], &cos)?, &beside(&x[0], &sin)?)
    };
    let by_position = {
        let (cos, sin) = (cos.clone(), sin.clone());
        move |x: &[Tensor]| {
            let xs = x[0].transpose(1, 2)?.reshape((batch, positions, heads * 2 * pairs))?;
            let rotated = ops::rope_by_position(&xs, &beside(&x[0], &cos)?, &beside(&x[0], &sin)?, heads)?;
            rotated.reshape((batch, positions, heads, 2 * pairs))?.transpose(1, 2)
        }
    };
    let neighbours = {
        let (cos, sin) = (cos.clone(), sin.clone());
        move |x: &[Tensor]| ops::rope_i(&x[0], &beside(&x[0], &cos)?, &beside(&x[0], &sin)?)
    };
    vec![
        Case::new("rope", &[&shape], halves, composed(false)),
        Case::new("rope_by_position", &[&shape], by_position, composed(false)),
        Case::new("rope_i", &[&shape], neighbours, composed(true)),
    ]
}

fn linear_cases(rows: usize, in_width: usize, out_width: usize) -> Vec<Case> {
    let product = |x: &[Tensor]| x[0].broadcast_matmul(&x[1].t()?);
    let (xs, weight) = ([1, rows, in_width], [out_width, in_width]);
    vec![
        Case::new("linear", &[&xs, &weight], |x| ops::linear(&x[0], &x[1], None), product),
        Case::new(
            "linear with bias",
            &[&xs, &weight, &[out_width]],
            |x| ops::linear(&x[0], &x[1], Some(&x[2])),
            move |x| product(x)?.broadcast_add(&x[2]),
        ),
        Case::new(
            "closing_linear",
            &[&xs, &weight, &[out_width], &[1, rows, out_width]],
            |x| ops::closing_linear(&x[3], &x[0], &x[1], Some(&x[2])),
            move |x| &x[3] + product(x)?.broadcast_add(&x[2])?,
        ),
    ]
}

pub fn causal_attention(
    batch: usize,
    positions: usize,
    heads: usize,
    head_width: usize,
    window: Option<usize>,
) -> Case {
    let channels = heads * head_width;
    let composed = move |x: &[Tensor]| {
        let part = |index: usize| {
            let part = x[0].narrow(2, index * channels, channels)?;
            part.reshape((batch, positions, heads, head_width))?.transpose(1, 2)?.contiguous()
        };
        let scores = (part(0)?.matmul(&part(1)?.t()?)? / (head_width as f64).sqrt())?;
        let scores = scores.broadcast_add(&causal_mask(positions, positions, window, scores.dtype())?)?;
        let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&part(2)?)?;
        mixed.transpose(1, 2)?.reshape((batch, positions, channels))
    };
    let ours = move |x: &[Tensor]| ops::causal_attention(&x[0], heads, window);
    Case::new(
        &format!("causal_attention, {heads} heads, window {window:?}"),
        &[&[batch, positions, 3 * channels]],
        ours,
        composed,
    )
}

fn grouped_causal_attention(
    batch: usize,
    positions: usize,
    (heads, key_value_heads): (usize, usize),
    head_width: usize,
    window: Option<usize>,
) -> Case {
    let packed = causal_attention(batch, positions, heads, head_width, window).composed;
    let composed = move |x: &[Tensor]| {
        let repeat = |xs: &Tensor| {
            let split = xs.reshape((batch, positions, key_value_heads, 1, head_width))?;
            let shape = (batch, positions, key_value_heads, heads / key_value_heads, head_width);
            split.broadcast_as(shape)?.reshape((batch, positions, heads * head_width))
        };
        packed(&[Tensor::cat(&[x[0].clone(), repeat(&x[1])?, repeat(&x[2])?], 2)?])
    };
    let ours = move |x: &[Tensor]| {
        ops::grouped_causal_attention(&x[0], &x[1], &x[2], heads, key_value_heads, window)
    };
    let keys = [batch, positions, key_value_heads * head_width];
    Case::new(
        &format!("grouped_causal_attention, {heads} heads, window {window:?}"),
        &[&[batch, positions, heads * head_width], &keys, &keys],
        ours,
        composed,
    )
}

fn embedding(rows: usize, width: usize, vocabulary_size: usize) -> Case {
    // Some tokens more than once, some never.
    let tokens: Vec<u32> = (0..rows).map(|row| ((row * 7 + 3) % vocabulary_size / 2) as u32).collect();
    let tokens = Tensor::from_vec(tokens, rows, &Device::Cpu).unwrap();
    let same_tokens = tokens.clone();
    let composed = move |x: &[Tensor]| x[0].index_select(&same_tokens, 0);
    let ours = move |x: &[Tensor]| ops::embedding(&x[0], &beside(&x[0], &tokens)?);
    Case::new(&format!("embedding of {rows}"), &[&[vocabulary_size, width]], ours, composed)
}

fn cross_entropy(rows: usize, vocabulary_size: usize) -> Case {
    let targets = targets(rows, vocabulary_size);
    let same_targets = targets.clone();
    let composed = move |x: &[Tensor]| candle_nn::loss::cross_entropy(&x[0], &same_targets);
    let ours = move |x: &[Tensor]| ops::cross_entropy(&x[0], &beside(&x[0], &targets)?);
    Case::new("cross_entropy", &[&[rows, vocabulary_size]], ours, composed)
}

pub fn linear_cross_entropy(rows: usize, width: usize, vocabulary_size: usize) -> Case {
    let targets = targets(rows, vocabulary_size);
    let same_targets = targets.clone();
    let composed =
        move |x: &[Tensor]| candle_nn::loss::cross_entropy(&x[0].matmul(&x[1].t()?)?, &same_targets);
    let ours = move |x: &[Tensor]| ops::linear_cross_entropy(&x[0], &x[1], &beside(&x[0], &targets)?);
    Case::new("linear_cross_entropy", &[&[rows, width], &[vocabulary_size, width]], ours, composed)
}
