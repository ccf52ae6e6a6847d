//! Lock files between processes, which name their holder.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;

/// A file lock of this process. The system releases it when the process ends in any way. The file is not
/// deleted: else a process that has it open could lock the old file while another locks a new one.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

/// Why a file could not be locked.
#[derive(Debug)]
pub enum LockError {
    /// Another process has locked it: its description.
    Held(String),
    /// The file system does not support locks.
    NoLocks(io::Error),
    /// The file cannot be created, opened or written.
    Io(io::Error),
}

impl Lock {
    /// Locks a file, which is created if needed, and writes the id of this process into it.
    ///
    /// # Errors
    /// If another process has locked it (without waiting), or the system reports an error.
    pub fn take(path: &Path) -> Result<Self, LockError> {
        let mut options = File::options();
        options.create(true).read(true).write(true).truncate(false);
        let mut file = options.open(path).map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LockError::Held(holder(file))),
            Err(TryLockError::Error(e)) => return Err(LockError::NoLocks(e)),
        }
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(LockError::Io)?;
        Ok(Self { file })
    }

    /// The process that has locked a file, in words; `None` also for a file that cannot be opened.
    pub(crate) fn holder(path: &Path) -> Option<String> {
        let file = File::open(path).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(holder(file)),
            Ok(()) | Err(TryLockError::Error(_)) => None,
        }
    }
}

/// The holder that a locked file names. The file is unreadable where locks are mandatory, and empty for a
/// moment after locking.
fn holder(mut file: File) -> String {
    let mut id = String::new();
    let read = file.read_to_string(&mut id).is_ok() && !id.trim().is_empty();
    if read { format!("process {}", id.trim()) } else { "another process".into() }
}

impl Drop for Lock {
    /// Clears the id of this process, so that it is not reported as a later holder.
    fn drop(&mut self) {
        let _ = self.file.set_len(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_is_held_until_dropped() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("lock");
        assert_eq!(Lock::holder(&path), None);
        let lock = Lock::take(&path).unwrap();
        // Where locks are mandatory, who holds one cannot be read.
        let us = if cfg!(windows) {
            "another process".to_string()
        } else {
            format!("process {}", std::process::id())
        };
        assert!(matches!(Lock::take(&path), Err(LockError::Held(who)) if who == us));
        assert_eq!(Lock::holder(&path), Some(us));
        drop(lock);
        assert_eq!(Lock::holder(&path), None);
        Lock::take(&path).unwrap();
        assert!(matches!(Lock::take(room.path()), Err(LockError::Io(_))));
    }
}
