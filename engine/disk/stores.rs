//! What of a run lies on disk: the stores, what a commit says about the model, and how a commit is matched to it.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::execution::loss_scale::LossScale;
use crate::planner::plan::Plan;
use crate::schedule::buffer_plan::GroupPlacement;
use crate::schedule::layout::Layout;
use crate::schedule::operation::{Call, Extent, Stream};
use ferrozero_offload::{BackendChoice, ExtentId, ExtentKind, ExtentSpec, Store, StoreOptions, Tier};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the engine writes into a commit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps that were made.
    pub step: u64,
    /// Every parameter in the order of the groups' runs.
    pub parameters: Vec<ParameterRow>,
    /// Homes of each group's states in the run that made the commit. A run that resumes has its own.
    #[serde(default)]
    pub homes: Vec<(String, GroupPlacement)>,
    /// Scale of the loss of a run in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

impl Progress {
    /// After `step` steps by `plan`.
    pub fn new(step: u64, plan: &Plan, loss_scale: Option<LossScale>) -> Self {
        let names = plan.layout().groups.iter().map(|group| group.name.clone());
        let homes = names.zip(plan.placements().iter().copied()).collect();
        Self { step, parameters: parameter_rows(plan.layout()), homes, loss_scale }
    }
}

/// A parameter in a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterRow {
    /// Group.
    pub group: String,
    /// Full name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Whether it is trained.
    pub trainable: bool,
}

/// The parameters of a layout as a commit lists them.
fn parameter_rows(layout: &Layout) -> Vec<ParameterRow> {
    let rows = layout.groups.iter().flat_map(|group| group.table.iter().map(move |entry| (group, entry)));
    rows.map(|(group, entry)| ParameterRow {
        group: group.name.clone(),
        name: entry.name.clone(),
        shape: entry.shape.clone(),
        trainable: entry.trainable,
    })
    .collect()
}

fn options(config: &Config, piece_bytes: usize) -> StoreOptions {
    let options = StoreOptions {
        piece_bytes,
        in_place: config.in_place,
        stripes: config.stripes.clone(),
        backend: config.backend,
        ..StoreOptions::default()
    };
    #[cfg(feature = "testing")]
    let options =
        StoreOptions { faults: config.faults.clone(), throttle: config.throttle.clone(), ..options };
    options
}

/// Opens the checkpoint that a configuration resumes.
pub fn open(config: &Config) -> Result<Option<Store>> {
    if !config.resume {
        return Ok(None);
    }
    let Some(directory) = &config.directory else {
        return Err(Error::Configuration(
            "resume needs the checkpoint's folder: set Config::directory".into(),
        ));
    };
    Ok(Some(Store::open(directory, options(config, 0))?))
}

/// The disk tier of a run.
pub struct Stores {
    /// State streams; commits keep them.
    pub state: Option<Arc<Store>>,
    /// Gradients and boundaries; nothing keeps them.
    pub scratch: Option<Arc<Store>>,
    /// Which extent is where.
    pub extents: HashMap<Extent, (Arc<Store>, ExtentId)>,
    /// Whether `state` holds a commit of this run.
    pub resumed: Option<Progress>,
}

impl Stores {
    /// Reserves the space of a plan, or matches it to the checkpoint that was opened.
    pub fn make(config: &Config, plan: &Plan, opened: Option<Store>, piece_bytes: usize) -> Result<Self> {
        let layout = plan.layout();
        let mut stores = Self { state: None, scratch: None, extents: HashMap::new(), resumed: None };
        let Some(directory) = directory(config) else { return Ok(stores) };
        let states = state_extents(layout);
        let state = match opened {
            Some(store) => {
                let (progress, _) = committed(&store, &directory)?;
                stores.resumed = Some(matching_progress(progress, layout, &directory)?);
                store
            }
            None => create_state(&directory, &states, options(config, piece_bytes))?,
        };
        let state = Arc::new(state);
        stores.add(&state, states);
        stores.state = Some(state);
        stores.make_scratch(config, plan, &directory, piece_bytes)?;
        Ok(stores)
    }

    fn make_scratch(
        &mut self,
        config: &Config,
        plan: &Plan,
        directory: &Path,
        piece_bytes: usize,
    ) -> Result<()> {
        let layout = plan.layout();
        let mut scratches = vec![];
        for (group, placement) in plan.placements().iter().enumerate() {
            let bytes = 4 * layout.groups[group].trainable_elements as u64;
            if placement.gradient == Tier::Disk && bytes > 0 {
                let name = Stream::Gradient.extent_name(&layout.groups[group]);
                scratches.push((Extent::State(group, Stream::Gradient), name, bytes));
            }
        }
        if plan.buffer_plan.boundary_home == Tier::Disk {
            let leaves =
                |&(index, call): &(usize, &Call)| call.boundary_moves && !plan.buffer_plan.keeps(index);
            for (call, of_call) in plan.calls.iter().enumerate().filter(leaves) {
                let bytes = 4 * of_call.boundary_elements as u64;
                for place in 0..plan.buffer_plan.vertical {
                    let name = format!("boundary {call} of micro-batch {place}");
                    scratches.push((Extent::Boundary { call, place }, name, bytes));
                }
            }
        }
        if scratches.is_empty() {
            return Ok(());
        }
        let specs = specs(&scratches, ExtentKind::Scratch);
        // Beside the state, on the same disks, and under no name.
        let options = StoreOptions { temporary: true, in_place: false, ..options(config, piece_bytes) };
        let store = Store::create(directory, specs, options)?;
        let store = Arc::new(store);
        self.add(&store, scratches);
        self.scratch = Some(store);
        Ok(())
    }

    fn add(&mut self, store: &Arc<Store>, extents: Vec<(Extent, String, u64)>) {
        for (extent, name, _) in extents {
            if let Some(id) = store.extent(&name) {
                self.extents.insert(extent, (store.clone(), id));
            }
        }
    }

    /// Bytes read and written so far.
    pub fn moved_bytes(&self) -> (u64, u64) {
        let traffic = self.state.iter().chain(&self.scratch).map(|store| store.traffic());
        traffic.fold((0, 0), |(read, written), moved| {
            (
                read + moved.state_read_bytes + moved.scratch_read_bytes,
                written + moved.state_written_bytes + moved.scratch_written_bytes,
            )
        })
    }

    /// Bytes of all files.
    pub fn disk_bytes(&self) -> u64 {
        self.state.iter().chain(&self.scratch).map(|store| store.disk_bytes()).sum()
    }
}

/// Where the stores are: none without a disk tier.
fn directory(config: &Config) -> Option<PathBuf> {
    match (&config.directory, config.backend) {
        (Some(directory), _) => Some(directory.clone()),
        (None, BackendChoice::Memory) => Some(PathBuf::from("memory")),
        (None, _) => None,
    }
}

fn specs(extents: &[(Extent, String, u64)], kind: ExtentKind) -> Vec<ExtentSpec> {
    extents.iter().map(|(_, name, bytes)| ExtentSpec { name: name.clone(), bytes: *bytes, kind }).collect()
}

/// The extents that commits keep, with names and bytes.
pub fn state_extents(layout: &Layout) -> Vec<(Extent, String, u64)> {
    let streams = (0..layout.groups.len()).flat_map(|group| Stream::STATE.map(|stream| (group, stream)));
    let extents = streams.map(|(group, stream)| {
        let bytes = 4 * stream.elements(layout, group) as u64;
        (Extent::State(group, stream), stream.extent_name(&layout.groups[group]), bytes)
    });
    extents.filter(|(_, _, bytes)| *bytes > 0).collect()
}

/// Reserves the space of the extents that commits keep.
pub fn create_state(
    directory: &Path,
    extents: &[(Extent, String, u64)],
    options: StoreOptions,
) -> Result<Store> {
    match Store::create(directory, specs(extents, ExtentKind::State), options) {
        Err(ferrozero_offload::Error::AlreadyCommitted { directory }) => {
            Err(Error::CheckpointExists { path: directory })
        }
        created => Ok(created?),
    }
}

/// What the last commit says: the engine's part and the user's.
pub fn committed(store: &Store, directory: &Path) -> Result<(Progress, serde_json::Value)> {
    let mismatch = |mismatch: String| Error::CheckpointMismatch { path: directory.to_owned(), mismatch };
    let commit = store.committed().ok_or_else(|| mismatch("it holds no commit".into()))?;
    let part = |key: &str| commit.application.get(key).cloned().unwrap_or_default();
    let progress = serde_json::from_value(part("engine"))
        .map_err(|error| mismatch(format!("its commit was not written by ferrozero's trainer ({error})")))?;
    Ok((progress, part("user")))
}

/// Refuses a commit of another model.
fn matching_progress(progress: Progress, layout: &Layout, directory: &Path) -> Result<Progress> {
    let mismatch = |mismatch: String| Err(Error::CheckpointMismatch { path: directory.to_owned(), mismatch });
    let stored: HashMap<_, _> = progress.parameters.iter().map(|row| (&row.name, row)).collect();
    for asked in parameter_rows(layout) {
        let Some(&stored) = stored.get(&asked.name) else {
            return mismatch(format!("it has no {}", asked.name));
        };
        if *stored != asked {
            return mismatch(format!(
                "it has {} of shape {:?} in {}, and this model {:?} in {}{}",
                stored.name,
                stored.shape,
                stored.group,
                asked.shape,
                asked.group,
                if stored.trainable == asked.trainable { "" } else { " (one of them is frozen)" }
            ));
        }
    }
    let asked: HashSet<_> = layout.groups.iter().flat_map(|group| &group.table).map(|e| &e.name).collect();
    match progress.parameters.iter().find(|row| !asked.contains(&row.name)) {
        Some(row) => mismatch(format!("it has {}, and this model has not", row.name)),
        None => Ok(progress),
    }
}
