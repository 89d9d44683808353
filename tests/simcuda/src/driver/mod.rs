//! A driver: a device's memory, streams, events and modules, and what was found wrong.

pub mod modules;
pub mod streams;
pub mod work;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;

use crate::configuration::{Configuration, Mode, Order};
use crate::fault::{Code, Fault};
use crate::memory::Memory;
use crate::races::Clock;
use modules::{Function, Loaded};
use streams::{Event, Stream};

/// The device's memory.
pub const DEVICE_BYTES: usize = 8 << 30;
/// Races beyond these are counted and not described.
const MOST_REPORTS: usize = 20;

/// How often a kernel ran.
#[derive(Default)]
pub struct KernelCount {
    /// Launches of it.
    pub launches: u64,
    /// Instructions of its lanes.
    pub lane_instructions: u64,
    /// Time in the interpreter.
    pub seconds: f64,
}

/// What a driver knows.
pub struct State {
    /// In which order it does what programs leave open.
    pub configuration: Configuration,
    /// The device's memory.
    pub memory: Memory,
    /// Streams, by their number.
    pub streams: Vec<Stream>,
    /// Numbers of streams by their handles.
    pub stream_handles: HashMap<usize, usize>,
    /// The stream that each thread of the host has for itself.
    pub thread_streams: HashMap<ThreadId, usize>,
    /// Events by their handles. None before the first record.
    pub events: HashMap<usize, Option<Event>>,
    /// Modules by their handles.
    pub modules: HashMap<usize, Loaded>,
    /// Kernels by their handles.
    pub functions: HashMap<usize, Arc<Function>>,
    /// Page-locked memory of the host: bytes by address.
    pub pinned: BTreeMap<usize, Box<[u8]>>,
    /// How often each kernel ran.
    pub kernels: HashMap<Arc<str>, KernelCount>,
    /// How often each function of the interface was called.
    pub calls: BTreeMap<&'static str, u64>,
    hosts: HashMap<ThreadId, Arc<Clock>>,
    random: u64,
    last_handle: usize,
    failure: Option<Fault>,
    races: usize,
    reports: Vec<String>,
}

/// Handles are multiples of this, so that none is one of CUDA's own small numbers.
const HANDLE_STEP: usize = 16;

impl State {
    fn new(configuration: Configuration) -> Self {
        Self {
            configuration,
            memory: Memory::default(),
            streams: vec![Stream::default()],
            stream_handles: HashMap::new(),
            thread_streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            pinned: BTreeMap::new(),
            kernels: HashMap::new(),
            calls: BTreeMap::new(),
            hosts: HashMap::new(),
            random: match configuration.mode {
                Mode::Random { seed } => seed,
                Mode::Eager | Mode::Late => 0,
            },
            last_handle: 0x1000,
            failure: None,
            races: 0,
            reports: vec![],
        }
    }

    /// A number that names something new.
    pub fn new_handle(&mut self) -> usize {
        self.last_handle += HANDLE_STEP;
        self.last_handle
    }

    /// Whether all is well so far.
    pub fn check(&self) -> Result<(), Code> {
        self.failure.as_ref().map_or(Ok(()), |fault| Err(fault.code))
    }

    /// Reports a failure on the device, which stays.
    pub fn fail(&mut self, fault: Fault) -> Code {
        self.report(&fault.message);
        self.failure.get_or_insert(fault).code
    }

    /// Tells a person.
    pub fn report(&mut self, message: &str) {
        eprintln!("simcuda: {message}");
        self.reports.push(message.to_owned());
    }

    fn report_race(&mut self, race: String) {
        self.races += 1;
        if self.races <= MOST_REPORTS {
            self.report(&format!("RACE: {race}"));
        }
    }
}

/// A device with everything on it. The functions of CUDA's interface work on the one of the process, which
/// the environment configures, or on the one that a thread has chosen.
#[derive(Clone)]
pub struct Driver(Arc<Mutex<State>>);

thread_local! {
    static CHOSEN: RefCell<Option<Driver>> = const { RefCell::new(None) };
}
static OF_PROCESS: OnceLock<Driver> = OnceLock::new();

impl Driver {
    /// A device on which nothing was done yet.
    pub fn new(configuration: Configuration) -> Self {
        Self(Arc::new(Mutex::new(State::new(configuration))))
    }

    /// The device of the process. If its variables are not understood, every call fails, and the first says
    /// why.
    pub fn of_process() -> Self {
        let make = || {
            let default = Configuration { mode: Mode::Eager, order: Order::Forward };
            let configuration = Configuration::from_environment();
            let driver = Self::new(*configuration.as_ref().unwrap_or(&default));
            if let Err(reason) = configuration {
                driver.lock().fail(Fault::new(Code::InvalidValue, reason));
            }
            driver
        };
        OF_PROCESS.get_or_init(make).clone()
    }

    /// The device of this thread.
    pub fn current() -> Self {
        CHOSEN.with_borrow(Option::clone).unwrap_or_else(Self::of_process)
    }

    /// Runs a function for which this is the thread's device. Threads that it starts have the process's.
    pub fn within<T>(&self, run: impl FnOnce() -> T) -> T {
        let before = CHOSEN.replace(Some(self.clone()));
        let result = run();
        CHOSEN.set(before);
        result
    }

    /// What the driver knows, for one thread at a time.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Races that were found.
    pub fn races(&self) -> usize {
        self.lock().races
    }

    /// What was found wrong, in words: failures, and the first races.
    pub fn reports(&self) -> Vec<String> {
        self.lock().reports.clone()
    }
}
