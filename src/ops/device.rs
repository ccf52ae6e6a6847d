//! Where the reference backend computes: the CPU, or a GPU that candle supports.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{BackendKind, Compute};

/// A device by its name on the command line: `cpu`, `cuda`, `cuda:N` or `metal`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceName {
    /// The CPU, the only one that [`BackendKind::Cpu`] computes on.
    #[default]
    Cpu,
    /// An NVIDIA GPU, counted from 0.
    Cuda(usize),
    /// The GPU of an Apple machine.
    Metal,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// This build does not support it.
    #[error(
        "device {device}: this build has no {feature} back end, needed one made by `cargo build \
         --release --features {feature}`"
    )]
    Feature {
        /// The requested device.
        device: DeviceName,
        /// The feature of the crate that it needs.
        feature: &'static str,
    },
    /// The device or its driver was not found.
    #[error("device {device} is not there: {reason}")]
    Absent {
        /// The requested device.
        device: DeviceName,
        /// The driver's error message.
        reason: String,
    },
    /// A backend or precision that only the CPU supports.
    #[error(
        "compute is {}, which only the CPU has: needed portable on device {device}",
        .compute.precision
    )]
    CpuOnly {
        /// The requested device.
        device: DeviceName,
        /// The requested backend and precision.
        compute: Compute,
    },
    /// A precision that the backend does not support.
    #[error(
        "compute is {}, which backend {} does not have: needed {}",
        .0.precision, .0.backend, .0.backend.default_precision()
    )]
    Precision(Compute),
}

impl DeviceName {
    /// The default backend on this device.
    pub fn default_backend(self) -> BackendKind {
        match self {
            Self::Cpu => BackendKind::Cpu,
            Self::Cuda(_) | Self::Metal => BackendKind::Reference,
        }
    }

    /// Checks that the device supports the backend, and the backend the precision.
    ///
    /// # Errors
    /// If not.
    pub fn check(self, compute: Compute) -> Result<(), DeviceError> {
        let on_cpu = self == Self::Cpu;
        if !on_cpu && compute != Compute::REFERENCE {
            return Err(DeviceError::CpuOnly { device: self, compute });
        }
        if !compute.backend.has(compute.precision) {
            return Err(DeviceError::Precision(compute));
        }
        Ok(())
    }

    /// Opens the device.
    ///
    /// # Errors
    /// If this build does not support the device, or it is not found.
    pub fn open(self) -> Result<Device, DeviceError> {
        let feature = |feature| DeviceError::Feature { device: self, feature };
        let found = match self {
            Self::Cpu => return Ok(Device::Cpu),
            Self::Cuda(_) if !cfg!(feature = "cuda") => return Err(feature("cuda")),
            Self::Metal if !cfg!(feature = "metal") => return Err(feature("metal")),
            Self::Cuda(index) => Device::new_cuda(index),
            Self::Metal => Device::new_metal(0),
        };
        found.map_err(|e| DeviceError::Absent { device: self, reason: e.to_string() })
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            None if text == "metal" => Ok(Self::Metal),
            Some(("cuda", index)) if index.bytes().all(|b| b.is_ascii_digit()) => {
                index.parse().map(Self::Cuda).map_err(|_| unknown(text))
            }
            _ => Err(unknown(text)),
        }
    }
}

fn unknown(text: &str) -> String {
    format!("{text:?} is not a device, needed cpu, cuda, cuda:N or metal")
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(device: DeviceName) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Precision;
    use super::*;

    #[test]
    fn names_are_read() {
        for (text, device) in [
            ("cpu", Some(DeviceName::Cpu)),
            ("cuda", Some(DeviceName::Cuda(0))),
            ("cuda:3", Some(DeviceName::Cuda(3))),
            ("metal", Some(DeviceName::Metal)),
            ("cuda:", None),
            ("cuda:+1", None),
            ("cuda:99999999999999999999", None),
            ("cpu:0", None),
            ("gpu", None),
            ("", None),
        ] {
            assert_eq!(text.parse().ok(), device, "{text:?}");
        }
        assert_eq!(DeviceName::Cuda(1).to_string().parse(), Ok(DeviceName::Cuda(1)));
    }

    #[test]
    fn the_cpu_backend_only_computes_on_the_cpu() {
        let check = |device: DeviceName, compute, fine| {
            assert_eq!(device.check(compute).is_ok(), fine, "{device} {compute:?}");
        };
        check(DeviceName::Cpu, Compute::INT16, true);
        check(DeviceName::Cpu, Compute::REFERENCE, true);
        check(DeviceName::Cuda(0), Compute::REFERENCE, true);
        check(DeviceName::Metal, Compute::F32, false);
        let coarse = Compute { backend: BackendKind::Reference, precision: Precision::Int8 };
        check(DeviceName::Cpu, coarse, false);
        let error = DeviceName::Cpu.check(coarse).unwrap_err().to_string();
        assert_eq!(error, "compute is int8, which backend reference does not have: needed f32");
        let error = DeviceName::Cuda(1).check(Compute::INT8).unwrap_err().to_string();
        assert_eq!(
            error,
            "compute is int8, which only the CPU has: needed portable on device cuda:1"
        );
    }

    /// Skipped for features that are compiled in, where the result depends on the machine.
    #[test]
    fn a_device_that_is_not_compiled_in_is_an_error() {
        assert!(DeviceName::Cpu.open().unwrap().is_cpu());
        for (device, feature, compiled) in [
            (DeviceName::Cuda(0), "cuda", cfg!(feature = "cuda")),
            (DeviceName::Metal, "metal", cfg!(feature = "metal")),
        ] {
            if !compiled {
                let error = device.open().unwrap_err().to_string();
                let command = format!("`cargo build --release --features {feature}`");
                assert!(error.contains(&command), "{error}");
            }
        }
    }
}
