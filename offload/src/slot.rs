//! Device storage that successive groups take turns in.

use std::fmt;

use crate::Error;

/// Where a [`Slot`] is in its round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Holds no group.
    Empty,
    /// Its storage is out, being filled with a group.
    Filling,
    /// Holds a group that nobody uses.
    Ready,
    /// Its storage is out, computing.
    InUse,
    /// Its storage is out, being copied back.
    Draining,
}

impl fmt::Display for SlotState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            SlotState::Empty => "empty",
            SlotState::Filling => "filling",
            SlotState::Ready => "ready",
            SlotState::InUse => "in use",
            SlotState::Draining => "draining",
        })
    }
}

/// Storage `T` of a fixed size with a state that says who may touch it.
///
/// | method | from | to | storage |
/// |---|---|---|---|
/// | `begin_fill` | Empty | Filling | moves out |
/// | `finish_fill` / `cancel_fill` | Filling | Ready / Empty | moves in |
/// | `acquire` | Ready | InUse | moves out |
/// | `release` | InUse | Ready | moves in |
/// | `begin_drain` | Ready | Draining | moves out |
/// | `finish_drain` | Draining | Ready | moves in |
/// | `evict` | Ready | Empty | stays |
///
/// Any other order is [`Error::SlotOrder`]. Because the storage moves, two users at once cannot be written.
#[derive(Debug)]
pub struct Slot<T> {
    name: String,
    state: SlotState,
    group: Option<usize>,
    /// `Some` in the states Empty and Ready.
    storage: Option<T>,
}

impl<T> Slot<T> {
    /// An empty slot; `name` is for error messages.
    pub fn new(name: impl Into<String>, storage: T) -> Self {
        Self { name: name.into(), state: SlotState::Empty, group: None, storage: Some(storage) }
    }

    /// The name given to [`Slot::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the slot is in its round.
    pub fn state(&self) -> SlotState {
        self.state
    }

    /// The group that the slot holds; `None` while empty or filling.
    pub fn group(&self) -> Option<usize> {
        self.group
    }

    /// Takes the storage out to fill it.
    pub fn begin_fill(&mut self) -> Result<T, Error> {
        self.move_out(SlotState::Empty, SlotState::Filling, "begin to fill")
    }

    /// Puts the storage back, filled with `group`.
    pub fn finish_fill(&mut self, storage: T, group: usize) -> Result<(), Error> {
        self.move_in(SlotState::Filling, SlotState::Ready, storage, "finish filling")?;
        self.group = Some(group);
        Ok(())
    }

    /// Puts the storage back after a transfer that failed; the slot is empty again.
    pub fn cancel_fill(&mut self, storage: T) -> Result<(), Error> {
        self.move_in(SlotState::Filling, SlotState::Empty, storage, "cancel filling")
    }

    /// Takes the storage out to compute with `group`, which the slot must hold.
    pub fn acquire(&mut self, group: usize) -> Result<T, Error> {
        if self.group != Some(group) {
            return Err(self.out_of_order(format!("be acquired for group {group}")));
        }
        self.move_out(SlotState::Ready, SlotState::InUse, "be acquired")
    }

    /// Puts the storage back; the slot still holds its group.
    pub fn release(&mut self, storage: T) -> Result<(), Error> {
        self.move_in(SlotState::InUse, SlotState::Ready, storage, "be released")
    }

    /// Takes the storage out to copy it back.
    pub fn begin_drain(&mut self) -> Result<T, Error> {
        self.move_out(SlotState::Ready, SlotState::Draining, "begin to drain")
    }

    /// Puts the storage back after draining; the slot still holds its group until [`Slot::evict`].
    pub fn finish_drain(&mut self, storage: T) -> Result<(), Error> {
        self.move_in(SlotState::Draining, SlotState::Ready, storage, "finish draining")
    }

    /// Forgets the group, so that another one can take its turn. Answers which one it was.
    pub fn evict(&mut self) -> Result<usize, Error> {
        match (self.state, self.group) {
            (SlotState::Ready, Some(group)) => {
                self.state = SlotState::Empty;
                self.group = None;
                Ok(group)
            }
            _ => Err(self.out_of_order("be evicted")),
        }
    }

    fn move_out(&mut self, from: SlotState, to: SlotState, operation: &str) -> Result<T, Error> {
        match self.storage.take_if(|_| self.state == from) {
            Some(storage) => {
                self.state = to;
                Ok(storage)
            }
            None => Err(self.out_of_order(operation)),
        }
    }

    fn move_in(&mut self, from: SlotState, to: SlotState, storage: T, operation: &str) -> Result<(), Error> {
        if self.state != from {
            return Err(self.out_of_order(operation));
        }
        self.state = to;
        self.storage = Some(storage);
        Ok(())
    }

    fn out_of_order(&self, operation: impl Into<String>) -> Error {
        Error::SlotOrder {
            slot: self.name.clone(),
            state: self.state,
            group: self.group,
            operation: operation.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_round_moves_the_storage_and_keeps_track_of_the_group() {
        let mut slot = Slot::new("slot 0", vec![0_u8; 4]);
        let mut storage = slot.begin_fill().unwrap();
        storage[0] = 9;
        slot.finish_fill(storage, 7).unwrap();
        assert_eq!((slot.state(), slot.group()), (SlotState::Ready, Some(7)));
        let storage = slot.acquire(7).unwrap();
        assert_eq!(storage[0], 9);
        slot.release(storage).unwrap();
        let storage = slot.begin_drain().unwrap();
        slot.finish_drain(storage).unwrap();
        assert_eq!(slot.evict().unwrap(), 7);
        let storage = slot.begin_fill().unwrap();
        slot.cancel_fill(storage).unwrap();
        assert_eq!((slot.state(), slot.group()), (SlotState::Empty, None));
    }

    /// Brings a slot into `state` by the shortest way.
    fn slot_in(state: SlotState) -> Slot<u8> {
        let mut slot = Slot::new("slot 3", 1);
        if state != SlotState::Empty {
            slot.begin_fill().unwrap();
        }
        if !matches!(state, SlotState::Empty | SlotState::Filling) {
            slot.finish_fill(1, 5).unwrap();
        }
        match state {
            SlotState::InUse => drop(slot.acquire(5).unwrap()),
            SlotState::Draining => drop(slot.begin_drain().unwrap()),
            _ => {}
        }
        assert_eq!(slot.state(), state);
        slot
    }

    #[test]
    fn each_transition_is_allowed_from_one_state_only() {
        type Transition = fn(&mut Slot<u8>) -> Result<(), Error>;
        let transitions: [(SlotState, Transition); 9] = [
            (SlotState::Empty, |slot| slot.begin_fill().map(drop)),
            (SlotState::Filling, |slot| slot.finish_fill(1, 5)),
            (SlotState::Filling, |slot| slot.cancel_fill(1)),
            (SlotState::Ready, |slot| slot.acquire(5).map(drop)),
            (SlotState::InUse, |slot| slot.release(1)),
            (SlotState::Ready, |slot| slot.begin_drain().map(drop)),
            (SlotState::Draining, |slot| slot.finish_drain(1)),
            (SlotState::Ready, |slot| slot.evict().map(drop)),
            (SlotState::Ready, |slot| slot.acquire(5).map(drop)),
        ];
        let states =
            [SlotState::Empty, SlotState::Filling, SlotState::Ready, SlotState::InUse, SlotState::Draining];
        for (index, (allowed, transition)) in transitions.iter().enumerate() {
            for state in states {
                let mut slot = slot_in(state);
                match transition(&mut slot) {
                    Ok(()) => assert_eq!(state, *allowed, "transition {index}"),
                    Err(Error::SlotOrder { slot: name, state: named, .. }) => {
                        assert_ne!(state, *allowed, "transition {index}");
                        assert_eq!((name.as_str(), named, slot.state()), ("slot 3", state, state));
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }

    #[test]
    fn a_slot_is_not_acquired_for_a_group_that_it_does_not_hold() {
        let mut slot = slot_in(SlotState::Ready);
        let text = slot.acquire(6).unwrap_err().to_string();
        assert!(text.contains("slot 3") && text.contains("group 6") && text.contains("Some(5)"), "{text}");
    }
}
