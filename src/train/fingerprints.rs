//! Hashes of the inputs of a run: a resume with a changed base or changed data is rejected.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::TrainError;
use super::run_dir::Fingerprint;

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names, lengths and both ends of the files of a base, an adapter or a model: whole files of many gigabytes would take
/// longer to hash than to train a step on.
pub(super) fn base_fingerprint(base: &Path) -> Result<String, TrainError> {
    use std::io::{Read, Seek, SeekFrom};
    const END: u64 = 1 << 20;
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| TrainError::Io { path, source }
    };
    let mut files = vec![base.to_path_buf()];
    if base.is_dir() {
        let entries = std::fs::read_dir(base).map_err(io(base))?;
        let entries = entries.map(|entry| entry.map(|e| e.path()));
        files = entries.collect::<Result<_, _>>().map_err(io(base))?;
        files.retain(|path| path.extension().is_some_and(|e| e == "safetensors" || e == "json"));
        files.sort();
    }
    let mut hasher = Sha256::new();
    for path in files {
        let mut hash_ends = || -> std::io::Result<()> {
            let mut file = std::fs::File::open(&path)?;
            let length = file.metadata()?.len();
            hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            hasher.update(length.to_le_bytes());
            let mut bytes = Vec::new();
            file.by_ref().take(END).read_to_end(&mut bytes)?;
            file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
            file.take(END).read_to_end(&mut bytes)?;
            hasher.update(&bytes);
            Ok(())
        };
        hash_ends().map_err(io(&path))?;
    }
    Ok(hex(hasher))
}

/// The hashes of files and folders, with their descriptions.
pub(super) fn fingerprints_of(
    files: Vec<(String, PathBuf)>,
) -> Result<Vec<Fingerprint>, TrainError> {
    let fingerprint = |(what, path): (String, PathBuf)| Ok((what, base_fingerprint(&path)?));
    files.into_iter().map(fingerprint).collect()
}

/// Fails if an input has changed since the run started.
pub(super) fn same_fingerprints(
    run: &Path,
    saved: &[Fingerprint],
    now: &[Fingerprint],
) -> Result<(), TrainError> {
    let changed = saved.iter().filter(|print| !now.contains(print));
    let changed: Vec<&str> = changed.map(|(name, _)| name.as_str()).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let what = format!("{} changed since the run began", changed.join(" and "));
    Err(TrainError::Changed { path: run.into(), what })
}
