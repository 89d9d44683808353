//! What a system forbids or lacks is done without, and told in a notice.

mod common;

use common::*;
use ferrozero_offload::io::{Completion, FaultPlan, FileId, FileSpec, Io, Request, Uring, Verb};
use ferrozero_offload::*;
use serde_json::json;
use std::sync::mpsc;

/// Makes a system call fail for this thread and those that it starts, as many containers do.
fn forbid(call: libc::c_long, errno: i32) {
    const fn step(code: u32, value: u32, skip_if_false: u8) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt: 0, jf: skip_if_false, k: value }
    }
    let mut steps = [
        // The number of the system call is the first word.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32, 1),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program and its steps outlive the calls, which copy them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}

/// Runs in a thread for which a system call fails.
fn without(call: libc::c_long, errno: i32, run: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        forbid(call, errno);
        run();
    });
    thread.join().unwrap();
}

fn options(backend: BackendChoice) -> StoreOptions {
    StoreOptions { backend, ..of_pieces(4096) }
}

fn codes(notices: &[Notice]) -> Vec<&'static str> {
    notices.iter().map(|notice| notice.code).collect()
}

/// Writes, commits, opens and reads.
fn expect_works(store: Store, directory: &std::path::Path) {
    let arena = arena(1 << 20);
    write_all(&store, &arena, 1);
    store.commit(json!(null)).unwrap();
    drop(store);
    let store = Store::open(directory, options(BackendChoice::Auto)).unwrap();
    for piece in pieces(&store) {
        expect_round(&store, &arena, piece, 1);
    }
}

/// The ring itself, what is asked of it before it is chosen, the entry into it, and the pipe that wakes its
/// thread.
#[test]
fn without_a_part_of_io_uring_the_pool_takes_over_with_a_notice() {
    let parts =
        [libc::SYS_io_uring_setup, libc::SYS_io_uring_register, libc::SYS_io_uring_enter, libc::SYS_pipe2];
    for call in parts {
        without(call, libc::EPERM, move || {
            let directory = tempfile::tempdir().unwrap();
            let create =
                |backend| Store::create(directory.path(), state("weights", 50_000), options(backend));
            let asked = create(BackendChoice::Uring).map(drop);
            assert!(matches!(asked, Err(Error::UringUnavailable { .. })), "{call}: {asked:?}");
            let store = create(BackendChoice::Auto).unwrap();
            assert_eq!(codes(store.notices()).first(), Some(&"uring-unavailable"), "{call}");
            expect_works(store, directory.path());
        });
    }
}

/// After the ring was chosen nothing more is asked of the system than to enter it, so there is nothing to
/// refuse.
#[test]
fn a_ring_that_was_chosen_needs_no_other_call_of_the_system() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(ring) = Uring::new(directory.path(), &FaultPlan::default()) else {
        return println!("skipping: no io_uring");
    };
    without(libc::SYS_io_uring_register, libc::EPERM, move || {
        for call in [libc::SYS_io_uring_setup, libc::SYS_pipe2] {
            forbid(call, libc::EPERM);
        }
        ring.allocate_files(&[FileSpec { name: "weights".to_owned(), bytes: 8192 }]).unwrap();
        let arena = arena(1 << 20);
        let transfer = |verb, fill: u8| {
            let mut lease = arena.lease(8192).unwrap();
            lease.fill(fill);
            let request = Request::new(verb, FileId(0), 0, 8192, lease).unwrap();
            let (sender, done) = mpsc::channel();
            ring.submit(request, Box::new(move |completion| sender.send(completion).unwrap()));
            let Completion { lease, result } = done.recv().unwrap();
            result.unwrap();
            lease
        };
        transfer(Verb::Write, 7);
        assert!(transfer(Verb::Read, 0).iter().all(|&byte| byte == 7));
    });
}

/// What a ring that was chosen then meets: the thread that was made for it cannot enter the kernel any more.
#[test]
fn a_ring_that_is_shut_out_ends_every_request_with_an_error_and_none_waits_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(ring) = Uring::new(directory.path(), &FaultPlan::default()) else {
        return println!("skipping: no io_uring");
    };
    without(libc::SYS_io_uring_enter, libc::EIO, move || {
        ring.allocate_files(&[FileSpec { name: "weights".to_owned(), bytes: 1 << 20 }]).unwrap();
        let arena = arena(1 << 20);
        for round in 0..2 {
            let transfers: Vec<_> = (0..8).map(|number| start(&ring, &arena, Verb::Write, number)).collect();
            for done in transfers {
                let text = done.recv().unwrap().result.unwrap_err().to_string();
                assert!(text.contains("weights") && text.contains("os error 5"), "round {round}: {text}");
            }
        }
        assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
    });
}

/// The pipe that wakes the ring's thread breaks: everything is moved all the same.
#[test]
fn a_ring_whose_thread_cannot_be_woken_moves_everything_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(ring) = Uring::new(directory.path(), &FaultPlan::default()) else {
        return println!("skipping: no io_uring");
    };
    ring.allocate_files(&[FileSpec { name: "weights".to_owned(), bytes: 1 << 20 }]).unwrap();
    without(libc::SYS_write, libc::EIO, move || {
        let arena = arena(1 << 20);
        for _ in 0..3 {
            let transfers: Vec<_> = (0..8).map(|number| start(&ring, &arena, Verb::Write, number)).collect();
            transfers.into_iter().for_each(|done| done.recv().unwrap().result.unwrap());
        }
        drop(ring);
    });
}

/// One of the pages of a file.
fn start(ring: &Uring, arena: &Arena, verb: Verb, number: u64) -> mpsc::Receiver<Completion> {
    let lease = arena.lease(4096).unwrap();
    let request = Request::new(verb, FileId(0), 4096 * number, 4096, lease).unwrap();
    let (sender, done) = mpsc::channel();
    ring.submit(request, Box::new(move |completion| sender.send(completion).unwrap()));
    done
}

/// No thread can be had, as where the limit on processes (`ulimit -u`) is reached.
#[test]
fn a_process_that_gets_no_threads_is_told_so() {
    for backend in [BackendChoice::Auto, BackendChoice::Pool] {
        without(libc::SYS_clone3, libc::EAGAIN, move || {
            // Where the C library has no clone3 it takes clone.
            forbid(libc::SYS_clone, libc::EAGAIN);
            let directory = tempfile::tempdir().unwrap();
            let created =
                Store::create(directory.path(), state("weights", 50_000), options(backend)).map(drop);
            assert!(matches!(created, Err(Error::Thread { .. })), "{created:?}");
        });
    }
}

/// Closing a file may report that what was written is lost: by then everything is durable, or an error has
/// said so.
#[test]
fn a_close_that_fails_costs_nothing() {
    for backend in [BackendChoice::Auto, BackendChoice::Pool] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        without(libc::SYS_close, libc::EIO, move || {
            let store = Store::create(&path, state("weights", 50_000), options(backend)).unwrap();
            expect_works(store, &path);
        });
    }
}

/// No memory can be mapped, as where the limit on it (`ulimit -v`) is reached.
#[test]
fn an_arena_that_cannot_be_mapped_is_told_with_its_bytes() {
    let mapped = Arena::new(&Budget::new(Tier::Host, 1 << 62), 1 << 60).map(drop);
    assert!(
        matches!(mapped, Err(Error::ArenaMap { capacity_bytes, .. }) if capacity_bytes == 1 << 60),
        "{mapped:?}"
    );
}

#[test]
fn memory_that_cannot_be_pinned_works_with_a_notice() {
    without(libc::SYS_mlock, libc::ENOMEM, || {
        let arena = arena(1 << 20);
        assert_eq!(codes(arena.notices()), ["arena-not-pinned"]);
        assert!(arena.notices()[0].text.contains("ulimit -l"), "{:?}", arena.notices());
        let mut lease = arena.lease(10_000).unwrap();
        lease.fill(7);
        assert!(lease.iter().all(|&byte| byte == 7));
    });
}

#[test]
fn a_file_system_that_reserves_no_space_works_with_a_notice() {
    for backend in [BackendChoice::Pool, BackendChoice::Auto] {
        without(libc::SYS_fallocate, libc::EOPNOTSUPP, move || {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::create(directory.path(), state("weights", 50_000), options(backend)).unwrap();
            let told = codes(store.notices()).into_iter().filter(|code| *code == "space-not-reserved");
            assert_eq!(told.count(), 1, "once for all files");
            let file = std::fs::metadata(directory.path().join("state-a.bin")).unwrap();
            assert_eq!(file.len(), 53_248, "the file has its size all the same");
            expect_works(store, directory.path());
        });
    }
}
