//! Which instructions the CPU kernels use, found out at run time: a plain build runs everywhere and
//! is fast where it can be.
//!
//! Kernels written in plain Rust are compiled once per rung by [`multiversion!`] and left to the
//! vectorizer; those with intrinsics are written per rung. Either way the rung is chosen once per
//! call, never inside a loop.

use std::sync::OnceLock;

/// A rung of the ladder, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target promises: SSE2 on x86-64, NEON on 64-bit ARM.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI's 256-bit integer dot products.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl Isa {
    /// Every rung, slowest first.
    pub const ALL: &[Self] = &[Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni];

    /// The environment variable that holds the kernels to a lower rung, so that one machine can
    /// test several: `scalar`, `avx2`, `avxvnni` or `avx512vnni`.
    pub const VARIABLE: &str = "QUANTUNE_ISA";

    /// The rung this process runs on: the highest this CPU has, or the one that
    /// [`Self::VARIABLE`] names.
    ///
    /// # Panics
    /// If the variable names no rung, or one that this CPU does not have.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| match std::env::var(Self::VARIABLE) {
            Ok(name) => Self::named(&name).unwrap_or_else(|fault| panic!("{fault}")),
            Err(_) => *Self::ALL.iter().rfind(|isa| isa.available()).expect("scalar always is"),
        })
    }

    /// The rung called `name`, if this CPU has it; else what is wrong.
    pub fn named(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
        let fault = |what: &str| format!("{}={name}: {what} ({})", Self::VARIABLE, known());
        let isa = Self::ALL.iter().find(|isa| isa.name() == name);
        let isa = isa.ok_or_else(|| fault("no such rung"))?;
        isa.available().then_some(*isa).ok_or_else(|| fault("this CPU does not have it"))
    }

    /// What it is called in `--json` and in [`Self::VARIABLE`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512Vnni => "avx512vnni",
        }
    }

    /// Whether this CPU has it.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
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
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Scalar
        }
    }
}

/// Compiles a function in plain Rust once per rung, and dispatches on its first argument.
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
                use $crate::isa::Isa;
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match isa {
                    Isa::Scalar => body($($arg),*),
                    // SAFETY: a rung is only ever chosen if the CPU has it.
                    Isa::Avx2 | Isa::AvxVnni => unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx512Vnni => unsafe { avx512($($arg),*) },
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
    fn rungs_have_names_and_faults_are_told() {
        for &isa in Isa::ALL {
            match Isa::named(isa.name()) {
                Ok(named) => assert_eq!(named, isa),
                Err(fault) => assert!(!isa.available() && fault.contains("does not have it")),
            }
        }
        assert!(Isa::named("avx10").unwrap_err().contains("avx512vnni"));
        assert!(Isa::current().available());
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
    fn every_rung_of_this_machine_runs() {
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            let mut y = [0.0; 3];
            assert_eq!(twice(isa, &[1.0, 2.0, 3.0], &mut y), 3);
            assert_eq!(y, [2.0, 4.0, 6.0]);
        }
    }
}
