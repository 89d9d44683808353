//! What is spared while gradients are made changes none of them.

use super::cases::{large, random, small};
use super::{run, upstream};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};
use ferrozero_kernels::ops;

/// Starts a backward from a given gradient without looking at the value.
struct Inject(Tensor);

impl CustomOp1 for Inject {
    fn name(&self) -> &'static str {
        "inject"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn elements(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn recomputed_gradients_are_those_of_a_plain_backward() {
    for case in small().into_iter().chain(large()) {
        let inputs = case.inputs();
        let expected = run(&case.ours, &inputs).gradients;
        let variables: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
        let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
        let gradients = ops::recompute(|| {
            let result = (case.ours)(&tensors)?;
            let upstream = upstream(result.dims(), result.dtype())?;
            result.apply_op1(Inject(upstream))?.backward()
        });
        let gradients = gradients.unwrap();
        for (variable, expected) in variables.iter().zip(expected) {
            let gradient = gradients.get(variable).expect("no gradient reached an input");
            assert_eq!(elements(gradient), elements(&expected), "{}", case.name);
        }
    }
}

#[test]
fn a_variable_used_several_times_gets_the_sum() {
    let weight = Var::from_tensor(&random(&[5, 5], 1)).unwrap();
    let table = random(&[3, 5], 2);
    let loss = || {
        let hidden = ops::linear(&table, &weight, None)?;
        // Once by an operation of ours that hands its gradient over, once by candle's own that does not.
        ops::linear(&hidden, &weight, None)?.matmul(&weight)?.sum_all()
    };
    let plain = loss().unwrap().backward().unwrap();
    let spared = ops::backward(&loss().unwrap()).unwrap();
    let [plain, spared] = [plain, spared].map(|store| elements(store.get(&weight).unwrap()));
    for (plain, spared) in plain.iter().zip(&spared) {
        assert!((plain - spared).abs() <= 1e-5 * plain.abs().max(1.0), "{spared} and not {plain}");
    }
}

#[test]
fn a_value_that_was_spared_is_refused_by_every_operation() {
    let [residual, xs] = [random(&[2, 3], 1), random(&[2, 4], 2)];
    let weight = Var::from_tensor(&random(&[3, 4], 3)).unwrap();
    let result = ops::recompute(|| {
        let closed = ops::closing_linear(&residual, &xs, &weight, None)?;
        assert!(closed.gelu().is_err() && (&closed + 1.0).is_err() && closed.to_vec2::<f32>().is_err());
        assert!(ops::gelu(&closed).is_err());
        closed.apply_op1(Inject(residual.clone()))?.backward()
    });
    assert_eq!(result.unwrap().get(&weight).unwrap().dims(), [3, 4]);
    // And outside it has its value again.
    assert!(ops::closing_linear(&residual, &xs, &weight, None).unwrap().to_vec2::<f32>().is_ok());
}

#[test]
fn a_failed_recomputation_leaves_nothing_behind() {
    let weight = Var::from_tensor(&random(&[3, 4], 3)).unwrap();
    let xs = random(&[2, 4], 2);
    assert!(ops::recompute(|| Err(candle_core::Error::Msg("no".into()))).is_err());
    let store = ops::linear(&xs, &weight, None).unwrap().backward().unwrap();
    assert!(store.get(&weight).is_some());
}

#[test]
fn gradients_made_in_the_forward_are_those_of_the_backward() {
    // More rows than one part of the logits has.
    let (rows, width, vocabulary_size) = (515, 7, 33);
    let variable = |shape: &[usize], seed| Var::from_tensor(&random(shape, seed)).unwrap();
    let (hidden, weight) = (variable(&[rows, width], 1), variable(&[vocabulary_size, width], 2));
    let targets: Vec<u32> = (0..rows).map(|row| (row * 5 % vocabulary_size) as u32).collect();
    let targets = Tensor::from_vec(targets, rows, hidden.device()).unwrap();
    let loss = || ops::linear_cross_entropy(&hidden, &weight, &targets);
    let gradients = |loss: &Tensor| {
        let store = ops::backward(loss).unwrap();
        [&hidden, &weight].map(|variable| elements(store.get(variable).unwrap()))
    };
    let later = gradients(&loss().unwrap());
    let at_once = ops::before_backward(loss).unwrap();
    assert_eq!(gradients(&at_once), later);
    // They are made once; a second backward makes them again.
    assert_eq!(gradients(&at_once), later);
    let scaled = ops::before_backward(|| loss()? * 3.0).unwrap();
    for (scaled, later) in gradients(&scaled).iter().flatten().zip(later.iter().flatten()) {
        assert!((scaled - 3.0 * later).abs() <= 1e-6, "{scaled} and not three times {later}");
    }
}

#[test]
fn gradients_of_a_kept_graph_are_those_of_a_recomputation_and_its_value_is_that_of_a_plain_forward() {
    for case in small().into_iter().chain(large()) {
        let inputs = case.inputs();
        let variables: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
        let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
        let expected = ops::without_graph(|| (case.ours)(&inputs)).unwrap();
        let upstream = upstream(expected.dims(), expected.dtype()).unwrap();
        let again = ops::recompute(|| (case.ours)(&tensors)?.apply_op1(Inject(upstream.clone()))?.backward());
        let (end, value) = ops::before_backward(|| ops::keep(|| (case.ours)(&tensors))).unwrap();
        assert_eq!(elements(&value), elements(&expected), "{}", case.name);
        let kept = ops::backward(&end.apply_op1(Inject(upstream)).unwrap()).unwrap();
        let again = again.unwrap();
        for variable in &variables {
            let [kept, again] = [&kept, &again].map(|gradients| elements(gradients.get(variable).unwrap()));
            assert_eq!(kept, again, "{}", case.name);
        }
    }
}

#[test]
fn the_value_of_a_closing_layer_is_beside_its_graph() {
    let [residual, xs] = [random(&[2, 3], 1), random(&[2, 4], 2)];
    let weight = Var::from_tensor(&random(&[3, 4], 3)).unwrap();
    let closing = || ops::closing_linear(&residual, &xs, &weight, None);
    let (end, value) = ops::keep(closing).unwrap();
    assert!(end.to_vec2::<f32>().is_err() && (&end + 1.0).is_err());
    assert_eq!(elements(&value), elements(&closing().unwrap()));
    // One that does not close the part is refused where it is used, and another value is in the graph.
    assert!(ops::keep(|| closing()? + 1.0).is_err());
    let (end, value) = ops::keep(|| closing().and_then(|_| &residual * 2.0)).unwrap();
    assert_eq!(end.id(), value.id());
}
