//! The arena under random programs of leases.

use ferrozero_offload::*;
use proptest::prelude::*;

const CAPACITY_BYTES: usize = 64 * PAGE_BYTES;

#[derive(Clone, Debug)]
enum Action {
    Lease { bytes: usize },
    Drop { which: usize },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (0_usize..20 * PAGE_BYTES).prop_map(|bytes| Action::Lease { bytes }),
        2 => any::<usize>().prop_map(|which| Action::Drop { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn leases_are_aligned_zeroed_apart_and_come_back(actions in prop::collection::vec(action(), 1..200)) {
        let budget = Budget::new(Tier::Host, CAPACITY_BYTES as u64);
        let arena = Arena::new(&budget, CAPACITY_BYTES - 1).unwrap();
        let mut leases: Vec<(u8, Lease)> = Vec::new();
        for (index, action) in actions.iter().enumerate() {
            let leased_bytes: usize = leases.iter().map(|(_, lease)| lease.capacity_bytes()).sum();
            prop_assert_eq!(arena.free_bytes(), CAPACITY_BYTES - leased_bytes);
            match *action {
                Action::Lease { bytes } => match arena.lease(bytes) {
                    Ok(mut lease) => {
                        prop_assert_eq!(lease.len(), bytes);
                        prop_assert_eq!(lease.capacity_bytes(), padded_bytes(bytes.max(1)));
                        prop_assert_eq!(lease.as_ptr().addr() % PAGE_BYTES, 0);
                        prop_assert!(lease.padded().iter().all(|&byte| byte == 0));
                        let value = index as u8 | 1;
                        lease.padded_mut().fill(value);
                        leases.push((value, lease));
                    }
                    Err(Error::ArenaExhausted { requested_bytes, free_bytes, largest_free_bytes }) => {
                        prop_assert_eq!(requested_bytes, bytes);
                        prop_assert_eq!(free_bytes, arena.free_bytes());
                        prop_assert!(largest_free_bytes < padded_bytes(bytes));
                        if largest_free_bytes > 0 {
                            // What it says is there can be had.
                            drop(arena.lease(largest_free_bytes).unwrap());
                        }
                    }
                    Err(other) => panic!("{other}"),
                },
                Action::Drop { which } if !leases.is_empty() => {
                    let (value, lease) = leases.swap_remove(which % leases.len());
                    prop_assert!(lease.padded().iter().all(|&byte| byte == value), "leases overlap");
                }
                Action::Drop { .. } => {}
            }
        }
        drop(leases);
        prop_assert!(arena.lease(CAPACITY_BYTES).is_ok(), "free neighbours are joined again");
    }
}

#[test]
fn the_budget_is_held_until_the_last_lease_is_gone() {
    let budget = Budget::new(Tier::Host, 10 << 20);
    let arena = Arena::new(&budget, 6 << 20).unwrap();
    assert!(matches!(Arena::new(&budget, 6 << 20), Err(Error::OverBudget { tier: Tier::Host, .. })));
    let mut lease = arena.lease(10).unwrap();
    drop(arena);
    assert_eq!(budget.used_bytes(), 6 << 20);
    std::thread::spawn(move || {
        lease.as_f32_mut().copy_from_slice(&[1.5, -2.0]);
        assert_eq!(lease.as_f32(), [1.5, -2.0], "ten bytes hold two numbers");
        assert_eq!(lease[4..8], (-2.0_f32).to_ne_bytes());
    })
    .join()
    .unwrap();
    assert_eq!(budget.used_bytes(), 0);
}
