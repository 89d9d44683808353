//! A trace as a file that chrome://tracing and Perfetto show: one track a queue, one event an operation, and
//! a counter a tier of the bytes that hold something.

use crate::error::{Error, Result};
use crate::observe::occupancy::Occupancy;
use crate::planner::plan::Plan;
use crate::schedule::operation::Queue;
use crate::schedule::trace::Trace;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What closes the array. It is written behind every step and overwritten by the next one, so the file is
/// valid JSON after every step, however the run ends.
const END: &str = "\n]\n";

/// Tracks of one queue have numbers from this multiple on.
const TRACKS_PER_QUEUE: usize = 100;

/// Writes traces to a file, step by step.
pub struct ChromeTrace {
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes before [`END`].
    length_bytes: u64,
    plan: Plan,
    /// When the last operation of each track ended, by queue. Operations of a disk queue overlap, those of a
    /// track do not.
    tracks: [Vec<f64>; Queue::ALL.len()],
    /// Until when the counters are written, and what they were last.
    counted: Option<Occupancy>,
}

/// The counters, and what they are.
fn counters(level: &Occupancy) -> [(&'static str, u64); 3] {
    [
        ("device memory in use", level.device_bytes),
        ("host memory in use", level.host_bytes),
        ("disk in use", level.disk_bytes),
    ]
}

impl ChromeTrace {
    /// Makes the file, with a named track for each queue.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn create(path: &Path, plan: &Plan) -> Result<Self> {
        let failed = Error::file(path);
        let mut this = Self {
            path: path.to_owned(),
            file: BufWriter::new(File::create(path).map_err(failed)?),
            length_bytes: 0,
            plan: plan.clone(),
            tracks: Queue::ALL.map(|_| vec![]),
            counted: None,
        };
        this.begin().map_err(failed)?;
        Ok(this)
    }

    fn begin(&mut self) -> std::io::Result<()> {
        let process = json!({
            "name": "process_name", "ph": "M", "pid": 1, "args": { "name": "ferrozero" },
        });
        self.put(&format!("[\n{process}"))?;
        for queue in Queue::ALL {
            self.add_track(queue)?;
        }
        self.close()
    }

    /// Appends the operations of a trace.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn append(&mut self, trace: &Trace) -> Result<()> {
        self.try_append(trace).map_err(Error::file(&self.path))
    }

    fn try_append(&mut self, trace: &Trace) -> std::io::Result<()> {
        self.file.seek(SeekFrom::Start(self.length_bytes))?;
        for event in &trace.events {
            let track = self.track(event.operation.queue(), event.start_s, event.end_s)?;
            let group = event.operation.group(self.plan.layout(), self.plan.calls());
            let group = group.map(|group| self.plan.layout().groups[group].name.clone());
            self.put_object(&json!({
                "name": event.operation.name(),
                "cat": event.operation.queue().name(),
                "ph": "X",
                "ts": 1e6 * event.start_s,
                "dur": 1e6 * (event.end_s - event.start_s),
                "pid": 1,
                "tid": track,
                "args": {
                    "step": event.step,
                    "group": group,
                    "piece": event.operation.piece(),
                    "micro_batch": event.operation.micro_batch(),
                    "waited_s": event.waited_s,
                },
            }))?;
        }
        self.count(trace)?;
        self.close()
    }

    /// Writes the counters of a trace from where they were written to its end, each where it changes.
    fn count(&mut self, trace: &Trace) -> std::io::Result<()> {
        let from_s = self.counted.map_or(0.0, |level| level.at_s);
        let until_s = trace.events.iter().map(|event| event.end_s).fold(from_s, f64::max);
        for level in trace.occupancy(&self.plan, from_s, until_s) {
            let before = self.counted.replace(level);
            for (index, (name, bytes)) in counters(&level).into_iter().enumerate() {
                if before.is_none_or(|before| counters(&before)[index].1 != bytes) {
                    let ts = 1e6 * level.at_s;
                    self.put_object(
                        &json!({ "name": name, "ph": "C", "ts": ts, "pid": 1, "args": { "bytes": bytes } }),
                    )?;
                }
            }
        }
        // What goes on behind the trace is in the next one.
        self.counted = self.counted.map(|level| Occupancy { at_s: until_s, ..level });
        Ok(())
    }

    /// The number of a track of `queue` on which nothing overlaps with the operation. Operations come in the
    /// order in which they end; taking the track that was free for the shortest time needs no more tracks
    /// than the queue is deep.
    fn track(&mut self, queue: Queue, start_s: f64, end_s: f64) -> std::io::Result<usize> {
        let tracks = &self.tracks[queue as usize];
        let free = (0..tracks.len()).filter(|&track| tracks[track] <= start_s);
        let track = match free.max_by(|&a, &b| tracks[a].total_cmp(&tracks[b])) {
            Some(track) => track,
            None => self.add_track(queue)?,
        };
        self.tracks[queue as usize][track] = end_s;
        Ok(track_number(queue, track))
    }

    fn add_track(&mut self, queue: Queue) -> std::io::Result<usize> {
        let track = self.tracks[queue as usize].len();
        self.tracks[queue as usize].push(f64::NEG_INFINITY);
        let name = match track {
            0 => queue.name().to_owned(),
            _ => format!("{} {}", queue.name(), track + 1),
        };
        let number = track_number(queue, track);
        for (key, args) in
            [("thread_name", json!({ "name": name })), ("thread_sort_index", json!({ "sort_index": number }))]
        {
            self.put_object(&json!({ "name": key, "ph": "M", "pid": 1, "tid": number, "args": args }))?;
        }
        Ok(track)
    }

    fn put_object(&mut self, object: &Value) -> std::io::Result<()> {
        self.put(&format!(",\n{object}"))
    }

    fn put(&mut self, text: &str) -> std::io::Result<()> {
        self.file.write_all(text.as_bytes())?;
        self.length_bytes += text.len() as u64;
        Ok(())
    }

    fn close(&mut self) -> std::io::Result<()> {
        self.file.write_all(END.as_bytes())?;
        self.file.flush()
    }
}

fn track_number(queue: Queue, track: usize) -> usize {
    TRACKS_PER_QUEUE * (queue as usize + 1) + track
}
