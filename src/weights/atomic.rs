//! Atomic replacement of files.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::Path;

use super::WeightsError;

/// Writes a temporary file, syncs it and renames it to `path`, so that readers see the old file or the
/// new one and never a part, even if the writer is killed.
///
/// The temporary file is `.{name}.partial`; one left by a killed writer is overwritten. `write` passes
/// errors that are not the system's as `io::Error::other`.
///
/// # Errors
/// If anything fails; then `path` is unchanged and the temporary file is removed.
pub(crate) fn write_atomically(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), WeightsError> {
    let path = path.as_ref();
    let failed = |source| WeightsError::Io { action: "write", path: path.into(), source };
    let Some(name) = path.file_name() else {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it names no file")));
    };
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    partial_name.push(".partial");
    let partial = path.with_file_name(partial_name);
    let written = (|| {
        let mut file = BufWriter::new(File::create(&partial)?);
        write(&mut file)?;
        file.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        fs::rename(&partial, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&partial); // The first error is returned.
    }
    written.and_then(|()| sync_folder(path)).map_err(failed)
}

/// Syncs the folder: a rename survives a power failure only after that.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn file_is_replaced_atomically() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.bin");
        let here = || fs::read_dir(folder.path()).unwrap().count();

        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let failed = write_atomically(&path, |file| {
            file.write_all(b"half of the new")?;
            Err(io::Error::other("the source ended"))
        });
        let message = failed.unwrap_err().to_string();
        assert!(message.contains("out.bin") && message.contains("the source ended"), "{message}");
        assert_eq!((fs::read(&path).unwrap(), here()), (b"old".to_vec(), 1));

        write_atomically(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!((fs::read(&path).unwrap(), here()), (b"new".to_vec(), 1));

        let nowhere = folder.path().join("no").join("out.bin");
        assert!(write_atomically(&nowhere, |_| Ok(())).is_err());
        assert!(write_atomically("/", |_| Ok(())).is_err());
    }
}
