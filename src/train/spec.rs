//! How settings are written that are more than a number or a path.

use std::path::{Path, PathBuf};

/// The parts of `PATH` or `PATH=WEIGHT`; a weight that is not given is 1.
///
/// # Errors
/// If the weight is not a finite number.
pub fn path_and_weight(text: &str) -> Result<(PathBuf, f64), String> {
    match text.rsplit_once('=').filter(|_| !Path::new(text).exists()) {
        Some((path, weight)) => match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() => Ok((path.into(), weight)),
            _ => Err(format!("weight {weight:?} is no number, needed PATH=WEIGHT")),
        },
        None => Ok((text.into(), 1.0)),
    }
}

/// Bytes of `600MB`, `1.5GiB`, or a plain number of bytes; `None` if the text is none of these.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let number: f64 = text[..unit].trim().parse().ok()?;
    let unit: f64 = match text[unit..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number * unit;
    (bytes.is_finite() && bytes >= 0.0).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        for (text, bytes) in [
            ("600MB", Some(600_000_000)),
            ("1.5GiB", Some(3 << 29)),
            ("2 gb", Some(2_000_000_000)),
            ("1048576", Some(1 << 20)),
            ("-1GB", None),
            ("many", None),
            ("3TB", None),
            ("", None),
        ] {
            assert_eq!(parse_bytes(text), bytes, "{text}");
        }
    }
}
