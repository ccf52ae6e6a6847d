//! Backend and precision in settings.

use serde::{Deserialize, Serialize};

use crate::ops::{BackendKind, Compute, DeviceName, Precision};

/// The value of `compute` that is another spelling of backend `reference`.
const PORTABLE: &str = "portable";

/// The value of `compute`: a precision, or `portable`. Settings read from a table hold a precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ComputeSetting {
    /// A precision of the backend.
    Precision(Precision),
    /// [`BackendKind::Reference`].
    Portable,
}

impl ComputeSetting {
    pub(super) fn on(self, backend: BackendKind) -> Compute {
        match self {
            Self::Precision(precision) => Compute { backend, precision },
            Self::Portable => Compute::REFERENCE,
        }
    }
}

impl TryFrom<String> for ComputeSetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for ComputeSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == PORTABLE {
            return Ok(Self::Portable);
        }
        let precision = text.parse().map(Self::Precision);
        precision.map_err(|fault| format!("{fault} or {PORTABLE}"))
    }
}

impl From<ComputeSetting> for String {
    fn from(flag: ComputeSetting) -> Self {
        match flag {
            ComputeSetting::Precision(precision) => precision.to_string(),
            ComputeSetting::Portable => PORTABLE.into(),
        }
    }
}

/// Resolves backend and precision on `device` from the given settings.
///
/// # Errors
/// If `compute` is portable and the backend is not reference.
pub fn resolve_compute(
    device: DeviceName,
    backend: Option<BackendKind>,
    compute: Option<ComputeSetting>,
) -> Result<Compute, String> {
    let backend = match (backend, compute) {
        (Some(backend), Some(ComputeSetting::Portable)) if backend != BackendKind::Reference => {
            return Err(format!(
                "compute is {PORTABLE}, which is backend reference, and backend is {backend}"
            ));
        }
        (_, Some(ComputeSetting::Portable)) => BackendKind::Reference,
        (backend, _) => backend.unwrap_or(device.default_backend()),
    };
    let precision = match compute {
        Some(ComputeSetting::Precision(precision)) => precision,
        Some(ComputeSetting::Portable) | None => backend.default_precision(),
    };
    Ok(Compute { backend, precision })
}

/// Fills in backend and precision in a table of settings: the default of each depends on the other,
/// and both on the device. Values that do not parse are left for the caller to report.
pub(super) fn set_backend(table: &mut toml::Table) -> Result<(), String> {
    fn get<T: std::str::FromStr>(table: &toml::Table, key: &str) -> Result<Option<T>, ()> {
        let Some(value) = table.get(key) else { return Ok(None) };
        value.as_str().and_then(|text| text.parse().ok()).map(Some).ok_or(())
    }
    let given = (get::<DeviceName>(table, "device"), get(table, "backend"), get(table, "compute"));
    let (Ok(device), Ok(backend), Ok(compute)) = given else { return Ok(()) };
    if device.is_none() && backend.is_none() && compute.is_none() {
        return Ok(());
    }
    let keeps_default = compute.is_none();
    let compute = resolve_compute(device.unwrap_or_default(), backend, compute)?;
    table.insert("backend".into(), compute.backend.to_string().into());
    if !keeps_default || compute.backend != BackendKind::Cpu {
        table.insert("compute".into(), compute.precision.to_string().into());
    }
    Ok(())
}
