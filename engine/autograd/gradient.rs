//! Gradients on their way out of candle: taken from its store, shown to whoever observes them, and handed on.

use crate::autograd::registry::GroupTensors;
use crate::device::tensor_storage::{self, TensorStorage};
use crate::schedule::layout::Layout;
use crate::sync::lock;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// A parameter's gradient as autograd left it, of one micro-batch, before it leaves the device.
#[derive(Debug, Clone, Copy)]
pub struct Gradient<'a> {
    /// Name of the parameter, as in [`Trainer::parameters`](crate::Trainer::parameters); of a layer in tiles,
    /// that of a tile.
    pub name: &'a str,
    /// Number of the micro-batch in its step, from 0. The step's gradient is the mean over all of them.
    pub micro_batch: usize,
    /// The gradient, in shape and type of the parameter on the device. Its storage is taken away afterwards:
    /// copy what is to be kept.
    pub values: &'a Tensor,
    /// What the loss was multiplied with, and so the gradient: 1 but in f16.
    pub loss_scale: f32,
}

/// Looks at gradients; see [`Trainer::observe_gradients`](crate::Trainer::observe_gradients).
pub type GradientObserver = Arc<dyn Fn(Gradient) -> candle_core::Result<()> + Send + Sync>;

/// Who looks at the gradients of a micro-batch.
pub(crate) struct Observation {
    pub observer: GradientObserver,
    pub micro_batch: usize,
    pub loss_scale: f32,
}

/// By entry of the resident group's table, summed in the order of the backward pass.
pub type ResidentGradients = HashMap<usize, Tensor>;

/// Takes gradients out of candle's store.
pub struct GradientSink<'a> {
    layout: &'a Layout,
    tensors: &'a GroupTensors,
    group: usize,
    /// Gradients of resident parameters that segments use.
    resident: &'a Mutex<ResidentGradients>,
    /// Collects the names of parameters without a gradient.
    missing: Vec<String>,
    /// Entries of the resident table whose gradients came.
    reached: Vec<usize>,
    observation: Option<Observation>,
    /// What the rehearsal notes when the forward has run again.
    recomputed: Option<&'a dyn Fn() -> candle_core::Result<()>>,
}

impl<'a> GradientSink<'a> {
    /// For the gradients of `group`.
    pub fn new(
        layout: &'a Layout,
        tensors: &'a GroupTensors,
        group: usize,
        resident: &'a Mutex<ResidentGradients>,
    ) -> Self {
        Self {
            layout,
            tensors,
            group,
            resident,
            missing: vec![],
            reached: vec![],
            observation: None,
            recomputed: None,
        }
    }

    /// Shows the gradients to an observer, if there is one, before they are taken.
    pub(crate) fn observed(self, observation: Option<Observation>) -> Self {
        Self { observation, ..self }
    }

    /// Calls `note` between the forward that runs again and its backward.
    pub fn noting(self, note: &'a dyn Fn() -> candle_core::Result<()>) -> Self {
        Self { recomputed: Some(note), ..self }
    }

    /// The segment's forward has run again.
    pub fn note_recomputed(&self) -> candle_core::Result<()> {
        self.recomputed.map_or(Ok(()), |note| note())
    }

    /// No gradient reached the segment's input: whatever lies before it would silently not be trained.
    pub fn note_cut_input(&mut self) {
        self.missing.push(format!("the input of {}", self.layout.groups[self.group].name));
    }

    /// The gradients of the group in the order of its table; frozen parameters have an empty run.
    pub fn collect(&mut self, store: &mut GradStore) -> candle_core::Result<Vec<TensorStorage>> {
        let resident = self.layout.resident();
        for (entry, tensor) in self.tensors.of(resident).iter().enumerate() {
            let Some(gradient) = store.remove(tensor) else { continue };
            let mut sums = lock(self.resident);
            let sum = match sums.remove(&entry) {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            };
            sums.insert(entry, sum);
            self.reached.push(entry);
        }
        let mut runs = vec![];
        for (index, (entry, tensor)) in
            self.layout.groups[self.group].table.iter().zip(self.tensors.of(self.group)).enumerate()
        {
            if !entry.trainable {
                runs.push(TensorStorage::none());
                continue;
            }
            let gradient = if self.group == resident {
                lock(self.resident).remove(&index)
            } else {
                store.remove(tensor)
            };
            match gradient {
                Some(gradient) => {
                    if let Some(Observation { observer, micro_batch, loss_scale }) = &self.observation {
                        let (name, values) = (&entry.name, &gradient);
                        observer(Gradient {
                            name,
                            micro_batch: *micro_batch,
                            values,
                            loss_scale: *loss_scale,
                        })?;
                    }
                    runs.push(tensor_storage::into_run(gradient)?);
                }
                None => {
                    self.missing.push(entry.name.clone());
                    runs.push(TensorStorage::none());
                }
            }
        }
        Ok(runs)
    }

    /// Names of the parameters that got no gradient.
    pub fn missing(&self) -> Vec<String> {
        self.missing.clone()
    }

    /// Entries of the resident table whose gradients came.
    pub fn reached(&self) -> &[usize] {
        &self.reached
    }
}
