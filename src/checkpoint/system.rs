//! Calls of the operating system that the standard library lacks, each with a fallback.
//!
//! | call | without it |
//! | --- | --- |
//! | `sync_file_range`, `posix_fadvise` (Linux) | the final `fsync` does all the work |
//! | `copy_file_range` (Linux) | read and write through a buffer |
//! | `renameat2` with `RENAME_EXCHANGE`, `RENAME_NOREPLACE` (Linux) | the old output is set aside, and put back by the next run if this one dies between two renames |
//! | `statvfs` (Unix) | lack of space is noticed when it happens |
//!
//! This is one of the three rooms that may say `unsafe`.

use std::fs::File;
use std::io;
use std::path::Path;

/// Starts writing a range of a file back to the disk, without waiting.
pub(super) fn start_writeback(file: &File, offset: u64, length: u64) {
    #[cfg(target_os = "linux")]
    sync_file_range(file, offset, length, libc::SYNC_FILE_RANGE_WRITE);
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, length);
}

/// Waits until a range is on its way, and lets go of its pages.
pub(super) fn finish_writeback(file: &File, offset: u64, length: u64) {
    #[cfg(target_os = "linux")]
    {
        let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        sync_file_range(file, offset, length, wait);
        let length = std::num::NonZeroU64::new(length);
        // Only advice: the pages of a finished output are of no use to this process.
        let _ = rustix::fs::fadvise(file, offset, length, rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, length);
}

#[cfg(target_os = "linux")]
fn sync_file_range(file: &File, offset: u64, length: u64, flags: libc::c_uint) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open for the whole call; the call has no memory operands. It is only a
    // hint for the kernel (errors show again in fsync, which decides), so its result is not needed.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset as i64, length as i64, flags);
    }
}

/// Copies a range between files inside the kernel; `None` where it cannot.
pub(super) fn copy_range(
    from: &File,
    offset: u64,
    to: &File,
    length: usize,
) -> io::Result<Option<usize>> {
    #[cfg(target_os = "linux")]
    {
        use rustix::io::Errno;
        let mut at = offset;
        match rustix::fs::copy_file_range(from, Some(&mut at), to, None, length) {
            Ok(copied) => Ok(Some(copied)),
            Err(
                Errno::XDEV
                | Errno::NOSYS
                | Errno::INVAL
                | Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::BADF,
            ) => Ok(None),
            Err(Errno::INTR) => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (from, offset, to, length);
        Ok(None)
    }
}

/// Free bytes for this user on the file system of a folder.
pub(super) fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// Whether this process may create entries in a folder.
pub(super) fn is_writable(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        use rustix::fs::Access;
        rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).is_ok()
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        true
    }
}

/// Renames without replacing.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => {}
            result => return result.map_err(Into::into),
        }
    }
    if std::fs::symlink_metadata(to).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    std::fs::rename(from, to)
}

/// Exchanges two entries atomically; `false` where the file system cannot.
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        Ok(false)
    }
}

/// Makes the entries of a folder durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        match File::open(folder)?.sync_all() {
            // Some file systems cannot sync folders; their renames are as durable as they get.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        Ok(())
    }
}
