//! Files that keep other processes off, and say who holds them.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;

/// A file that the system has locked for this process. The lock ends with the process, however that
/// ends. The file stays: were it taken away, a process that has opened it could lock the old one while
/// another locks a new one.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

/// Why a file is not locked for this process.
#[derive(Debug)]
pub enum LockError {
    /// Who has locked it, in words.
    Held(String),
    /// The system has no locks there.
    NoLocks(io::Error),
    /// The file cannot be made, opened or written.
    Io(io::Error),
}

impl Lock {
    /// Locks a file, which is made if there is none, and puts the number of this process in it.
    ///
    /// # Errors
    /// If another process has locked it, or the system refuses; nobody is waited for.
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

    /// Who has locked a file, in words; nobody has one that cannot be looked at.
    pub fn holder(path: &Path) -> Option<String> {
        let file = File::open(path).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(holder(file)),
            Ok(()) | Err(TryLockError::Error(_)) => None,
        }
    }
}

/// What a locked file says. It is not readable where locks are mandatory, and empty for a moment.
fn holder(mut file: File) -> String {
    let mut id = String::new();
    let read = file.read_to_string(&mut id).is_ok() && !id.trim().is_empty();
    if read { format!("process {}", id.trim()) } else { "another process".into() }
}

impl Drop for Lock {
    /// Nobody holds it: the next to take it must not be told of this process.
    fn drop(&mut self) {
        let _ = self.file.set_len(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_until_it_is_dropped() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("lock");
        assert_eq!(Lock::holder(&path), None);
        let lock = Lock::take(&path).unwrap();
        // Where locks are mandatory, who holds one cannot be read.
        let us = match cfg!(windows) {
            true => "another process".to_string(),
            false => format!("process {}", std::process::id()),
        };
        assert!(matches!(Lock::take(&path), Err(LockError::Held(who)) if who == us));
        assert_eq!(Lock::holder(&path), Some(us));
        drop(lock);
        assert_eq!(Lock::holder(&path), None);
        Lock::take(&path).unwrap();
        assert!(matches!(Lock::take(room.path()), Err(LockError::Io(_))));
    }
}
