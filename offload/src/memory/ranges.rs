//! Free ranges of addresses: which of them have pages, and where a block of so many bytes is best put.
//!
//! Neighbours that are alike are one range, so a step that frees and allocates in the order of the one before
//! finds the places of the one before, whatever sizes were there in between.

/// Most free ranges at once. There are at most as many as blocks in use, and one for each mapping.
const MOST: usize = 16 << 10;

/// Free ranges, in the order of their addresses. Neither allocates nor panics, so that an allocator can use
/// it.
pub struct Ranges {
    ranges: [Range; MOST],
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: usize,
    end: usize,
    /// Whether its pages are kept; otherwise it has none, and reads as zero.
    is_kept: bool,
}

impl Range {
    const NONE: Self = Self { start: 0, end: 0, is_kept: false };

    fn bytes(self) -> usize {
        self.end - self.start
    }
}

/// Where a block has its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub start: usize,
    /// How many of its bytes were kept. Those and what is not are in any order.
    pub kept_bytes: usize,
}

impl Ranges {
    pub const fn new() -> Self {
        Self { ranges: [Range::NONE; MOST], len: 0 }
    }

    fn free(&self) -> &[Range] {
        self.ranges.get(..self.len).unwrap_or_default()
    }

    /// Takes a place for `bytes`: of kept ranges that are large enough the smallest, else where most of it is
    /// kept. None: no neighbours together are so large.
    pub fn take(&mut self, bytes: usize) -> Option<Place> {
        let fitting = self.free().iter().filter(|range| range.is_kept && range.bytes() >= bytes);
        let place = match fitting.min_by_key(|range| range.bytes()) {
            Some(range) => Place { start: range.start, kept_bytes: bytes },
            None => self.mostly_kept(bytes)?,
        };
        self.remove(place.start, place.start + bytes);
        Some(place)
    }

    /// Of the places that begin or end where a kept range does, or where neighbours begin, the one of which
    /// most is kept.
    fn mostly_kept(&self, bytes: usize) -> Option<Place> {
        let mut best: Option<Place> = None;
        for neighbours in self.free().chunk_by(|one, next| one.end == next.start) {
            let (Some(first), Some(last)) = (neighbours.first(), neighbours.last()) else { continue };
            let Some(latest) = last.end.checked_sub(bytes).filter(|&latest| latest >= first.start) else {
                continue;
            };
            let kept = || neighbours.iter().filter(|range| range.is_kept);
            let beginning = kept().map(|range| range.start.min(latest));
            let ending = kept().map(|range| range.end.saturating_sub(bytes).max(first.start));
            for start in std::iter::once(first.start).chain(beginning).chain(ending) {
                let end = start + bytes;
                let within = |range: &Range| range.end.min(end).saturating_sub(range.start.max(start));
                let kept_bytes = kept().map(within).sum();
                if best.is_none_or(|best| kept_bytes > best.kept_bytes) {
                    best = Some(Place { start, kept_bytes });
                }
            }
        }
        best
    }

    /// Takes a place out of the ranges that it touches. It does not lie in the middle of one: it begins where
    /// one begins, or ends where one ends.
    fn remove(&mut self, start: usize, end: usize) {
        let touched = |range: &&Range| range.start < end && range.end > start;
        let first = self.free().partition_point(|range| range.end <= start);
        let count = self.free().iter().skip(first).take_while(touched).count();
        let Some(touched) = self.ranges.get_mut(first..first + count) else { return };
        let mut left = 0;
        if let Some(range) = touched.first_mut().filter(|range| range.start < start) {
            range.end = start;
            left = 1;
        }
        let mut right = 0;
        if let Some(range) =
            touched.get_mut(left..).and_then(|rest| rest.last_mut()).filter(|range| range.end > end)
        {
            range.start = end;
            right = 1;
        }
        self.close(first + left, count.saturating_sub(left + right));
    }

    /// Takes `count` ranges out of the table.
    fn close(&mut self, first: usize, count: usize) {
        self.ranges.copy_within(first + count..self.len, first);
        self.len -= count;
    }

    /// Adds a free range. False where the table is full: it is then not added.
    #[must_use]
    pub fn give(&mut self, start: usize, bytes: usize, is_kept: bool) -> bool {
        let end = start + bytes;
        let next = self.free().partition_point(|range| range.start < start);
        let is_alike = |range: &Range| range.is_kept == is_kept;
        let before = next.checked_sub(1).filter(|&before| {
            self.free().get(before).is_some_and(|range| is_alike(range) && range.end == start)
        });
        let joins_next = self.free().get(next).is_some_and(|range| is_alike(range) && range.start == end);
        match (before, joins_next) {
            (Some(before), true) => {
                self.ranges[before].end = self.ranges[next].end;
                self.close(next, 1);
            }
            (Some(before), false) => self.ranges[before].end = end,
            (None, true) => self.ranges[next].start = start,
            (None, false) if self.len == MOST => return false,
            (None, false) => {
                self.ranges.copy_within(next..self.len, next + 1);
                self.ranges[next] = Range { start, end, is_kept };
                self.len += 1;
            }
        }
        true
    }

    /// Takes the end of the largest kept range, at most `bytes`: its first byte, and how many there are.
    pub fn take_kept(&mut self, bytes: usize) -> Option<(usize, usize)> {
        let kept = self.free().iter().filter(|range| range.is_kept);
        let Range { start, end, .. } = *kept.max_by_key(|range| range.bytes())?;
        let start = start.max(end.saturating_sub(bytes));
        self.remove(start, end);
        Some((start, end - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(given: &[(usize, usize, bool)]) -> Box<Ranges> {
        let mut ranges = Box::new(Ranges::new());
        for &(start, bytes, is_kept) in given {
            assert!(ranges.give(start, bytes, is_kept));
        }
        ranges
    }

    fn left(ranges: &Ranges) -> Vec<(usize, usize, bool)> {
        ranges.free().iter().map(|range| (range.start, range.bytes(), range.is_kept)).collect()
    }

    #[test]
    fn neighbours_that_are_alike_are_one() {
        let ranges = of(&[(10, 5, true), (20, 5, true), (15, 5, true), (25, 5, false), (5, 5, false)]);
        assert_eq!(left(&ranges), [(5, 5, false), (10, 15, true), (25, 5, false)]);
    }

    #[test]
    fn the_smallest_kept_range_that_is_large_enough_is_taken() {
        let mut ranges = of(&[(0, 50, true), (100, 20, true), (200, 10, true), (300, 1000, false)]);
        assert_eq!(ranges.take(15), Some(Place { start: 100, kept_bytes: 15 }));
        assert_eq!(left(&ranges), [(0, 50, true), (115, 5, true), (200, 10, true), (300, 1000, false)]);
    }

    #[test]
    fn otherwise_the_place_of_which_most_is_kept() {
        // Between ranges in use, two kept ones with a gap between them: both are used, and the gap.
        let mut ranges =
            of(&[(0, 10, true), (10, 5, false), (15, 8, true), (23, 100, false), (200, 12, true)]);
        assert_eq!(ranges.take(23), Some(Place { start: 0, kept_bytes: 18 }));
        assert_eq!(left(&ranges), [(23, 100, false), (200, 12, true)]);
        // One that is too small goes on into what has no pages, on either side.
        let mut ranges = of(&[(0, 100, false), (100, 10, true)]);
        assert_eq!(ranges.take(30), Some(Place { start: 80, kept_bytes: 10 }));
        assert_eq!(left(&ranges), [(0, 80, false)]);
        assert_eq!(ranges.take(81), None);
    }

    #[test]
    fn what_is_given_back_is_the_end_of_the_largest() {
        let mut ranges = of(&[(0, 10, true), (100, 40, true), (300, 80, false)]);
        assert_eq!(ranges.take_kept(15), Some((125, 15)));
        assert_eq!(ranges.take_kept(100), Some((100, 25)));
        assert_eq!(ranges.take_kept(100), Some((0, 10)));
        assert_eq!(ranges.take_kept(100), None);
    }

    #[test]
    fn a_full_table_takes_only_what_joins_a_neighbour() {
        let mut ranges = Box::new(Ranges::new());
        assert!((0..MOST).all(|place| ranges.give(3 * place, 1, true)));
        assert!(!ranges.give(3 * MOST, 1, true));
        assert!(ranges.give(1, 1, true));
        assert_eq!(ranges.take(2), Some(Place { start: 0, kept_bytes: 2 }));
        assert!(ranges.give(3 * MOST, 1, true));
    }

    /// What each address of a small space is.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Address {
        InUse,
        Kept,
        Void,
    }

    proptest! {
        #[test]
        fn every_address_is_in_use_or_kept_or_void_and_in_one_range(
            actions in prop::collection::vec((0_u8..4, 1_usize..40, any::<prop::sample::Index>()), 1..200),
        ) {
            const SPACE: usize = 256;
            let mut addresses = [Address::Void; SPACE];
            let mut ranges = of(&[(0, SPACE, false)]);
            let mut blocks: Vec<(usize, usize)> = vec![];
            for (action, bytes, which) in actions {
                match action {
                    0 | 1 => {
                        let Some(Place { start, kept_bytes }) = ranges.take(bytes) else {
                            let free = addresses.split(|address| *address == Address::InUse);
                            let longest = free.map(<[_]>::len).max();
                            prop_assert!(longest < Some(bytes));
                            continue;
                        };
                        let taken = &mut addresses[start..start + bytes];
                        prop_assert!(!taken.contains(&Address::InUse));
                        let kept = taken.iter().filter(|address| **address == Address::Kept);
                        prop_assert_eq!(kept.count(), kept_bytes);
                        taken.fill(Address::InUse);
                        blocks.push((start, bytes));
                    }
                    2 if !blocks.is_empty() => {
                        let (start, bytes) = blocks.swap_remove(which.index(blocks.len()));
                        let is_kept = bytes % 3 > 0;
                        prop_assert!(ranges.give(start, bytes, is_kept));
                        let state = if is_kept { Address::Kept } else { Address::Void };
                        addresses[start..start + bytes].fill(state);
                    }
                    _ => {
                        let kept = ranges.take_kept(bytes);
                        prop_assert_eq!(kept.is_some(), addresses.contains(&Address::Kept));
                        if let Some((start, bytes)) = kept {
                            let given = &addresses[start..start + bytes];
                            prop_assert!(given.iter().all(|address| *address == Address::Kept));
                            addresses[start..start + bytes].fill(Address::Void);
                            prop_assert!(ranges.give(start, bytes, false));
                        }
                    }
                }
                let mut of_ranges = [Address::InUse; SPACE];
                for (start, bytes, is_kept) in left(&ranges) {
                    let unseen = &of_ranges[start..start + bytes];
                    prop_assert!(unseen.iter().all(|address| *address == Address::InUse));
                    of_ranges[start..start + bytes].fill(if is_kept { Address::Kept } else { Address::Void });
                }
                prop_assert_eq!(of_ranges, addresses);
                let are_apart = |pair: &[Range]| {
                    pair[0].end < pair[1].start || pair[0].is_kept != pair[1].is_kept
                };
                prop_assert!(ranges.free().windows(2).all(are_apart));
            }
        }
    }
}
