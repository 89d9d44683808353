//! Loops compiled for several instruction sets, one of which is chosen when the program runs.
//!
//! The loops are plain Rust without fused multiply-add, so every path gives the same bits.

/// An instruction set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction set that this machine was found to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path(Kind);

impl Path {
    /// All paths that this machine can take, the widest first.
    pub fn available() -> Vec<Self> {
        let mut paths = vec![];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            if is_x86_feature_detected!("avx512f") {
                paths.push(Self(Kind::Avx512));
            }
            paths.push(Self(Kind::Avx2));
        }
        paths.push(Self(Kind::Portable));
        paths
    }

    /// The widest path.
    pub fn best() -> Self {
        Self::available()[0]
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

/// Defines functions whose first argument is the [`Path`] that their body runs on.
macro_rules! on_paths {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident$([$generic:ident: $bound:ident])?($($argument:ident: $type:ty),* $(,)?)
        $(-> $result:ty)?
        $body:block
    )*) => {$(
        $(#[$attribute])*
        pub(crate) fn $name$(<$generic: $bound>)?(
            path: crate::simd::Path, $($argument: $type),*
        ) $(-> $result)? {
            #[inline(always)]
            fn body$(<$generic: $bound>)?($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2$(<$generic: $bound>)?($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2")]
            fn avx512$(<$generic: $bound>)?($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }
            match path.kind() {
                crate::simd::Kind::Portable => body($($argument),*),
                // SAFETY: a path of this kind is only made where the processor has AVX2.
                #[cfg(target_arch = "x86_64")]
                crate::simd::Kind::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: a path of this kind is only made where the processor has AVX-512F and AVX2.
                #[cfg(target_arch = "x86_64")]
                crate::simd::Kind::Avx512 => unsafe { avx512($($argument),*) },
            }
        }
    )*};
}
pub(crate) use on_paths;
