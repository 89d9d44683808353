//! Limits that a system sets to the process.

use std::sync::Once;

/// Makes a file that grows beyond the process's limit (`ulimit -f`) an error that names it. By itself the
/// system would end the process with a signal, without a word. A program that handles the signal is left as
/// it is.
pub fn report_file_size_limit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeros are a valid `sigaction`; the first call only writes to it, and ignoring a signal
        // that would have ended the process runs no code of ours in a handler.
        unsafe {
            let mut current: libc::sigaction = std::mem::zeroed();
            let is_known = libc::sigaction(libc::SIGXFSZ, std::ptr::null(), &mut current) == 0;
            if is_known && current.sa_sigaction == libc::SIG_DFL {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            }
        }
    });
}

/// Most bytes that a file of this process may have; none where only the file system says.
pub(crate) fn file_bytes_max() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Fsize).current
}
