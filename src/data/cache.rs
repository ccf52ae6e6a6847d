//! Folders of tokens that are made once and found again by a name that says all they depend on.
//!
//! A folder is written beside its place and renamed, so what is there is whole. What a killed run left
//! half made goes when the next one opens the cache. Whole folders stay, of files that have changed
//! too, since another run may have them mapped: to clear a cache, remove it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rayon::slice::ParallelSliceMut;
use sha2::{Digest, Sha256};

use super::DataError;
use crate::quant::Bytes;
use crate::weights::{Lock, LockError, map_file};

/// What the system refused: what was tried, where, and its words.
pub(super) type Refused = (&'static str, PathBuf, io::Error);

/// A folder that is being made, one at a time.
const PARTIAL: &str = ".partial";

/// How often a run that waits looks whether it still has to.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The folder `KIND-KEY` of `cache`, which `make` fills if there is none yet. While another run makes
/// one it waits, until `stop` is set; `waiting` is told once, and for whom.
pub(super) fn folder<E: From<Refused> + From<DataError>>(
    cache: &Path,
    (kind, key): (&str, &str),
    stop: &AtomicBool,
    waiting: impl FnOnce(&str),
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, E> {
    let refused = |action, path: &Path| {
        let path = path.to_path_buf();
        move |error| E::from((action, path, error))
    };
    let folder = cache.join(format!("{kind}-{key}"));
    let (partial, lock) = (cache.join(PARTIAL), cache.join(".lock"));
    if folder.exists() {
        // What lies half made while nobody makes it is a killed run's. One that may only read the
        // cache leaves it.
        if partial.exists()
            && let Ok(_locked) = Lock::take(&lock)
        {
            let _ = fs::remove_dir_all(&partial);
        }
        return Ok(folder);
    }
    fs::create_dir_all(cache).map_err(refused("make the folder", cache))?;
    // Of two runs with one cache the second waits for the first; the system frees a killed one's.
    let mut waiting = Some(waiting);
    let _locked = loop {
        match Lock::take(&lock) {
            Ok(locked) => break locked,
            Err(LockError::Held(_)) if stop.load(Ordering::Relaxed) => {
                return Err(DataError::Stopped.into());
            }
            Err(LockError::Held(holder)) => {
                if let Some(waiting) = waiting.take() {
                    waiting(&holder);
                }
                thread::sleep(LOOK_AGAIN);
            }
            Err(LockError::NoLocks(e) | LockError::Io(e)) => return Err(refused("lock", &lock)(e)),
        }
    };
    if folder.exists() {
        return Ok(folder);
    }
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

/// How many whole folders a cache has, each with a file `header`, and their bytes.
pub(super) fn holdings(cache: &Path, header: &str) -> (usize, u64) {
    let inside = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = inside(cache).map(|entry| entry.path());
    let whole = folders.filter(|folder| folder.join(header).exists() && !folder.ends_with(PARTIAL));
    let bytes = |folder: &Path| -> u64 {
        inside(folder).filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    };
    whole.fold((0, 0), |(count, sum), folder| (count + 1, sum + bytes(&folder)))
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

#[cfg(test)]
mod tests {
    use super::*;

    static GOES_ON: AtomicBool = AtomicBool::new(false);

    /// Makes a folder with a file `header`.
    fn made(
        cache: &Path,
        (key, header): (&str, &str),
        stop: &AtomicBool,
        waiting: impl FnOnce(&str),
    ) -> Result<(), DataError> {
        let found =
            folder(cache, ("kind", key), stop, waiting, |folder| -> Result<(), DataError> {
                fs::write(folder.join(header), "12").unwrap();
                fs::write(folder.join("rows"), "345").unwrap();
                Ok(())
            });
        found.map(|found| assert_eq!(found, cache.join(format!("kind-{key}"))))
    }

    #[test]
    fn what_a_cache_holds_is_counted() {
        let room = tempfile::tempdir().unwrap();
        let cache = room.path().join("cache");
        assert_eq!(holdings(&cache, "rows.json"), (0, 0));
        for (key, header) in [("a", "rows.json"), ("b", "rows.json"), ("c", "shard.json")] {
            made(&cache, (key, header), &GOES_ON, |_| panic!("nobody is there")).unwrap();
        }
        assert_eq!(holdings(&cache, "rows.json"), (2, 10));
    }

    #[test]
    fn who_waits_for_another_can_be_stopped_or_goes_on() {
        let room = tempfile::tempdir().unwrap();
        let cache = room.path();
        let lock = Lock::take(&cache.join(".lock")).unwrap();
        let rows = ("a", "rows.json");
        let stopped = made(cache, rows, &AtomicBool::new(true), |_| panic!("it has not waited"));
        assert!(matches!(stopped, Err(DataError::Stopped)), "{stopped:?}");
        assert_eq!(holdings(cache, "rows.json").0, 0);
        let mut told = String::new();
        let waiting = |holder: &str| {
            told = holder.to_string();
            drop(lock);
        };
        made(cache, rows, &GOES_ON, waiting).unwrap();
        // Where locks are mandatory, who holds one cannot be read.
        let us = format!("process {}", std::process::id());
        assert_eq!(told, if cfg!(windows) { "another process" } else { &us });
        assert_eq!(holdings(cache, "rows.json").0, 1);
    }
}
