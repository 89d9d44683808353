//! Products of bf16 by the matrix tiles of a processor: Intel's Advanced Matrix Extensions, AMX.
//!
//! A tile is 16 rows of 64 bytes. `tdpbf16ps` multiplies a tile of 16 rows of 32 elements by one that holds
//! 16 columns of 32 elements, which lie in it as 16 rows of pairs, and adds to a tile of 16 × 16 sums in f32
//! (*Intel 64 and IA-32 Architectures Software Developer's Manual*, volume 2, TDPBF16PS). Subnormal numbers
//! count as zero. Rust has no stable intrinsics for tiles, so the instructions are written out.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::{Factor, Vectors};

/// Vectors of a panel: those of two tiles.
pub(super) const PANEL: usize = 32;
/// Elements of each vector that one tile holds.
const DEPTH: usize = 32;
/// Vectors that one tile holds.
const SIDE: usize = 16;
/// Elements of a tile in bf16.
const TILE: usize = SIDE * DEPTH;

/// How elements lie in a tile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Vector after vector, as the first factor needs them.
    Vectors,
    /// Pairs of elements after pairs, each of all vectors, as the second factor needs them.
    Pairs,
}

/// The tiles of this processor, which the system lets this process use.
#[derive(Clone, Copy)]
pub(crate) struct Tiles(());

impl Tiles {
    /// The tiles, where there are any.
    pub(crate) fn find() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(|| has_tiles() && may_use_tiles()).then_some(Tiles(()))
    }

    /// Elements of a panel whose vectors have `depth` elements.
    pub(super) fn panel_elements(self, depth: usize) -> usize {
        depth.div_ceil(DEPTH) * 2 * TILE
    }

    /// Packs up to [`PANEL`] vectors: for each 32 of their elements a tile of the first 16 vectors and one of
    /// the others, zeros where there is nothing.
    pub(super) fn pack<T: Factor>(self, vectors: Vectors<'_, T>, order: Order, panel: &mut [u16]) {
        let (tiles, _) = panel.as_chunks_mut::<TILE>();
        for (number, tile) in tiles.iter_mut().enumerate() {
            let part = vectors.part(number % 2 * SIDE, SIDE).slice(number / 2 * DEPTH, DEPTH);
            // SAFETY: there are tiles only where AVX-512F and AVX-512BW were found, too.
            unsafe { pack_tile(part, order, tile) };
        }
    }

    /// Multiplies panels of one depth, `a` in the order of vectors and `b` in that of pairs: row-major sums.
    pub(super) fn multiply(self, a: &[u16], b: &[u16], sums: &mut Sums) {
        let steps = a.len() / (2 * TILE);
        assert!(a.len() == b.len() && a.len() == steps * 2 * TILE, "panels of different depths");
        if steps == 0 {
            sums.0.fill(0.0);
            return;
        }
        // SAFETY: the processor has tiles and the system lets them be used, or there would be no `Tiles`.
        // Both panels hold `steps` times two tiles of 1024 bytes, and the sums are 32 rows of 128 bytes.
        unsafe {
            asm!(
                "ldtilecfg [{shape}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm6, [{b} + {row}]",
                "tileloadd tmm7, [{b} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "add {row}, {row}",
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 64], tmm1",
                "tilestored [{sums} + {row} + 2048], tmm2",
                "tilestored [{sums} + {row} + 2112], tmm3",
                "tilerelease",
                shape = in(reg) &SHAPE,
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.0.as_mut_ptr(),
                row = inout(reg) 64usize => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// The sums of two panels: 32 rows of 32.
#[repr(C, align(64))]
pub(super) struct Sums([f32; PANEL * PANEL]);

impl Sums {
    /// Zeros.
    pub(super) fn new() -> Self {
        Sums([0.0; PANEL * PANEL])
    }

    /// Row after row.
    pub(super) fn as_slice(&self) -> &[f32] {
        &self.0
    }
}

/// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPE: Shape = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        row_bytes[tile] = 64;
        rows[tile] = SIDE as u8;
        tile += 1;
    }
    Shape { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Whether the processor has tiles for bf16, and the system keeps them when threads take turns.
fn has_tiles() -> bool {
    const OS_KEEPS_STATE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_STATE: u64 = 0b11 << 17;
    let has_vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    if !has_vectors || !is_x86_feature_detected!("xsave") {
        return false;
    }
    let keeps_state = __cpuid(1).ecx & OS_KEEPS_STATE != 0;
    let has_instructions =
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE;
    // SAFETY: the processor has XSAVE, and the system has turned it on.
    keeps_state && has_instructions && unsafe { _xgetbv(0) } & TILE_STATE == TILE_STATE
}

/// Asks Linux for the use of tiles, whose state is too large for it to keep for everybody (its documentation:
/// *Using XSTATE features in user space applications*). The answer is for all threads.
fn may_use_tiles() -> bool {
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: this request takes two numbers and no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

/// Packs up to 16 vectors of up to 32 elements.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_tile<T: Factor>(vectors: Vectors<'_, T>, order: Order, tile: &mut [u16; TILE]) {
    let natural = match vectors.lie_whole() {
        true => Order::Vectors,
        false => Order::Pairs,
    };
    let is_whole = vectors.count() == SIDE && vectors.depth() == DEPTH;
    if !is_whole {
        tile.fill(0);
    }
    match natural {
        Order::Vectors => {
            for (number, row) in tile.as_chunks_mut::<DEPTH>().0.iter_mut().enumerate().take(vectors.count())
            {
                row.iter_mut().zip(vectors.run(number)).for_each(|(to, from)| *to = from.bits());
            }
        }
        Order::Pairs => {
            for (pair, row) in tile.as_chunks_mut::<DEPTH>().0.iter_mut().enumerate() {
                for second in 0..2 {
                    if 2 * pair + second < vectors.depth() {
                        let run = vectors.run(2 * pair + second);
                        row.iter_mut()
                            .skip(second)
                            .step_by(2)
                            .zip(run)
                            .for_each(|(to, from)| *to = from.bits());
                    }
                }
            }
        }
    }
    if natural != order {
        transpose(tile);
    }
}

/// Exchanges vectors and pairs: rows and columns of 16 × 16 pairs. Pairs change places between rows that are
/// 1, 2, 4 and 8 apart.
#[target_feature(enable = "avx512f")]
fn transpose(tile: &mut [u16; TILE]) {
    let tile = tile.as_mut_ptr();
    // SAFETY: the tile has 16 rows of 64 bytes.
    let rows: [__m512i; SIDE] =
        std::array::from_fn(|row| unsafe { _mm512_loadu_si512(tile.add(row * DEPTH).cast()) });
    let mut pairs = rows;
    for at in 0..SIDE / 2 {
        pairs[2 * at] = _mm512_unpacklo_epi32(rows[2 * at], rows[2 * at + 1]);
        pairs[2 * at + 1] = _mm512_unpackhi_epi32(rows[2 * at], rows[2 * at + 1]);
    }
    let mut fours = pairs;
    for at in 0..SIDE / 4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| pairs[4 * at + row]);
        fours[4 * at] = _mm512_unpacklo_epi64(a, c);
        fours[4 * at + 1] = _mm512_unpackhi_epi64(a, c);
        fours[4 * at + 2] = _mm512_unpacklo_epi64(b, d);
        fours[4 * at + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // `fours[4·g + j]` holds, in its quarter q, column 4·q + j of rows 4·g to 4·g + 3.
    for column in 0..SIDE / 4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|group| fours[4 * group + column]);
        let (even_low, odd_low) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_high, odd_high) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        let columns = [
            _mm512_shuffle_i32x4::<0x88>(even_low, even_high),
            _mm512_shuffle_i32x4::<0x88>(odd_low, odd_high),
            _mm512_shuffle_i32x4::<0xdd>(even_low, even_high),
            _mm512_shuffle_i32x4::<0xdd>(odd_low, odd_high),
        ];
        for (quarter, values) in columns.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(tile.add((4 * quarter + column) * DEPTH).cast(), values) };
        }
    }
}
