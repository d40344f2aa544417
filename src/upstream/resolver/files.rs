//! The files of the resolver's settings, and whether they have changed.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The paths of the files.
pub(super) struct ResolverFiles {
    resolv_conf: PathBuf,
    hosts: PathBuf,
}

/// The states of both files; a change of a file changes its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileStates {
    pub(super) resolv_conf: Option<FileState>,
    pub(super) hosts: Option<FileState>,
}

/// Identity and times of a file, behind all links. The change time is another one after each write or rename, even if
/// the modification time was set back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl ResolverFiles {
    /// The system's files.
    pub(super) fn system() -> Self {
        Self::in_folder(Path::new("/etc"))
    }

    /// Files with the system's names in another folder.
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self { resolv_conf: folder.join("resolv.conf"), hosts: folder.join("hosts") }
    }

    /// The text of the resolver's settings.
    pub(super) fn resolv_conf(&self) -> io::Result<String> {
        read(&self.resolv_conf)
    }

    /// The text of the hosts file.
    pub(super) fn hosts(&self) -> io::Result<String> {
        read(&self.hosts)
    }

    /// The states now; `None` for a file that does not exist.
    pub(super) fn states(&self) -> FileStates {
        FileStates { resolv_conf: state(&self.resolv_conf), hosts: state(&self.hosts) }
    }
}

/// A comment may have any encoding.
fn read(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
}

fn state(path: &Path) -> Option<FileState> {
    let metadata: Metadata = std::fs::metadata(path).ok()?;
    Some(FileState {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}
