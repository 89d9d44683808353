//! What goes wrong on the device, with the code that the CUDA call answers.

use std::ffi::c_int;

/// The codes of `CUresult` that the driver answers, as in `cuda.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// An argument is out of its range.
    InvalidValue = 1,
    /// The device has no memory left.
    OutOfMemory = 2,
    /// There is no device of this number.
    InvalidDevice = 101,
    /// The module is not PTX text.
    NoBinaryForGpu = 209,
    /// The PTX text has an error, or an instruction that the interpreter does not know.
    InvalidPtx = 218,
    /// The handle is not one that the driver gave out, or is one that was destroyed.
    InvalidHandle = 400,
    /// A module has no kernel of this name.
    NotFound = 500,
    /// The work that was asked about is not done yet.
    NotReady = 600,
    /// A kernel or a copy touched memory that it may not touch.
    IllegalAddress = 700,
    /// An assertion in a kernel failed.
    Assert = 710,
    /// A kernel stopped itself, or its threads wait for each other for ever.
    LaunchFailed = 719,
    /// The driver has no such function.
    NotSupported = 801,
}

impl Code {
    /// As the C interface answers it.
    pub fn number(self) -> c_int {
        self as c_int
    }
}

/// A failure on the device. The first one stays: every later call of the program answers its code.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What the call answers.
    pub code: Code,
    /// What happened, for a person.
    pub message: String,
}

impl Fault {
    /// A failure with this code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// An error in the PTX text at this line, counted from 1.
    pub fn ptx(line: u32, reason: impl std::fmt::Display) -> Self {
        Self::new(Code::InvalidPtx, format!("PTX line {line}: {reason}"))
    }

    /// An access to memory that a kernel or a copy may not touch.
    pub fn address(message: impl Into<String>) -> Self {
        Self::new(Code::IllegalAddress, message)
    }

    /// The same failure, with the place where it happened in front.
    pub fn at(mut self, place: impl std::fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

/// What the driver's own functions return.
pub type Result<T, E = Fault> = std::result::Result<T, E>;
