//! Runs schedules. One dispatcher thread owns all leases, slots and gradient sets that nobody uses at the
//! moment; it hands them to the queues as dependencies allow and takes them back. Queues never share memory,
//! they pass it on.

mod describe;

use crate::device::compute::{BufferMemory, Done};
use crate::device::tensor_storage::TensorStorage;
use crate::error::{Error, Result, internal};
use crate::execution::device_clock::{DeviceClock, Moments};
use crate::execution::perform::{Held, Norm, Passing, Performer, StepContext};
use crate::schedule::buffer_plan::BufferPlan;
use crate::schedule::operation::{Buffer, Extent, Operation, Queue, Resource, Slot};
use crate::schedule::order::Order;
use crate::schedule::trace::{Trace, TraceEvent};
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use ferrozero_kernels::gradient::GradientStatistics;
use ferrozero_offload::io::Verb;
use ferrozero_offload::{Completion, ExtentId, Store};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

/// What the training thread is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComputeRequest {
    /// Give the resident parameters to their tensors.
    Attach,
    /// Run the segment of this group.
    Forward(usize),
    /// Propagate back through this call.
    Backward(usize),
    /// Take the resident parameters back.
    Detach,
}

/// A compute operation that may start.
pub struct Grant {
    /// The operation as scheduled.
    pub operation: Operation,
    /// Its memory, to be handed back with [`Executor::finish`].
    pub held: Box<Held>,
    id: u64,
}

type Reply<T> = Sender<Result<T>>;

enum Event {
    Run { operations: Vec<Operation>, context: Arc<StepContext> },
    Compute { request: ComputeRequest, reply: Reply<Grant> },
    Finished { id: u64, held: Box<Held>, result: Result<()> },
    AwaitNorm { reply: Reply<(Norm, Trace)> },
    TakeTrace { reply: Reply<Trace> },
    Drain { reply: Reply<()> },
    Stop { reason: String },
    Shutdown,
}

/// The training thread's side of the executor.
pub struct Executor {
    events: Sender<Event>,
    dispatcher: Option<JoinHandle<()>>,
}

/// The memory that a run's schedules use.
pub struct Memory {
    /// Memory, by buffer.
    pub buffers: Vec<BufferMemory>,
    /// Where on disk everything is that may be there.
    pub extents: HashMap<Extent, (Arc<Store>, ExtentId)>,
}

impl Executor {
    /// Starts the dispatcher and the threads of the queues.
    pub fn start(performer: Arc<Performer>, buffer_plan: &BufferPlan, memory: Memory) -> Result<Self> {
        let (events, received) = unbounded();
        let (device, dtype) = (&performer.device, performer.device.dtype());
        let slots = buffer_plan.slots.iter().map(|slot| {
            let tensors = slot.tensor_elements.iter();
            Ok::<_, Error>(Some(
                tensors.map(|&elements| device.allocate(elements, dtype)).collect::<Result<_>>()?,
            ))
        });
        let slots: Vec<Option<Vec<TensorStorage>>> = slots.collect::<Result<_>>()?;
        // The device's memory is made on the compute queue, and the first to use it is another one.
        performer.device.synchronize()?;
        let made = performer.device.record(Queue::Compute)?;
        let of_slots = (0..slots.len()).map(|slot| Resource::Slot(Slot(slot)));
        let buffers = memory.buffers.iter().enumerate().filter(|(_, memory)| memory.is_on_device());
        let of_buffers = buffers.map(|(buffer, _)| Resource::Buffer(Buffer(buffer)));
        let dones: HashMap<Resource, Done> =
            of_slots.chain(of_buffers).flat_map(|resource| Some((resource, made.clone()?))).collect();
        // Both clocks begin at that moment.
        performer.device.synchronize()?;
        let mut workers = HashMap::new();
        for queue in [Queue::Upload, Queue::Download, Queue::Optimizer, Queue::Commit] {
            workers.insert(queue, Worker::start(queue, performer.clone(), events.clone())?);
        }
        let dispatcher = Dispatcher {
            started: Instant::now(),
            buffers: memory.buffers.into_iter().map(Some).collect(),
            dones,
            slots,
            gradients: (0..buffer_plan.gradient_sets).map(|_| Some(vec![])).collect(),
            passages: (0..buffer_plan.passages).map(|_| Some(Passing::default())).collect(),
            statistics: Some(vec![GradientStatistics::default(); performer.layout.groups.len()]),
            extents: memory.extents,
            performer,
            workers,
            events: events.clone(),
            received,
            order: Order::new(),
            compute: None,
            computing: None,
            asked_s: 0.0,
            norm: None,
            drain: None,
            latest_context: None,
            failure: None,
            stopped: None,
            trace: Trace::default(),
            clock: DeviceClock::new(made),
        };
        let dispatcher = std::thread::Builder::new()
            .name("ferrozero dispatcher".into())
            .spawn(move || dispatcher.run())
            .map_err(|source| Error::Thread { name: "dispatcher".into(), source })?;
        Ok(Self { events, dispatcher: Some(dispatcher) })
    }

    fn send(&self, event: Event) -> Result<()> {
        self.events.send(event).map_err(|_| Error::Stopped("the dispatcher ended".into()))
    }

    fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Event) -> Result<T> {
        let (reply, answer) = bounded(1);
        self.send(make(reply))?;
        answer.recv().map_err(|_| Error::Stopped("the dispatcher ended".into()))?
    }

    /// Starts nothing any more: `reason` is what later calls are told.
    pub fn stop(&self, reason: &str) -> Result<()> {
        self.send(Event::Stop { reason: reason.to_owned() })
    }

    /// Appends a schedule to what is under way.
    pub fn run(&self, operations: Vec<Operation>, context: Arc<StepContext>) -> Result<()> {
        self.send(Event::Run { operations, context })
    }

    /// Waits until the next compute operation may start, which must be the one that is asked for.
    pub fn begin(&self, request: ComputeRequest) -> Result<Grant> {
        self.ask(|reply| Event::Compute { request, reply })
    }

    /// Hands a compute operation's memory back.
    pub fn finish(&self, grant: Grant) -> Result<()> {
        self.send(Event::Finished { id: grant.id, held: grant.held, result: Ok(()) })
    }

    /// Waits for the gradient norm of the latest step, and takes the trace since the last time.
    pub fn await_norm(&self) -> Result<(Norm, Trace)> {
        self.ask(|reply| Event::AwaitNorm { reply })
    }

    /// Takes the trace since the last time.
    pub fn take_trace(&self) -> Result<Trace> {
        self.ask(|reply| Event::TakeTrace { reply })
    }

    /// Waits until everything that was submitted is done.
    pub fn drain(&self) -> Result<()> {
        self.ask(|reply| Event::Drain { reply })
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Shutdown);
        if let Some(dispatcher) = self.dispatcher.take() {
            let _ = dispatcher.join();
        }
    }
}

struct Job {
    id: u64,
    operation: Operation,
    held: Box<Held>,
    context: Arc<StepContext>,
}

/// The thread of one queue.
struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(queue: Queue, performer: Arc<Performer>, events: Sender<Event>) -> Result<Self> {
        let (jobs, received) = bounded::<Job>(1);
        let thread = std::thread::Builder::new()
            .name(format!("ferrozero {}", queue.name()))
            .spawn(move || {
                for Job { id, operation, mut held, context } in received {
                    // A panic, as in a user's initial values, must not leave the dispatcher waiting.
                    let perform = || performer.perform_on(queue, &operation, &mut held, &context);
                    let result = catch_unwind(AssertUnwindSafe(perform))
                        .unwrap_or_else(|panic| Err(Error::panicked(queue.name(), &*panic)));
                    if events.send(Event::Finished { id, held, result }).is_err() {
                        return;
                    }
                }
            })
            .map_err(|source| Error::Thread { name: queue.name().into(), source })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is kept of an operation until it is done.
struct Note {
    context: Arc<StepContext>,
    started_s: f64,
    waited_s: f64,
}

struct Dispatcher {
    started: Instant,
    performer: Arc<Performer>,
    workers: HashMap<Queue, Worker>,
    extents: HashMap<Extent, (Arc<Store>, ExtentId)>,
    events: Sender<Event>,
    received: Receiver<Event>,
    // Memory that no operation uses at the moment.
    buffers: Vec<Option<BufferMemory>>,
    slots: Vec<Option<Vec<TensorStorage>>>,
    gradients: Vec<Option<Vec<TensorStorage>>>,
    passages: Vec<Option<Passing>>,
    /// What was last enqueued on the device with a slot, a gradient set or a passage.
    dones: HashMap<Resource, Done>,
    statistics: Option<Vec<GradientStatistics>>,
    /// Operations that are not done.
    order: Order<Note>,
    // What the training thread waits for.
    compute: Option<(ComputeRequest, Reply<Grant>)>,
    /// What it computes at the moment.
    computing: Option<Operation>,
    /// When it began to wait for it, in seconds since the start.
    asked_s: f64,
    norm: Option<Reply<(Norm, Trace)>>,
    drain: Option<Reply<()>>,
    latest_context: Option<Arc<StepContext>>,
    /// The first error, until it has been told.
    failure: Option<Error>,
    /// Its text, from then on.
    stopped: Option<String>,
    trace: Trace,
    clock: DeviceClock,
}

impl Dispatcher {
    fn run(mut self) {
        while let Ok(event) = self.received.recv() {
            let shutdown = matches!(event, Event::Shutdown);
            self.handle(event);
            if shutdown {
                break;
            }
            self.advance();
            self.answer();
        }
        // A commit that was asked for is made. All that it waits for was asked for before it, and needs no
        // compute.
        while self.stopped.is_none() && self.order.contains(Operation::Commit) {
            self.advance();
            self.take_finished();
        }
        // Transfers in flight own their buffers; they end before the memory goes. So does what the device is
        // doing, and if that failed, an earlier operation has said so.
        while self.in_flight_outside() > 0 {
            self.take_finished();
        }
        let _ = self.performer.device.synchronize();
    }

    fn take_finished(&mut self) {
        // The dispatcher holds a sender itself, so this waits until an operation ends.
        if let Ok(Event::Finished { id, held, result }) = self.received.recv() {
            self.finished(id, *held, result);
        }
    }

    /// Operations that other threads than the training thread are working on.
    fn in_flight_outside(&self) -> usize {
        let outside = Queue::ALL.into_iter().filter(|&queue| queue != Queue::Compute);
        outside.map(|queue| self.order.in_flight(queue)).sum()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Run { operations, context } => self.admit(operations, context),
            Event::Compute { request, reply } => {
                self.asked_s = self.started.elapsed().as_secs_f64();
                // It would wait for the end of the one that asks.
                if let Some(outer) = self.computing {
                    let (outer, inner) = (self.segment_of(outer), self.segment_asked_for(request));
                    self.fail(Error::NestedSegment { outer, inner });
                }
                self.compute = Some((request, reply));
            }
            Event::Finished { id, held, result } => self.finished(id, *held, result),
            Event::TakeTrace { reply } => {
                // A failure of the device's is that of an operation. Nobody is there to take the trace only
                // when the training thread is gone.
                let _ = self.performer.device.synchronize();
                self.clock.settle_all(&mut self.trace);
                let _ = reply.send(Ok(std::mem::take(&mut self.trace)));
            }
            Event::AwaitNorm { reply } => self.norm = Some(reply),
            Event::Drain { reply } => self.drain = Some(reply),
            Event::Stop { reason } => self.fail(Error::Stopped(reason)),
            Event::Shutdown => {}
        }
    }

    fn admit(&mut self, operations: Vec<Operation>, context: Arc<StepContext>) {
        self.latest_context = Some(context.clone());
        if self.stopped.is_some() {
            return;
        }
        tracing::debug!(step = context.adamw.step, operations = operations.len(), "schedule");
        for operation in operations {
            self.order.admit(operation, Note { context: context.clone(), started_s: 0.0, waited_s: 0.0 });
        }
    }

    fn finished(&mut self, id: u64, mut held: Held, result: Result<()>) {
        let Some((operation, note)) = self.order.finish(id) else { return };
        let moments = match (held.started.take(), &held.done) {
            (Some(started), Some(done)) => {
                Some(Moments { asked: held.asked.take(), started, done: done.clone() })
            }
            _ => None,
        };
        self.put_back(&operation, held);
        if operation.queue() == Queue::Compute {
            self.computing = None;
        }
        let event = TraceEvent {
            operation,
            step: note.context.adamw.step,
            start_s: note.started_s,
            end_s: self.started.elapsed().as_secs_f64(),
            waited_s: note.waited_s,
        };
        tracing::trace!(
            operation = operation.name(),
            queue = operation.queue().name(),
            step = event.step,
            start_s = event.start_s,
            end_s = event.end_s,
            "done"
        );
        self.clock.note(event, moments, &mut self.trace);
        if let Err(error) = result {
            self.fail(error);
        }
    }

    /// Keeps the first error and starts nothing any more.
    fn fail(&mut self, error: Error) {
        if self.stopped.is_none() {
            self.stopped = Some(error.to_string());
            self.failure = Some(error);
            self.order.cancel_waiting();
        }
    }

    /// The error for somebody who waits: the first one gets it whole.
    fn failure(&mut self) -> Option<Error> {
        let stopped = self.stopped.clone()?;
        Some(self.failure.take().unwrap_or(Error::Stopped(stopped)))
    }

    /// Starts all operations that may start.
    fn advance(&mut self) {
        for queue in Queue::ALL {
            while let Some((id, operation)) = self.order.startable(queue) {
                if queue == Queue::Compute && !self.expects(&operation) {
                    break;
                }
                self.start(id, operation);
                if self.stopped.is_some() {
                    return;
                }
            }
        }
    }

    /// Whether the training thread has come to `operation`. Another request than this one stops the run.
    fn expects(&mut self, operation: &Operation) -> bool {
        let Some((request, _)) = &self.compute else { return false };
        let matches = match (*request, *operation) {
            (ComputeRequest::Attach, Operation::Attach { .. }) => true,
            (ComputeRequest::Detach, Operation::Detach { .. }) => true,
            (ComputeRequest::Forward(group), Operation::Forward { call, .. }) => {
                self.performer.calls[call].group == group
            }
            (ComputeRequest::Backward(asked), Operation::Backward { call, .. }) => call == asked,
            _ => false,
        };
        if !matches {
            let error = Error::OrderChanged {
                expected: self.describe(operation),
                found: self.describe_request(*request),
            };
            self.fail(error);
        }
        matches
    }

    fn start(&mut self, id: u64, operation: Operation) {
        let held = match self.take(&operation) {
            Some(held) => held,
            None => return self.fail(internal("memory of an operation is in use elsewhere")),
        };
        let queue = operation.queue();
        let now_s = self.started.elapsed().as_secs_f64();
        let Some(note) = self.order.start(id) else { return };
        note.started_s = now_s;
        if queue == Queue::Compute {
            note.waited_s = now_s - self.asked_s;
        }
        let context = note.context.clone();
        match operation {
            Operation::Read { extent, piece, .. } => {
                self.transfer(id, extent, piece, *held, Verb::Read, context.adamw.step);
            }
            Operation::Write { extent, piece, .. } => {
                self.transfer(id, extent, piece, *held, Verb::Write, context.adamw.step);
            }
            _ if queue == Queue::Compute => {
                let Some((_, reply)) = self.compute.take() else { return };
                self.computing = Some(operation);
                if let Err(unsent) = reply.send(Ok(Grant { operation, held, id }))
                    && let Ok(grant) = unsent.into_inner()
                {
                    self.finished(id, *grant.held, Err(internal("the training thread went away")));
                }
            }
            _ if queue == Queue::Control => {
                let mut held = *held;
                let result = self.performer.perform(&operation, &mut held, &context);
                self.finished(id, held, result);
            }
            _ => {
                let job = Job { id, operation, held, context };
                let worker = self.workers.get(&queue).and_then(|worker| worker.jobs.as_ref());
                if worker.is_none_or(|jobs| jobs.send(job).is_err()) {
                    self.order.finish(id);
                    self.fail(internal("the thread of a queue ended"));
                }
            }
        }
    }

    fn transfer(&mut self, id: u64, extent: Extent, piece: usize, mut held: Held, verb: Verb, step: u64) {
        let (Some((store, extent)), Some(BufferMemory::Host(lease))) =
            (self.extents.get(&extent), held.buffers.pop())
        else {
            return self.finished(id, held, Err(internal("a transfer without its extent")));
        };
        let (events, performer) = (self.events.clone(), self.performer.clone());
        let done = move |completion: Completion| {
            let held =
                Box::new(Held { buffers: vec![BufferMemory::Host(completion.lease)], ..Held::default() });
            let result = completion.result.map_err(|source| performer.disk_error(step, source));
            // Nobody listens any more only when the dispatcher itself is gone, and the lease with it.
            let _ = events.send(Event::Finished { id, held, result });
        };
        match verb {
            Verb::Read => store.read(*extent, piece, lease, done),
            Verb::Write => store.write(*extent, piece, lease, done),
        }
    }

    fn take(&mut self, operation: &Operation) -> Option<Box<Held>> {
        let mut held = Box::new(Held::default());
        for resource in operation.resources() {
            match resource {
                Resource::Buffer(buffer) => held.buffers.push(self.buffers[buffer.0].take()?),
                Resource::Slot(slot) => held.slot = Some(self.slots[slot.0].take()?),
                Resource::Gradients(set) => held.gradients = Some(self.gradients[set.0].take()?),
                Resource::Passage(passage) => held.passage = Some(self.passages[passage.0].take()?),
                Resource::Statistics => held.statistics = Some(self.statistics.take()?),
                Resource::Piece(..) | Resource::StatesOnDisk => {}
            }
            held.earlier.extend(self.dones.get(&resource).cloned());
        }
        Some(held)
    }

    fn put_back(&mut self, operation: &Operation, held: Held) {
        let mut buffers = held.buffers.into_iter();
        let (mut slot, mut gradients, mut passage) = (held.slot, held.gradients, held.passage);
        for resource in operation.resources() {
            let on_device = match resource {
                Resource::Buffer(_) => buffers.as_slice().first().is_some_and(BufferMemory::is_on_device),
                Resource::Slot(_) | Resource::Gradients(_) | Resource::Passage(_) => true,
                _ => false,
            };
            if let Some(done) = held.done.as_ref().filter(|_| on_device) {
                self.dones.insert(resource, done.clone());
            }
            match resource {
                Resource::Buffer(buffer) => self.buffers[buffer.0] = buffers.next(),
                Resource::Slot(index) => self.slots[index.0] = slot.take(),
                Resource::Gradients(set) => self.gradients[set.0] = gradients.take(),
                Resource::Passage(index) => self.passages[index.0] = passage.take(),
                Resource::Statistics | Resource::Piece(..) | Resource::StatesOnDisk => {}
            }
        }
        if held.statistics.is_some() {
            self.statistics = held.statistics;
        }
    }

    /// Answers those who wait for something that has come about.
    fn answer(&mut self) {
        if self.stopped.is_some() {
            if let Some((_, reply)) = self.compute.take()
                && let Some(error) = self.failure()
            {
                let _ = reply.send(Err(error));
            }
            if let Some(reply) = self.norm.take()
                && let Some(error) = self.failure()
            {
                let _ = reply.send(Err(error));
            }
            if self.in_flight_outside() == 0
                && let Some(reply) = self.drain.take()
                && let Some(error) = self.failure()
            {
                let _ = reply.send(Err(error));
            }
            return;
        }
        if let Some(norm) = self.latest_context.as_ref().and_then(|context| context.norm.get())
            && let Some(reply) = self.norm.take()
        {
            self.clock.settle_compute(&mut self.trace);
            let _ = reply.send(Ok((*norm, std::mem::take(&mut self.trace))));
        }
        if self.order.is_empty()
            && let Some(reply) = self.drain.take()
        {
            let _ = reply.send(Ok(()));
        }
        // A request that no schedule answers would wait for ever.
        if self.order.is_empty()
            && let Some((request, reply)) = self.compute.take()
        {
            let error = Error::OrderChanged {
                expected: "nothing more in this step".into(),
                found: self.describe_request(request),
            };
            self.stopped = Some(error.to_string());
            let _ = reply.send(Err(error));
        }
    }
}
