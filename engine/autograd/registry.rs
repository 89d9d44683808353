//! What the model asks its `VarBuilder` for, and the vacant tensors that it gets.

use crate::device::tensor_storage::{self, TensorStorage};
use crate::error::{Error, Result};
use crate::schedule::layout::{Group, Layout, ParameterRule, RESIDENT, TableEntry};
use crate::sync::lock;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// A parameter as the model asked for it.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Full name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// How its initial values are made.
    pub init: Init,
    /// Whether it is trained.
    pub trainable: bool,
    /// Segment that owns it; none: the resident group.
    pub segment: Option<usize>,
    /// Segments that asked for it.
    pub askers: Vec<usize>,
    /// The tensor in the user's model.
    pub tensor: Tensor,
}

#[derive(Default)]
struct State {
    parameters: Vec<Parameter>,
    by_name: HashMap<String, usize>,
    segments: Vec<String>,
    building: Option<usize>,
    frozen: Option<ParameterRule>,
    /// Type and device of all parameters.
    device: Option<(DType, Device)>,
    sealed: bool,
}

/// All parameters of a model, shared by the engine and the `VarBuilder`s that it hands out.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<State>>);

impl Registry {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Parameters for which `rule` holds, from now on, are not trained.
    pub fn freeze(&self, rule: ParameterRule) -> Result<()> {
        let mut state = self.state();
        let late = state.parameters.iter().find(|known| known.trainable && rule(&known.name, &known.shape));
        if let Some(parameter) = late {
            return Err(Error::Misuse(format!(
                "parameter {} was made before it was to be frozen: freeze first, then make the model",
                parameter.name
            )));
        }
        state.frozen = Some(rule);
        Ok(())
    }

    /// Begins a segment; parameters asked for until [`Self::end_segment`] belong to it.
    pub fn begin_segment(&self, name: &str) -> Result<usize> {
        let mut state = self.state();
        if state.sealed {
            return Err(Error::Misuse(format!(
                "segment {name} was made after the plan: make the model first"
            )));
        }
        if let Some(outer) = state.building {
            let outer = &state.segments[outer];
            return Err(Error::Misuse(format!(
                "segment {name} is made inside segment {outer}: they cannot nest"
            )));
        }
        if state.segments.iter().any(|other| other == name) {
            return Err(Error::Misuse(format!("two segments have the name {name:?}: names must differ")));
        }
        state.segments.push(name.to_owned());
        let index = state.segments.len() - 1;
        state.building = Some(index);
        Ok(index)
    }

    /// Ends the segment that is being made.
    pub fn end_segment(&self) {
        self.state().building = None;
    }

    /// Lays the groups out. No parameter can be added afterwards. Parameters named in `order`, which is that
    /// of a checkpoint, come in this order within their groups, all others in the order in which they were
    /// asked for.
    pub fn seal(&self, piece_elements: usize, decays: &ParameterRule, order: &[String]) -> Result<Layout> {
        let mut state = self.state();
        state.sealed = true;
        if state.parameters.is_empty() {
            return Err(Error::Misuse("the model asked the engine's VarBuilder for no parameter".into()));
        }
        let resident = state.segments.len();
        let mut members = vec![vec![]; resident + 1];
        for (index, parameter) in state.parameters.iter().enumerate() {
            let decays = decays(&parameter.name, &parameter.shape);
            let row = (index, parameter.name.clone(), parameter.shape.clone(), parameter.trainable, decays);
            members[parameter.segment.unwrap_or(resident)].push(row);
        }
        let order: HashMap<_, _> = order.iter().zip(0..).collect();
        for members in &mut members {
            members.sort_by_key(|(_, name, ..)| order.get(name).copied().unwrap_or(usize::MAX));
        }
        let names = state.segments.iter().cloned().chain([RESIDENT.to_owned()]);
        let groups = names.zip(members).enumerate();
        let groups =
            groups.map(|(index, (name, members))| Group::new(name, index == resident, members)).collect();
        Ok(Layout { groups, piece_elements })
    }

    /// All parameters, in the order in which they were asked for.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.state().parameters.clone()
    }

    fn add(&self, name: &str, shape: Shape, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut state = self.state();
        if let Some(&index) = state.by_name.get(name) {
            let segment = state.building;
            let parameter = &mut state.parameters[index];
            if parameter.shape != shape.dims() {
                return Err(Error::Misuse(format!(
                    "parameter {name} was asked for with shape {:?} and again with {:?}",
                    parameter.shape,
                    shape.dims()
                )));
            }
            if parameter.segment != segment {
                // Tied across segments: it must be on the device whenever any of them runs.
                parameter.segment = None;
            }
            parameter.askers.extend(segment.filter(|segment| !parameter.askers.contains(segment)));
            return Ok(parameter.tensor.clone());
        }
        if state.sealed {
            return Err(Error::Misuse(format!("parameter {name} was asked for after the plan was made")));
        }
        let of_engine = state.device.get_or_insert_with(|| (dtype, device.clone()));
        if of_engine.0 != dtype || !of_engine.1.same_device(device) {
            return Err(Error::Misuse(format!(
                "parameter {name} was asked for as {dtype:?} on {:?}, and others as {:?} on {:?}: all \
                 parameters are of the type and on the device of the engine's configuration",
                device.location(),
                of_engine.0,
                of_engine.1.location()
            )));
        }
        let trainable = !state.frozen.as_ref().is_some_and(|rule| rule(name, shape.dims()));
        let tensor = tensor_storage::vacant_tensor(&shape, dtype, device, trainable)?;
        let segment = state.building;
        let index = state.parameters.len();
        state.by_name.insert(name.to_owned(), index);
        state.parameters.push(Parameter {
            name: name.to_owned(),
            shape: shape.into_dims(),
            init,
            trainable,
            segment,
            askers: segment.into_iter().collect(),
            tensor: tensor.clone(),
        });
        Ok(tensor)
    }
}

impl SimpleBackend for Registry {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.add(name, shape, init, dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        let state = self.state();
        let index = state.by_name.get(name).copied();
        index.map(|index| state.parameters[index].tensor.clone()).ok_or_else(|| {
            Error::Misuse(format!(
                "parameter {name} was asked for without a shape, which only known ones can be"
            ))
            .into()
        })
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.state().by_name.contains_key(name)
    }
}

/// The tensors of the groups, in the order of their tables.
pub struct GroupTensors {
    own: Vec<Vec<Tensor>>,
    /// By group, the entries of the resident table that its segment asked for too.
    shared: Vec<Vec<usize>>,
}

impl GroupTensors {
    /// Collects them for a layout.
    pub fn new(layout: &Layout, parameters: &[Parameter]) -> Self {
        let of_group = |group: &Group| {
            group.table.iter().map(|entry| parameters[entry.parameter].tensor.clone()).collect::<Vec<_>>()
        };
        let resident = layout.groups.last().map_or(&[][..], |group| &group.table);
        let shared = |group: usize| {
            let asked = |entry: &TableEntry| parameters[entry.parameter].askers.contains(&group);
            resident.iter().enumerate().filter(|(_, entry)| asked(entry)).map(|(entry, _)| entry).collect()
        };
        Self {
            own: layout.groups.iter().map(of_group).collect(),
            shared: (0..layout.groups.len()).map(shared).collect(),
        }
    }

    /// The tensors of one group.
    pub fn of(&self, group: usize) -> &[Tensor] {
        &self.own[group]
    }

    /// Entries of the resident table that the segment of a group shares with others.
    pub fn shared(&self, group: usize) -> &[usize] {
        &self.shared[group]
    }

    /// Moves parameters into the tensors of a group.
    pub fn fill(&self, group: usize, storage: Vec<TensorStorage>) -> Result<()> {
        for (tensor, values) in self.own[group].iter().zip(storage) {
            tensor_storage::fill(tensor, values)?;
        }
        Ok(())
    }

    /// Moves the parameters of a group out of its tensors, which are vacant from then on.
    pub fn take(&self, group: usize) -> Result<Vec<TensorStorage>> {
        Ok(self.own[group].iter().map(tensor_storage::take).collect::<candle_core::Result<_>>()?)
    }
}
