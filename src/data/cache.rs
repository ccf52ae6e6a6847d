//! Folders of tokens that are made once and found again by a name that says all they depend on.
//!
//! A folder is written beside its place and renamed, so what is there is whole. Folders that are no
//! longer used are left alone, another run may have them mapped: to clear a cache, remove it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::slice::ParallelSliceMut;
use sha2::{Digest, Sha256};

use crate::quant::Bytes;
use crate::weights::map_file;

/// What the system refused: what was tried, where, and its words.
pub(super) type Refused = (&'static str, PathBuf, io::Error);

/// The folder `KIND-KEY` of `cache`, which `make` fills if there is none yet. Of each kind at most one
/// is left half made by a killed run: the next to make one removes it.
pub(super) fn folder<E: From<Refused>>(
    cache: &Path,
    (kind, key): (&str, &str),
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, E> {
    let refused = |action, path: &Path| {
        let path = path.to_path_buf();
        move |error| E::from((action, path, error))
    };
    let folder = cache.join(format!("{kind}-{key}"));
    if folder.exists() {
        return Ok(folder);
    }
    fs::create_dir_all(cache).map_err(refused("make the folder", cache))?;
    // Of two runs with one cache the second waits for the first; the system frees a killed one's.
    let lock = cache.join(".lock");
    let locked = File::create(&lock).and_then(|file| file.lock().map(|()| file));
    let _locked = locked.map_err(refused("lock", &lock))?;
    if folder.exists() {
        return Ok(folder);
    }
    let partial = cache.join(format!(".{kind}.partial"));
    if partial.exists() {
        // A killed run's.
        fs::remove_dir_all(&partial).map_err(refused("remove", &partial))?;
    }
    fs::create_dir(&partial).map_err(refused("make the folder", &partial))?;
    let made = make(&partial)
        .and_then(|()| fs::rename(&partial, &folder).map_err(refused("make the folder", &folder)));
    if made.is_err() {
        let _ = fs::remove_dir_all(&partial); // The first error is the one to tell.
    }
    made.map(|()| folder)
}

/// SHA-256 of a file that is read once from end to end; nothing of it is kept. `go_on` is asked now
/// and then.
pub(super) fn file_sha256(path: &Path, go_on: &dyn Fn() -> bool) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    while go_on() {
        match file.read(&mut buffer)? {
            0 => return Ok(Some(hex(&hasher.finalize()))),
            read => hasher.update(&buffer[..read]),
        }
    }
    Ok(None)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Puts the records of a file in order, where they lie: a map of it, whose pages are the system's to
/// take back, and not a list in memory.
pub(super) fn sort_records<const SIZE: usize>(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(()); // nothing of it can be mapped
    }
    // SAFETY: the file lies in a folder that is not yet under its name and whose lock is held here:
    // nobody else has it open.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }?;
    map.as_chunks_mut::<SIZE>().0.par_sort_unstable();
    map.flush()
}

/// A file's bytes as they lie on disk; of an empty one there is nothing to map.
pub(super) fn map_or_empty(path: &Path) -> io::Result<Bytes> {
    match fs::metadata(path)?.len() {
        0 => Ok(Bytes::new(Arc::new(Vec::new()))),
        _ => map_file(path).map_err(|error| io::Error::other(error.to_string())),
    }
}
