//! What products of matrices in f32 are made of.

use std::cell::Cell;

/// What an operation on the CPU multiplies matrices of f32 by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Products {
    /// Products of f32.
    #[default]
    F32,
    /// Both factors are rounded to bf16, which have 8 of 24 bits of mantissa, and their products summed in
    /// f32, by the matrix tiles of the processor. All else stays f32.
    Bf16,
}

impl Products {
    /// Whether this processor makes such products by instructions of its own, and the system lets it.
    pub fn is_native(self) -> bool {
        match self {
            Self::F32 => true,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Bf16 => super::matrix::has_tiles(),
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            Self::Bf16 => false,
        }
    }
}

thread_local! {
    static PRODUCTS: Cell<Products> = const { Cell::new(Products::F32) };
}

/// Runs `run` with linear layers and losses of a linear layer that make such products, where they are
/// [native](Products::is_native), and their backwards. Attention, whose products are small, stays with f32.
pub fn with_products<T>(products: Products, run: impl FnOnce() -> T) -> T {
    /// Puts back what was before, also where `run` panics.
    struct Before(Products);
    impl Drop for Before {
        fn drop(&mut self) {
            PRODUCTS.set(self.0);
        }
    }
    let _before = Before(PRODUCTS.replace(products));
    run()
}

/// What products of f32 are made of on this thread.
pub(super) fn products() -> Products {
    PRODUCTS.get()
}
