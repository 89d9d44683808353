//! Streams and events.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::thread;

use super::{call, give};
use crate::driver::State;
use crate::driver::streams::{DEFAULT, Event};
use crate::driver::work::{Recorded, Work};
use crate::fault::Code;

impl State {
    /// The stream of a handle. 0 and 1 are the default stream, 2 is the thread's own.
    pub fn stream(&mut self, handle: usize) -> Result<usize, Code> {
        match handle {
            0 | 1 => Ok(DEFAULT),
            2 => {
                let thread = thread::current().id();
                if let Some(stream) = self.thread_streams.get(&thread) {
                    return Ok(*stream);
                }
                let stream = self.new_stream();
                self.thread_streams.insert(thread, stream);
                Ok(stream)
            }
            _ => self.stream_handles.get(&handle).copied().ok_or(Code::InvalidHandle),
        }
    }

    /// What an event recorded last; none before its first record.
    fn event(&self, handle: usize) -> Result<Option<Event>, Code> {
        self.events.get(&handle).cloned().ok_or(Code::InvalidHandle)
    }

    /// The host has seen that an event is reached.
    fn host_saw(&mut self, event: &Event) {
        if let Some((clock, _)) = event.recorded.reached.get() {
            self.host_waited_for(clock);
        }
    }
}

/// Makes a stream.
///
/// # Safety
/// `stream` is null or valid for a write.
unsafe fn create(name: &'static str, stream: *mut usize) -> c_int {
    call(name, |state| {
        let (number, handle) = (state.new_stream(), state.new_handle());
        state.stream_handles.insert(handle, number);
        // SAFETY: the caller says so.
        unsafe { give(stream, handle) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut usize, _flags: c_uint) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { create("cuStreamCreate", stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut usize,
    _flags: c_uint,
    _priority: c_int,
) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { create("cuStreamCreateWithPriority", stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(handle: usize) -> c_int {
    call("cuStreamDestroy_v2", |state| {
        let stream = state.stream_handles.remove(&handle).ok_or(Code::InvalidHandle)?;
        state.destroy_stream(stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: usize) -> c_int {
    call("cuStreamSynchronize", |state| {
        let stream = state.stream(stream)?;
        state.synchronize(stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: usize) -> c_int {
    call("cuStreamQuery", |state| {
        let stream = state.stream(stream)?;
        let enqueued = state.streams[stream].enqueued;
        if state.poll(stream, enqueued)? { state.synchronize(stream) } else { Err(Code::NotReady) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_stream: usize, status: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(status, 0) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> c_int {
    call("cuStreamWaitEvent", |state| {
        let stream = state.stream(stream)?;
        let Some(Event { recorded, stream: other, number }) = state.event(event)? else { return Ok(()) };
        state.enqueue(stream, Work::Wait { recorded, stream: other, number })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: usize,
    function: extern "C" fn(*mut c_void),
    argument: usize,
) -> c_int {
    call("cuLaunchHostFunc", |state| {
        let stream = state.stream(stream)?;
        state.enqueue(stream, Work::Call { function, argument })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut usize, _flags: c_uint) -> c_int {
    call("cuEventCreate", |state| {
        let handle = state.new_handle();
        state.events.insert(handle, None);
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(event, handle) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: usize) -> c_int {
    call("cuEventDestroy_v2", |state| state.events.remove(&event).map(drop).ok_or(Code::InvalidHandle))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: usize, stream: usize) -> c_int {
    call("cuEventRecord", |state| {
        let stream = state.stream(stream)?;
        state.event(event)?;
        let recorded = Arc::new(Recorded::default());
        let number = state.streams[stream].enqueued + 1;
        state.events.insert(event, Some(Event { recorded: recorded.clone(), stream, number }));
        state.enqueue(stream, Work::Record { recorded })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: usize) -> c_int {
    call("cuEventSynchronize", |state| {
        let Some(event) = state.event(event)? else { return Ok(()) };
        state.run_until(event.stream, event.number)?;
        state.host_saw(&event);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: usize) -> c_int {
    call("cuEventQuery", |state| {
        let Some(event) = state.event(event)? else { return Ok(()) };
        if !state.poll(event.stream, event.number)? {
            return Err(Code::NotReady);
        }
        state.host_saw(&event);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) -> c_int {
    call("cuEventElapsedTime_v2", |state| {
        let reached = |event: Option<Event>| {
            let reached = event.and_then(|event| event.recorded.reached.get().map(|(_, time)| *time));
            reached.ok_or(Code::NotReady)
        };
        let (start, end) = (reached(state.event(start)?)?, reached(state.event(end)?)?);
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(milliseconds, end.saturating_duration_since(start).as_secs_f32() * 1e3) };
        Ok(())
    })
}
