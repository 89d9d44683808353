//! The engine as a user meets it: configuration, the `VarBuilder`, segments, the plan.

mod builder;

use crate::autograd::dropout::{Dropping, Place};
use crate::autograd::registry::{GroupTensors, Registry};
use crate::autograd::rehearsal::Rehearsal;
use crate::autograd::segment::Segment;
use crate::autograd::segment_call::{Mode, Passes};
use crate::config::Config;
use crate::device::compute::ComputeDevice;
use crate::disk::stores::{self, Progress, Stores};
use crate::error::{Error, Result};
use crate::planner::machine::Machine;
use crate::planner::observed::Observed;
use crate::planner::optimizer::AdamW;
use crate::planner::plan::{Choices, Limits, Plan};
use crate::planner::search::Search;
use crate::probe;
use crate::schedule::buffer_plan::DeviceKind;
use crate::schedule::layout::{DEFAULT_PIECE_BYTES, Layout, check_piece};
use crate::sync::lock;
use crate::train::trainer::Trainer;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use ferrozero_kernels::ops;
use ferrozero_offload::{BackendChoice, Store, Tier};
use std::path::Path;
use std::sync::{Arc, Mutex};

pub use builder::EngineBuilder;

/// Where a model's parameters are registered and its segments are made.
pub struct Engine {
    config: Config,
    registry: Registry,
    passes: Passes,
    opened: Mutex<Option<Store>>,
    /// What the checkpoint says that is resumed: the engine's part and the user's.
    resumed: Option<(Progress, serde_json::Value)>,
    piece_bytes: usize,
    device: Arc<ComputeDevice>,
}

impl Engine {
    /// An engine by way of the settings that most programs give.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// Checks the configuration, and with `resume` opens the checkpoint.
    ///
    /// # Errors
    /// [`Error::Configuration`], and what the disk store says of the folder.
    pub fn new(config: Config) -> Result<Self> {
        let invalid = |text: &str| Err(Error::Configuration(text.to_owned()));
        if config.accumulate == 0 {
            return invalid("accumulate must be at least 1");
        }
        if config.threads == Some(0) {
            return invalid("threads must be at least 1");
        }
        if config.clip.is_some_and(|clip| !clip.is_finite() || clip <= 0.0) {
            return invalid("clip must be a finite number above 0; leave it out for no clipping");
        }
        check_piece(config.piece_bytes)?;
        #[cfg(feature = "testing")]
        let fault = config.cuda_fault;
        #[cfg(not(feature = "testing"))]
        let fault = None;
        let device = ComputeDevice::new(&config.device, config.dtype, config.products, fault)?;
        let device = Arc::new(device);
        let is_counted = device.is_apart() || device.used_bytes() > 0 || config.working_bytes.is_some();
        if config.memory_bytes.is_some() && !is_counted {
            return invalid(
                "memory_bytes is set and nobody counts what candle's tensors take: install the counting \
                 allocator in your program (#[global_allocator] static ALLOCATOR: ferrozero::CountingAllocator = \
                 ferrozero::CountingAllocator;), or say with working_bytes what they take at most",
            );
        }
        let opened = stores::open(&config)?;
        let piece_bytes = match &opened {
            Some(store) => store.piece_bytes(),
            None => config.piece_bytes.unwrap_or(DEFAULT_PIECE_BYTES),
        };
        let resumed = match (&opened, &config.directory) {
            (Some(store), Some(directory)) => Some(stores::committed(store, directory)?),
            _ => None,
        };
        Ok(Self {
            config,
            registry: Registry::default(),
            passes: Passes::new(),
            opened: Mutex::new(opened),
            resumed,
            piece_bytes,
            device,
        })
    }

    /// The value that was given to the last [`Trainer::commit`] in a folder, without resuming it.
    ///
    /// # Errors
    /// What the disk store says of the folder.
    pub fn committed(directory: &Path) -> Result<serde_json::Value> {
        let config = Config { directory: Some(directory.to_owned()), resume: true, ..Config::default() };
        Ok(Self::new(config)?.resumed().cloned().unwrap_or_default())
    }

    /// What the user's side of a resumed checkpoint says: the value given to [`Trainer::commit`].
    pub fn resumed(&self) -> Option<&serde_json::Value> {
        self.resumed.as_ref().map(|(_, user)| user)
    }

    /// A builder whose parameters are the engine's. They are vacant: they have no values until a step.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(
            Box::new(self.registry.clone()),
            self.config.dtype,
            self.config.device.clone(),
        )
    }

    /// Parameters for which `rule` holds (by name and shape) and that are asked for from now on are frozen:
    /// they have no gradient and no moments.
    ///
    /// # Errors
    /// [`Error::Misuse`] if a parameter for which the rule holds was asked for before.
    pub fn freeze(&self, rule: impl Fn(&str, &[usize]) -> bool + Send + Sync + 'static) -> Result<()> {
        self.registry.freeze(Arc::new(rule))
    }

    /// Makes a part of the model that is fetched, run and released as one. Its name is the builder's prefix.
    ///
    /// # Errors
    /// [`Error::Misuse`] for nested segments, names that are taken, and parameters that cannot be held.
    pub fn segment<M: Send + Sync + 'static>(
        &self,
        vb: VarBuilder<'static>,
        make: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<M>,
    ) -> Result<Segment<M>> {
        let group = self.registry.begin_segment(&vb.prefix())?;
        let module = make(vb);
        self.registry.end_segment();
        Ok(Segment::new(module?, group, self.passes.clone()))
    }

    /// Makes `count` segments named `prefix.0`, `prefix.1` and so on, as the blocks of a model. `make` is given the
    /// number of each, and the builder of its parameters.
    ///
    /// # Errors
    /// As [`Self::segment`].
    pub fn segments<M: Send + Sync + 'static>(
        &self,
        prefix: &str,
        count: usize,
        make: impl Fn(usize, VarBuilder<'static>) -> candle_core::Result<M>,
    ) -> Result<Vec<Segment<M>>> {
        let vb = self.var_builder().pp(prefix);
        (0..count).map(|index| self.segment(vb.pp(index), |vb| make(index, vb))).collect()
    }

    /// Rehearses `loss`, which computes the loss of the micro-batch whose number it is given, here of 0, and
    /// makes the plan: of those within the limits the one whose steps are shortest, by
    /// the machine's numbers and the computing time of the rehearsal. Nothing large is allocated for longer
    /// than that, and it runs each kind of segment a few times, with parameters of zero.
    ///
    /// # Errors
    /// [`Error::Configuration`] for settings of AdamW that are not numbers in their range,
    /// [`Error::MissingGradient`], [`Error::BudgetTooSmall`], and whatever `loss` returns.
    pub fn plan(&self, adamw: AdamW, loss: impl Fn(usize) -> candle_core::Result<Tensor>) -> Result<Plan> {
        let loss = || loss(0);
        adamw.check()?;
        let stored = self.resumed.iter().flat_map(|(progress, _)| &progress.parameters);
        let order: Vec<String> = stored.map(|row| row.name.clone()).collect();
        let layout = Arc::new(self.registry.seal(self.piece_bytes / 4, &adamw.decays, &order)?);
        let names = layout.groups.iter().map(|group| group.name.clone()).collect();
        self.passes.set_segment_names(names);
        if let Some(values) = self.config.initial_values.as_ref().filter(|_| self.resumed.is_none()) {
            values.check(&layout.parameters())?;
        }
        let tensors = Arc::new(GroupTensors::new(&layout, &self.registry.parameters()));
        let limits = self.limits()?;
        let observed = self.observe(&layout, &tensors, &limits, &loss)?;
        let has_disk = self.has_disk();
        let search = Search {
            layout,
            limits,
            adamw,
            accumulate: self.config.accumulate,
            // Whether gradients of f16 have overflowed is known when all of them are, as the norm is.
            clip: self.config.clip.or((self.config.dtype == DType::F16).then_some(f64::INFINITY)),
            has_disk,
            ranks: 1,
            observed,
            check: &|plan| match plan.uses_disk() && !has_disk {
                true => Err(Error::Configuration(
                    "a placement on disk needs a folder: set Config::directory".into(),
                )),
                false => Ok(()),
            },
        };
        search.best(&self.machine())
    }

    /// Whether there is a disk to leave anything on.
    fn has_disk(&self) -> bool {
        self.config.directory.is_some() || self.config.backend == BackendChoice::Memory
    }

    /// What the machine does as far as plans depend on it.
    fn machine(&self) -> Machine {
        let config = &self.config;
        let measured = || {
            probe::quick(probe::QuickLook {
                directory: config.directory.as_deref().filter(|_| config.backend != BackendChoice::Memory),
                threads: config.threads,
                memory_bytes: config.memory_bytes,
                device: &self.device,
            })
        };
        #[cfg_attr(not(feature = "testing"), expect(unused_mut, reason = "only a test's disk is made slow"))]
        let mut machine = config.machine.clone().unwrap_or_else(measured);
        #[cfg(feature = "testing")]
        if let Some(throttle) = &config.throttle {
            machine.disk_read_bytes_per_s = machine.disk_read_bytes_per_s.min(throttle.read_bytes_per_s());
            machine.disk_write_bytes_per_s = machine.disk_write_bytes_per_s.min(throttle.write_bytes_per_s());
        }
        machine
    }

    /// The model as it is with each home of boundaries that can be.
    fn observe(
        &self,
        layout: &Arc<Layout>,
        tensors: &Arc<GroupTensors>,
        limits: &Limits,
        loss: &dyn Fn() -> candle_core::Result<Tensor>,
    ) -> Result<Vec<(Tier, Observed)>> {
        if let Some(home) = limits.choices.boundaries {
            return Ok(vec![(home, self.rehearse(layout, tensors, home, loss)?)]);
        }
        let mut observed = vec![(Tier::Device, self.rehearse(layout, tensors, Tier::Device, loss)?)];
        // Without a device of its own the host's memory is where boundaries are anyway.
        let host = self.device.is_apart().then_some(Tier::Host);
        let disk = self.has_disk().then_some(Tier::Disk);
        let away: Vec<Tier> = host.into_iter().chain(disk).collect();
        let is_limited = limits.memory_bytes.is_some() || limits.device_bytes.is_some();
        if is_limited && let Some(&first) = away.first() {
            // The same computing in the same time: what two rehearsals differ by is chance, which must not
            // choose.
            let compute = observed[0].1.compute.clone();
            match self.rehearse(layout, tensors, first, loss) {
                Ok(moved) => {
                    let moved = Observed { compute, ..moved };
                    observed.extend(away.into_iter().map(|home| (home, moved.clone())));
                }
                // The model reads a boundary again, beside the segment whose input it is.
                Err(error) => {
                    tracing::warn!(%error, "boundaries stay on the device: the model reads one again");
                }
            }
        }
        Ok(observed)
    }

    fn rehearse(
        &self,
        layout: &Arc<Layout>,
        tensors: &Arc<GroupTensors>,
        boundary_home: Tier,
        loss: &dyn Fn() -> candle_core::Result<Tensor>,
    ) -> Result<Observed> {
        let moves = boundary_home != Tier::Device;
        let run = |rehearsal: Arc<Rehearsal>, finish: &dyn Fn(&Rehearsal, &Tensor) -> Result<()>| {
            let pass = || {
                let place = Place { seed: 0, step: 0, micro_batch: 0, call: None };
                let loss = Dropping::at(place).during(|| ops::before_backward(loss))?;
                self.passes.report(finish(&rehearsal, &loss))
            };
            let pass = || self.device.computing(pass);
            self.passes.explain(self.passes.within(Mode::Rehearsal(rehearsal.clone()), pass))
        };
        let observed = Rehearsal::run(layout.clone(), tensors.clone(), self.device.clone(), moves, run)
            .map_err(|error| self.device.explain(error, 0))?;
        // What nobody counts is all that a micro-batch holds while it waits, too.
        let said = Observed {
            working_bytes: self.config.working_bytes,
            parked_bytes: self.config.working_bytes.unwrap_or(0),
            ..observed.clone()
        };
        Ok(if observed.working_bytes.is_some() { observed } else { said })
    }

    fn limits(&self) -> Result<Limits> {
        let config = &self.config;
        Ok(Limits {
            memory_bytes: config.memory_bytes,
            device_bytes: match config.device_memory_bytes {
                Some(bytes) => Some(bytes),
                None => self.device.default_limit_bytes()?,
            },
            choices: Choices {
                placement: config.placement.clone(),
                boundaries: config.boundaries,
                slots: config.slots,
                look_ahead: config.look_ahead,
                state_pieces: config.state_pieces,
                gradient_sets: config.gradient_sets,
                vertical: config.vertical,
                kept: config.kept,
                updates: config.updates,
                piece_bytes: config.piece_bytes,
            },
            device: DeviceKind { dtype: config.dtype, apart: self.device.is_apart() },
        })
    }

    /// Rehearses `loss`, plans, allocates, and makes the initial state or takes it from the checkpoint:
    /// [`Self::plan`] and [`Self::trainer_from`] in one.
    ///
    /// # Errors
    /// As those.
    pub fn trainer(
        self,
        adamw: AdamW,
        loss: impl Fn(usize) -> candle_core::Result<Tensor>,
    ) -> Result<Trainer> {
        let plan = self.plan(adamw, loss)?;
        self.trainer_from(plan)
    }

    /// Allocates what the plan says, and makes the initial state or takes it from the checkpoint.
    ///
    /// # Errors
    /// [`Error::CheckpointExists`], [`Error::CheckpointMismatch`], and errors of the tiers.
    pub fn trainer_from(self, plan: Plan) -> Result<Trainer> {
        let opened = lock(&self.opened).take();
        let stores = Stores::make(&self.config, &plan, opened, self.piece_bytes)?;
        let parameters = self.registry.parameters();
        let (device, planned_bytes) = (self.device.clone(), plan.device_bytes());
        Trainer::start(self.config, plan, parameters, self.passes, stores, self.device)
            .map_err(|error| device.explain(error, planned_bytes))
    }
}
