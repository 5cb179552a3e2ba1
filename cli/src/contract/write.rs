//! Writing a file whole or not at all.

use crate::failure::Failure;
use std::io::Write;
use std::path::Path;

/// Refuses a place that cannot be written to, before anything is computed for it.
pub(crate) fn check_target(path: &Path) -> Result<(), Failure> {
    let folder = folder(path);
    if !folder.is_dir() {
        let folder = folder.display();
        return Err(
            Failure::bad(format_args!("cannot be written: there is no folder {folder}; create it")).of_file(path)
        );
    }
    // The file takes the name's place: a device or a folder would be gone.
    if path.exists() && !path.is_file() || path.file_name().is_none() {
        return Err(Failure::bad("cannot be written: it is not a regular file; give another name").of_file(path));
    }
    Ok(())
}

/// Writes a temporary file in the same folder, then gives it the name.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write(path, bytes).map_err(|error| Failure::bad(format_args!("cannot be written: {error}")).of_file(path))
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".fused-attention-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As any new file: the umask takes from it what it must. The crate's own choice is the owner alone.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder(path))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}
