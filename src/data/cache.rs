//! Cache folders of tokens. Each is written once; its name contains a hash of everything the tokens
//! depend on.
//!
//! A folder is written under a temporary name and then renamed, so a folder under its final name is
//! complete. The partial folder of a killed run is removed when the next run opens the cache. Complete
//! folders are never removed, even if their source has changed, since another run may have them mapped:
//! delete the cache to clear it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rayon::slice::ParallelSliceMut;
use sha2::{Digest, Sha256};

use super::error::{DataError, IoFailure};
use crate::quant::Bytes;
use crate::weights::{Lock, LockError, map_file};

/// Temporary name of the folder that is being written; there is one at a time.
const PARTIAL: &str = ".partial";

/// Polling interval of a run that waits for the lock.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Returns the folder `KIND-KEY` of `cache`, after calling `make` to write it if it does not exist. While
/// another run holds the lock it waits, until `stop` is set; `waiting` is called once, with the holder.
pub(super) fn folder<E: From<IoFailure> + From<DataError>>(
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
        // A partial folder while nobody holds the lock is that of a killed run. A run without write
        // access to the cache leaves it.
        if partial.exists()
            && let Ok(_locked) = Lock::take(&lock)
        {
            let _ = fs::remove_dir_all(&partial);
        }
        return Ok(folder);
    }
    fs::create_dir_all(cache).map_err(refused("make the folder", cache))?;
    // Of two runs with the same cache, the second waits for the first. The system releases the lock of a
    // killed run.
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
                thread::sleep(POLL_INTERVAL);
            }
            Err(LockError::NoLocks(e) | LockError::Io(e)) => return Err(refused("lock", &lock)(e)),
        }
    };
    if folder.exists() {
        return Ok(folder);
    }
    if partial.exists() {
        // Left by a killed run.
        fs::remove_dir_all(&partial).map_err(refused("remove", &partial))?;
    }
    fs::create_dir(&partial).map_err(refused("make the folder", &partial))?;
    let made = make(&partial)
        .and_then(|()| fs::rename(&partial, &folder).map_err(refused("make the folder", &folder)));
    if made.is_err() {
        let _ = fs::remove_dir_all(&partial); // report the first error
    }
    made.map(|()| folder)
}

/// Number of complete folders of a cache, which have a file `header`, and their total size in bytes.
pub(super) fn holdings(cache: &Path, header: &str) -> (usize, u64) {
    let inside = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = inside(cache).map(|entry| entry.path());
    let whole = folders.filter(|folder| folder.join(header).exists() && !folder.ends_with(PARTIAL));
    let bytes = |folder: &Path| -> u64 {
        inside(folder).filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    };
    whole.fold((0, 0), |(count, sum), folder| (count + 1, sum + bytes(&folder)))
}

/// SHA-256 of a file, read in blocks. Returns `None` once `go_on`, which is polled, is false.
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

/// Sorts the records of a file in place, through a memory map whose pages the system can evict, not in
/// memory.
pub(super) fn sort_records<const SIZE: usize>(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(()); // an empty file cannot be mapped
    }
    // SAFETY: the file is in a partial folder, and this run holds the lock of the cache: nobody else has
    // the file open.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }?;
    map.as_chunks_mut::<SIZE>().0.par_sort_unstable();
    map.flush()
}

/// Maps a file; an empty file, which cannot be mapped, gives empty bytes.
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

    /// Writes a cache folder with a file `header`.
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
    fn holdings_count_folders_with_the_header() {
        let room = tempfile::tempdir().unwrap();
        let cache = room.path().join("cache");
        assert_eq!(holdings(&cache, "rows.json"), (0, 0));
        for (key, header) in [("a", "rows.json"), ("b", "rows.json"), ("c", "shard.json")] {
            made(&cache, (key, header), &GOES_ON, |_| panic!("nobody is there")).unwrap();
        }
        assert_eq!(holdings(&cache, "rows.json"), (2, 10));
    }

    #[test]
    fn a_waiting_run_can_be_stopped_or_continues_once_the_lock_is_free() {
        let room = tempfile::tempdir().unwrap();
        let cache = room.path();
        let lock = Lock::take(&cache.join(".lock")).unwrap();
        let rows = ("a", "rows.json");
        let stopped = made(cache, rows, &AtomicBool::new(true), |_| panic!("it has not waited"));
        assert!(matches!(stopped, Err(DataError::Stopped)), "{stopped:?}");
        assert_eq!(holdings(cache, "rows.json").0, 0);
        let mut reported = String::new();
        let waiting = |holder: &str| {
            reported = holder.to_string();
            drop(lock);
        };
        made(cache, rows, &GOES_ON, waiting).unwrap();
        // Where locks are mandatory, the holder of a lock cannot be read from the file.
        let us = format!("process {}", std::process::id());
        assert_eq!(reported, if cfg!(windows) { "another process" } else { &us });
        assert_eq!(holdings(cache, "rows.json").0, 1);
    }
}
