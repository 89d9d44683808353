//! Conversions between f32 and the 16-bit types, round to nearest even.

use crate::error::same_length;
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::{Path, on_paths};
use crate::{Element, Error, Pool};

on_paths! {
    fn narrow_chunk[E: Element](from: &[f32], to: &mut [E]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = E::narrow(from);
        }
    }
    fn widen_chunk[E: Element](from: &[E], to: &mut [f32]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }
}

/// Rounds every element of `from` into `to`.
///
/// # Errors
/// [`Error::Length`] if the lengths differ.
pub fn narrow<E: Element>(pool: &Pool, from: &[f32], to: &mut [E]) -> Result<(), Error> {
    same_length("the target", to.len(), from.len())?;
    let chunks = from.chunks(CHUNK_ELEMENTS).zip(to.chunks_mut(CHUNK_ELEMENTS)).collect();
    pool.map(chunks, |(from, to)| narrow_chunk(Path::best(), from, to));
    Ok(())
}

/// Widens every element of `from` into `to`, exactly.
///
/// # Errors
/// [`Error::Length`] if the lengths differ.
pub fn widen<E: Element>(pool: &Pool, from: &[E], to: &mut [f32]) -> Result<(), Error> {
    same_length("the target", to.len(), from.len())?;
    let chunks = from.chunks(CHUNK_ELEMENTS).zip(to.chunks_mut(CHUNK_ELEMENTS)).collect();
    pool.map(chunks, |(from, to)| widen_chunk(Path::best(), from, to));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn all_paths_agree<E: Element + PartialEq + std::fmt::Debug>() {
        let values: Vec<f32> = (0..1003u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).collect();
        let finite: Vec<f32> = values.into_iter().filter(|value| !value.is_nan()).collect();
        let mut expected = vec![E::narrow(0.0); finite.len()];
        let portable = Path::available()[Path::available().len() - 1];
        narrow_chunk(portable, &finite, &mut expected);
        for path in Path::available() {
            let mut found = vec![E::narrow(0.0); finite.len()];
            narrow_chunk(path, &finite, &mut found);
            assert_eq!(found, expected, "{path:?}");
            let (mut wide, mut wide_expected) = (vec![0.0; finite.len()], vec![0.0; finite.len()]);
            widen_chunk(path, &found, &mut wide);
            widen_chunk(portable, &found, &mut wide_expected);
            assert_eq!(wide, wide_expected, "{path:?}");
        }
    }

    #[test]
    fn all_paths_give_the_same_bits() {
        all_paths_agree::<bf16>();
        all_paths_agree::<f16>();
    }

    #[test]
    fn lengths_must_match() {
        let pool = Pool::new(1).unwrap();
        assert!(narrow(&pool, &[1.0], &mut [bf16::ZERO; 2]).is_err());
        assert!(widen(&pool, &[bf16::ONE; 3], &mut [0.0; 2]).is_err());
    }
}
