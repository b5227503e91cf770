//! A file as bytes: opened once, remembered, and either read or mapped.
//!
//! **Contract of the map.** A mapped file can be cut short by another process while it is read; the
//! kernel then raises SIGBUS at the first access behind the new end. Two things make that an error
//! instead of a death: [`guard_against_truncation`] (installed by the command line) answers the
//! signal by putting a page of zeros there and marking the map as damaged, and
//! [`Input::verify_unchanged`], which every operation calls before it publishes anything, reports
//! the damage or any change of size, time or identity. What a merge reads of its base goes through
//! `pread`, where a short file is an ordinary error; it is mapped only where tensors are compared.
//!
//! This is one of the three rooms that may say `unsafe`.

use std::fs::{File, Metadata, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;

use crate::error::{Error, Reason, Result};

/// A regular file that is open for reading, with what it looked like when it was opened.
#[derive(Debug)]
pub struct Input {
    path: PathBuf,
    file: File,
    identity: Identity,
    map: OnceLock<Option<Map>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    length: u64,
    modified: Option<std::time::SystemTime>,
    #[cfg(unix)]
    inode: (u64, u64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Identity {
            length: metadata.len(),
            modified: metadata.modified().ok(),
            #[cfg(unix)]
            inode: {
                use std::os::unix::fs::MetadataExt;
                (metadata.dev(), metadata.ino())
            },
        }
    }
}

impl Input {
    /// Opens a regular file without blocking.
    ///
    /// # Errors
    /// [`Reason::Open`] if it cannot be opened, [`Reason::NotARegularFile`] for folders, pipes,
    /// devices and sockets.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // A pipe without a writer must not hold us up: it is refused below.
            options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        }
        let file = options
            .open(path)
            .map_err(|e| Error::io(Reason::Open, e).in_file(path))?;
        let metadata = file
            .metadata()
            .map_err(|e| Error::io(Reason::Inspect, e).in_file(path))?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() {
                "a folder"
            } else {
                "a pipe, device or socket"
            };
            return Err(Error::new(Reason::NotARegularFile { what }).in_file(path));
        }
        let identity = Identity::of(&metadata);
        Ok(Input {
            path: path.to_owned(),
            file,
            identity,
            map: OnceLock::new(),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.identity.length
    }

    /// Whether it was empty when it was opened.
    pub fn is_empty(&self) -> bool {
        self.identity.length == 0
    }

    /// The open file itself, for copying between files.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buffer` from the bytes at `offset`.
    ///
    /// # Errors
    /// [`Reason::InputShrank`] if the file ends first, [`Reason::Read`] if reading fails.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match read_some(&self.file, &mut buffer[done..], at) {
                Ok(0) => {
                    let reason = Reason::InputShrank {
                        wanted: at,
                        length: self.current_length(),
                    };
                    return Err(Error::new(reason).in_file(&self.path));
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(Reason::Read, error).in_file(&self.path)),
            }
        }
        Ok(())
    }

    /// Reads the whole file, refusing more than `limit` bytes before allocating.
    ///
    /// # Errors
    /// [`Reason::FileTooLarge`], or those of [`Input::read_at`].
    pub fn read_all(&self, limit: u64) -> Result<Vec<u8>> {
        if self.len() > limit {
            let reason = Reason::FileTooLarge {
                bytes: self.len(),
                limit,
            };
            return Err(Error::new(reason).in_file(&self.path));
        }
        let mut bytes = vec![0; self.len() as usize];
        self.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The mapped bytes; `None` where the file system cannot map (then [`Input::read_at`] works).
    pub fn map(&self) -> Option<&[u8]> {
        self.map
            .get_or_init(|| Map::new(&self.file, self.len()))
            .as_ref()
            .map(Map::bytes)
    }

    /// Says that a range of the map will be read soon, so that the system reads ahead; nothing where it cannot.
    pub fn will_need(&self, offset: u64, length: u64) {
        #[cfg(unix)]
        if self.map().is_some()
            && let Some(Some(map)) = self.map.get()
        {
            let (offset, length) = (offset as usize, length as usize);
            // Advice that is not taken changes nothing.
            let _ = map
                .bytes
                .advise_range(memmap2::Advice::WillNeed, offset, length);
        }
        #[cfg(not(unix))]
        let _ = (offset, length);
    }

    /// Checks that the file is still the one that was opened.
    ///
    /// # Errors
    /// [`Reason::InputChanged`] after a change of size, modification time or identity (a file that was
    /// replaced under its name counts), or if a mapped page disappeared.
    pub fn verify_unchanged(&self) -> Result<()> {
        let damaged = self
            .map
            .get()
            .and_then(Option::as_ref)
            .is_some_and(Map::damaged);
        let open = self.file.metadata().map(|metadata| Identity::of(&metadata));
        let named = std::fs::metadata(&self.path).map(|metadata| Identity::of(&metadata));
        let same =
            |found: std::io::Result<Identity>| found.is_ok_and(|found| found == self.identity);
        if damaged || !same(open) || !same(named) {
            return Err(Error::new(Reason::InputChanged).in_file(&self.path));
        }
        Ok(())
    }

    fn current_length(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }
}

/// Whether a name exists in its folder. A link without a target does: opening it fails then, where
/// taking the file for absent would change what the rest means.
pub(crate) fn is_there(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

#[cfg(unix)]
fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

#[derive(Debug)]
struct Map {
    bytes: Mmap,
    #[cfg(unix)]
    slot: Option<usize>,
}

impl Map {
    fn new(file: &File, length: u64) -> Option<Self> {
        if length == 0 {
            return None;
        }
        // SAFETY: the map is private to this process and only read. Another process may change or cut
        // the file: a change gives other bytes, which `verify_unchanged` reports; a cut raises
        // SIGBUS, which the module's contract answers. No reference into the map is ever treated
        // as anything but plain bytes.
        let bytes = unsafe { Mmap::map(file) }.ok()?;
        if (bytes.len() as u64) < length {
            return None; // shorter than when it was opened: let `read_at` report it
        }
        Some(Map {
            #[cfg(unix)]
            slot: guard::register(&bytes),
            bytes,
        })
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    #[cfg(unix)]
    fn damaged(&self) -> bool {
        self.slot.is_some_and(guard::damaged)
    }

    #[cfg(not(unix))]
    fn damaged(&self) -> bool {
        false // Windows does not let anybody cut a mapped file
    }
}

#[cfg(unix)]
impl Drop for Map {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            guard::release(slot);
        }
    }
}

/// Answers SIGBUS in a mapped input with a page of zeros instead of the death of the process; the
/// damage is then reported by [`Input::verify_unchanged`].
///
/// Process-wide, so it is for the owner of the process to call (the command line does). A SIGBUS
/// anywhere else keeps its default action. Does nothing outside Unix.
pub fn guard_against_truncation() {
    #[cfg(unix)]
    guard::install();
}

#[cfg(unix)]
mod guard {
    //! The signal handler and its table of maps: lock-free, allocation-free, async-signal-safe.

    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// One mapped range; `start == 0` means free.
    struct Slot {
        start: AtomicUsize,
        length: AtomicUsize,
        damaged: AtomicBool,
    }

    /// More maps than this are not guarded: adapters are few, and the base is not mapped.
    const SLOTS: usize = 1024;
    static TABLE: [Slot; SLOTS] = [const {
        Slot {
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            damaged: AtomicBool::new(false),
        }
    }; SLOTS];

    pub(super) fn register(bytes: &[u8]) -> Option<usize> {
        let start = bytes.as_ptr() as usize;
        TABLE.iter().position(|slot| {
            let claimed =
                slot.start
                    .compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                slot.damaged.store(false, Ordering::Release);
                slot.length.store(bytes.len(), Ordering::Release);
            }
            claimed.is_ok()
        })
    }

    pub(super) fn release(slot: usize) {
        TABLE[slot].length.store(0, Ordering::Release);
        TABLE[slot].start.store(0, Ordering::Release);
    }

    pub(super) fn damaged(slot: usize) -> bool {
        TABLE[slot].damaged.load(Ordering::Acquire)
    }

    pub(super) fn install() {
        // SAFETY: `action` is a valid, zeroed sigaction; the handler only touches atomics and calls
        // `mmap`, `sysconf` and `sigaction`, which are async-signal-safe on the systems we build for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                handle;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }

    extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid siginfo for a handler installed with SA_SIGINFO.
        let address = unsafe { (*info).si_addr() } as usize;
        // SAFETY: sysconf has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        for slot in &TABLE {
            let start = slot.start.load(Ordering::Acquire);
            let length = slot.length.load(Ordering::Acquire);
            if start == 0 || address < start || address - start >= length {
                continue;
            }
            slot.damaged.store(true, Ordering::Release);
            // SAFETY: the page lies inside a live map of ours that is only read as plain bytes;
            // replacing it by zeros cannot break any invariant but the file's content, which
            // `damaged` reports.
            let replaced = unsafe {
                libc::mmap(
                    (address / page * page) as *mut libc::c_void,
                    page,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            if replaced != libc::MAP_FAILED {
                return;
            }
        }
        // Not ours: back to the default action, which the repeated access then takes.
        // SAFETY: a zeroed sigaction with SIG_DFL is valid.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }
}
