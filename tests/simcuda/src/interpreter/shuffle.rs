//! Lanes of a warp that read each other's operands.

use super::Machine;
use super::registers::lanes;
use super::warp::{Group, Warp};
use crate::fault::Result;
use crate::program::{Mask, Step};
use crate::ptx::types::Shuffle;

/// The lane that a lane reads from, and whether that is one within its segment; otherwise it reads its own.
fn source(lane: usize, shuffle: Shuffle, operand: u64, limits: u64) -> (usize, bool) {
    let (operand, clamp) = ((operand & 31) as usize, (limits & 31) as usize);
    let segment = ((limits >> 8) & 31) as usize;
    let last = (lane & segment) | (clamp & !segment & 31);
    let (from, is_inside) = match shuffle {
        Shuffle::Butterfly => (lane ^ operand, lane ^ operand <= last),
        Shuffle::Down => (lane + operand, lane + operand <= last),
        // Of this one the limit is the first lane and not the last.
        Shuffle::Up => (lane.wrapping_sub(operand), lane >= operand + last),
        Shuffle::Index => {
            let from = (lane & segment) | (operand & !segment);
            (from, from <= last)
        }
    };
    if is_inside { (from, true) } else { (lane, false) }
}

impl Machine<'_> {
    /// Exchanges operands once all lanes have come that the instruction names; answers those lanes, or none
    /// while some are missing.
    pub fn shuffle(
        &mut self,
        warp: &mut Warp,
        step: &Step,
        at: u32,
        shuffle: Shuffle,
        active: Mask,
    ) -> Result<Option<Mask>> {
        if active == 0 {
            return Ok(Some(0));
        }
        let row = |n: usize| step.sources[n] as usize;
        let named = warp.registers.rows[row(3)][active.trailing_zeros() as usize] as Mask;
        let wanted = named & warp.live;
        let mut arrived = active;
        warp.at_shuffle.retain(|group| {
            let here = group.at == at;
            arrived |= if here { group.mask } else { 0 };
            !here
        });
        if arrived & wanted != wanted {
            warp.at_shuffle.push(Group { at, mask: arrived });
            return Ok(None);
        }
        let values = warp.registers.rows[row(0)];
        let (operands, limits) = (warp.registers.rows[row(1)], warp.registers.rows[row(2)]);
        let mut inside = 0;
        for lane in lanes(arrived) {
            let (from, is_inside) = source(lane, shuffle, operands[lane], limits[lane]);
            if (arrived >> from) & 1 == 0 {
                return Err(Self::stuck(format!("lane {lane} reads from lane {from}, which is elsewhere")));
            }
            warp.registers.rows[step.results[0] as usize][lane] = values[from];
            inside |= Mask::from(is_inside) << lane;
        }
        warp.registers.set_predicate(step.results[1], arrived, inside);
        Ok(Some(arrived))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_read_from_where_ptx_says() {
        let whole = 31;
        assert_eq!(source(5, Shuffle::Butterfly, 1, whole), (4, true));
        assert_eq!(source(30, Shuffle::Down, 4, whole), (30, false));
        assert_eq!(source(3, Shuffle::Down, 4, whole), (7, true));
        assert_eq!(source(3, Shuffle::Up, 4, 0), (3, false));
        assert_eq!(source(9, Shuffle::Up, 4, 0), (5, true));
        assert_eq!(source(9, Shuffle::Index, 2, whole), (2, true));
        // Segments of eight lanes.
        let eights = (0x18 << 8) | 31;
        assert_eq!(source(9, Shuffle::Index, 2, eights), (10, true));
        assert_eq!(source(14, Shuffle::Down, 4, eights), (14, false));
    }
}
