//! What of a run lies on disk: the stores, what a commit says about the model, and how a checkpoint is matched to it.

use crate::engine::Config;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::plan::Plan;
use crate::schedule::{Extent, Stream};
use ferrozero_offload::{BackendChoice, ExtentId, ExtentKind, ExtentSpec, Store, StoreOptions, Tier};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Folder of what no commit keeps, within the folder of the state.
const SCRATCH: &str = "scratch";

/// What the engine writes into a commit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps that were made.
    pub step: u64,
    /// Every parameter in the order of the groups' runs.
    pub parameters: Vec<ParameterRow>,
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
pub fn parameter_rows(layout: &Layout) -> Vec<ParameterRow> {
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
    StoreOptions {
        piece_bytes,
        backend: config.backend,
        faults: config.faults.clone(),
        throttle: config.throttle,
        ..StoreOptions::default()
    }
}

/// Opens the checkpoint that a configuration resumes.
pub fn open(config: &Config) -> Result<Option<Store>> {
    if !config.resume {
        return Ok(None);
    }
    let Some(directory) = &config.directory else {
        return Err(Error::Configuration(
            "resume needs the checkpoint's folder: set directory (--dir)".into(),
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
        let mut states = vec![];
        for (group, of_group) in layout.groups.iter().enumerate() {
            for stream in Stream::STATE {
                let bytes = 4 * stream.elements(layout, group) as u64;
                if bytes > 0 {
                    states.push((
                        Extent::State(group, stream),
                        format!("{}/{}", of_group.name, stream.name()),
                        bytes,
                    ));
                }
            }
        }
        let state = match opened {
            Some(store) => {
                stores.resumed = Some(matching_progress(&store, layout, &directory)?);
                store
            }
            None => {
                let specs = specs(&states, ExtentKind::State);
                match Store::create(&directory, specs, options(config, piece_bytes)) {
                    Err(ferrozero_offload::Error::AlreadyCommitted { .. }) => {
                        return Err(Error::CheckpointExists { path: directory });
                    }
                    created => created?,
                }
            }
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
        directory: &std::path::Path,
        piece_bytes: usize,
    ) -> Result<()> {
        let layout = plan.layout();
        let mut scratches = vec![];
        for (group, placement) in plan.placements().iter().enumerate() {
            let bytes = 4 * layout.groups[group].trainable_elements as u64;
            if placement.gradient == Tier::Disk && bytes > 0 {
                let name = format!("{}/{}", layout.groups[group].name, Stream::Gradient.name());
                scratches.push((Extent::State(group, Stream::Gradient), name, bytes));
            }
        }
        if plan.arrangement.boundary_home == Tier::Disk {
            for (call, of_call) in plan.calls.iter().enumerate().filter(|(_, call)| call.boundary_moves) {
                let bytes = 4 * of_call.boundary_elements as u64;
                scratches.push((Extent::Boundary(call), format!("boundary {call}"), bytes));
            }
        }
        if scratches.is_empty() {
            return Ok(());
        }
        let specs = specs(&scratches, ExtentKind::Scratch);
        let store = Store::create(&directory.join(SCRATCH), specs, options(config, piece_bytes))?;
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

/// Reads a commit's progress, and refuses it if the model differs.
fn matching_progress(store: &Store, layout: &Layout, directory: &std::path::Path) -> Result<Progress> {
    let mismatch = |mismatch: String| Error::CheckpointMismatch { path: directory.to_owned(), mismatch };
    let commit = store.committed().ok_or_else(|| mismatch("it holds no commit".into()))?;
    let progress = commit.application.get("engine").cloned().unwrap_or_default();
    let progress: Progress = serde_json::from_value(progress)
        .map_err(|error| mismatch(format!("its commit was not written by ferrozero's trainer ({error})")))?;
    let rows = parameter_rows(layout);
    for (stored, asked) in progress.parameters.iter().zip(&rows) {
        if stored != asked {
            return Err(mismatch(format!(
                "it has {} of shape {:?}, and this model {} of shape {:?}{}",
                stored.name,
                stored.shape,
                asked.name,
                asked.shape,
                if stored.trainable == asked.trainable { "" } else { " (one of them is frozen)" }
            )));
        }
    }
    if progress.parameters.len() != rows.len() {
        let (stored, asked) = (progress.parameters.len(), rows.len());
        return Err(mismatch(format!("it has {stored} parameters and this model {asked}")));
    }
    Ok(progress)
}
