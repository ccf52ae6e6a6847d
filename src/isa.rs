//! The instruction sets that the CPU kernels use, detected at run time: one build runs everywhere
//! and uses what the CPU supports.
//!
//! Portable kernels are compiled once per ISA level by `multiversion!` and are auto-vectorized;
//! kernels with intrinsics are written per level. Either way the level is matched once
//! per call, never inside a loop.
//!
//! An [`Isa`] is a proof: its constructors detect the CPU's features, so that a safe function that takes
//! one may call `target_feature` code of its level.

use std::sync::OnceLock;

/// The ISA levels that kernels are compiled for, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IsaLevel {
    /// The baseline of the target: SSE2 on x86-64, NEON on 64-bit ARM.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// [`Self::Avx2`] and AVX-VNNI's 256-bit integer dot products.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl IsaLevel {
    /// Every level, slowest first.
    pub const ALL: &[Self] = &[Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni];

    /// The name in `--json` and in [`Isa::VARIABLE`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512Vnni => "avx512vnni",
        }
    }

    /// The level on this CPU, or `None` if it lacks one of the level's features.
    pub fn detect(self) -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        let detected = {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            };
            match self {
                Self::Scalar => true,
                Self::Avx2 => avx2(),
                Self::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
                Self::Avx512Vnni => {
                    avx2()
                        && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512vnni")
                }
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        let detected = self == Self::Scalar;
        detected.then_some(Isa(self))
    }
}

/// An ISA level that was detected on this CPU. It cannot be constructed in any other way, so that code
/// that has one may use the features of its level, and those of `Avx2` on every level above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(IsaLevel);

impl Isa {
    /// The environment variable that lowers the level, so that one machine can test several: `scalar`,
    /// `avx2`, `avxvnni` or `avx512vnni`.
    pub const VARIABLE: &str = "QUANTUNE_ISA";

    /// The baseline of the target, which every CPU has.
    pub const SCALAR: Self = Self(IsaLevel::Scalar);

    /// The highest level of this CPU.
    pub fn detect() -> Self {
        Self::at_most(IsaLevel::Avx512Vnni)
    }

    /// The highest level of this CPU that is not above `level`.
    pub fn at_most(level: IsaLevel) -> Self {
        Self::available().filter(|isa| isa.0 <= level).last().unwrap_or(Self::SCALAR)
    }

    /// Every level of this CPU, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        IsaLevel::ALL.iter().filter_map(|level| level.detect())
    }

    /// The level this process runs on: the one that [`Self::VARIABLE`] names, else the highest.
    ///
    /// # Panics
    /// If the variable names an unknown level, or one that this CPU does not support.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| match std::env::var(Self::VARIABLE) {
            Ok(name) => Self::named(&name).unwrap_or_else(|fault| panic!("{fault}")),
            Err(_) => Self::detect(),
        })
    }

    /// The level called `name`, or an error if it is unknown or this CPU does not support it.
    pub fn named(name: &str) -> Result<Self, String> {
        let known =
            || IsaLevel::ALL.iter().map(|level| level.name()).collect::<Vec<_>>().join(", ");
        let fault = |what: &str| format!("{}={name}: {what} ({})", Self::VARIABLE, known());
        let level = IsaLevel::ALL.iter().find(|level| level.name() == name);
        let level = level.ok_or_else(|| fault("unknown ISA level"))?;
        level.detect().ok_or_else(|| fault("this CPU does not support it"))
    }

    /// The level.
    pub fn level(self) -> IsaLevel {
        self.0
    }

    /// The name in `--json` and in [`Self::VARIABLE`].
    pub fn name(self) -> &'static str {
        self.0.name()
    }
}

/// Compiles a function in plain Rust once per ISA level, and dispatches on its first argument.
///
/// `fn name(isa; arguments) -> result { body }` becomes `fn name(isa: Isa, arguments) -> result`.
/// What the body calls must be `#[inline(always)]` to be compiled with it.
macro_rules! multiversion {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident(isa; $($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::isa::IsaLevel;
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match isa.level() {
                    IsaLevel::Scalar => body($($arg),*),
                    // SAFETY: `isa` proves that the CPU supports AVX2, FMA and F16C.
                    IsaLevel::Avx2 | IsaLevel::AvxVnni => unsafe { avx2($($arg),*) },
                    // SAFETY: `isa` proves that the CPU supports these and AVX-512 F, BW, DQ and VL.
                    IsaLevel::Avx512Vnni => unsafe { avx512($($arg),*) },
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = isa;
                body($($arg),*)
            }
        }
    )*};
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_found_by_name_or_rejected() {
        for level in IsaLevel::ALL {
            match Isa::named(level.name()) {
                Ok(named) => assert_eq!(named.level(), *level),
                Err(fault) => {
                    assert!(level.detect().is_none() && fault.contains("does not support it"));
                }
            }
        }
        assert!(Isa::named("avx10").unwrap_err().contains("avx512vnni"));
    }

    #[test]
    fn lowered_levels_are_levels_of_this_cpu() {
        let available: Vec<Isa> = Isa::available().collect();
        assert_eq!(available[0], Isa::SCALAR);
        assert_eq!(available.last(), Some(&Isa::detect()));
        assert!(available.contains(&Isa::current()));
        for &level in IsaLevel::ALL {
            let isa = Isa::at_most(level);
            assert!(available.contains(&isa) && isa.level() <= level);
        }
    }

    multiversion! {
        fn twice(isa; x: &[f32], y: &mut [f32]) -> usize {
            for (y, x) in y.iter_mut().zip(x) {
                *y = 2.0 * x;
            }
            x.len()
        }
    }

    #[test]
    fn every_level_of_this_cpu_runs() {
        for isa in Isa::available() {
            let mut y = [0.0; 3];
            assert_eq!(twice(isa, &[1.0, 2.0, 3.0], &mut y), 3);
            assert_eq!(y, [2.0, 4.0, 6.0]);
        }
    }
}
