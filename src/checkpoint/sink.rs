//! An output that is complete and new, or as it was before, at every instant.
//!
//! The result is built in a hidden sibling on the same file system and renamed into place when every
//! byte of it is durable. One lock per output name keeps other runs away, so whatever a dead run left
//! behind can be swept by whoever holds the lock. Nothing existing is ever opened for writing.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::names::holds_a_result;
use super::system;
use crate::error::{Error, Reason, Result};
use crate::mapped::{Input, is_there};

/// What an output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One file.
    File,
    /// A folder.
    Folder,
}

/// A step that can fail, for tests that make every one of them fail in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Creating a file or a folder.
    Create,
    /// Writing or copying bytes.
    Write,
    /// Making a file or a folder durable.
    Sync,
    /// Moving into place.
    Rename,
}

/// Asked before every operation; an error from it is treated as one of the operating system.
#[derive(Clone, Default)]
pub struct Faults(pub Option<Arc<dyn Fn(Operation) -> io::Result<()> + Send + Sync>>);

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "injected" } else { "none" })
    }
}

impl Faults {
    fn before(&self, operation: Operation) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |fault| fault(operation))
    }
}

/// Where an output goes, checked but not touched.
#[derive(Debug)]
pub struct Destination {
    target: PathBuf,
    parent: PathBuf,
    name: String,
    shape: Shape,
    force: bool,
    faults: Faults,
}

impl Destination {
    /// Checks an output path: its folder exists and can be written to, what is there may be replaced,
    /// and it neither is, contains nor lies inside an input, through links too.
    ///
    /// # Errors
    /// Those of kind [`crate::Kind::Output`].
    pub fn check<'a>(
        target: &Path,
        shape: Shape,
        force: bool,
        inputs: impl IntoIterator<Item = &'a Path>,
        faults: Faults,
    ) -> Result<Self> {
        let fail = |reason| Error::new(reason).in_file(target);
        let name = target
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| fail(Reason::BadName))?;
        let parent = target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let parent = parent.canonicalize().map_err(|_| fail(Reason::NoParent))?;
        if !parent.is_dir() {
            return Err(fail(Reason::NoParent));
        }
        let name = name.to_owned();
        let destination = Destination {
            target: parent.join(&name),
            parent,
            name,
            shape,
            force,
            faults,
        };
        for input in inputs {
            destination
                .check_alias(input)
                .map_err(|e| e.in_file(target))?;
        }
        destination
            .check_existing()
            .map_err(|e| e.in_file(target))?;
        if !system::is_writable(&destination.parent) {
            return Err(fail(Reason::NotWritable));
        }
        Ok(destination)
    }

    /// The path of the output, its folder resolved.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Refuses an output with less room than it needs.
    ///
    /// # Errors
    /// [`Reason::NoSpace`].
    pub fn check_space(&self, needed: u64) -> Result<()> {
        match system::free_space(&self.parent) {
            Some(free) if free < needed => {
                Err(Error::new(Reason::NoSpace { needed, free }).in_file(&self.target))
            }
            _ => Ok(()),
        }
    }

    fn check_alias(&self, input: &Path) -> Result<()> {
        let named = || input.to_string_lossy().into_owned();
        let Ok(real) = input.canonicalize() else {
            return Ok(());
        };
        let identities =
            |path: &Path| -> Vec<Identity> { path.ancestors().filter_map(Identity::of).collect() };
        let output = Identity::of(&self.target);
        let input_chain = identities(&real);
        if real == self.target || output.is_some() && output == input_chain.first().copied() {
            return Err(Error::new(Reason::IsInput { input: named() }));
        }
        // A link to the input that lies in the output would vanish with it.
        let holder = input.parent().and_then(|parent| match parent.as_os_str() {
            empty if empty.is_empty() => Path::new(".").canonicalize().ok(),
            _ => parent.canonicalize().ok(),
        });
        let holders = holder.map_or_else(Vec::new, |holder| identities(&holder));
        let within = |output| input_chain.contains(&output) || holders.contains(&output);
        if output.is_some_and(within) || real.starts_with(&self.target) {
            return Err(Error::new(Reason::ContainsInput { input: named() }));
        }
        let inside = real.is_dir()
            && input_chain
                .first()
                .is_some_and(|input| identities(&self.parent).contains(input));
        if inside {
            return Err(Error::new(Reason::InsideInput { input: named() }));
        }
        Ok(())
    }

    fn check_existing(&self) -> Result<()> {
        let Ok(metadata) = std::fs::symlink_metadata(&self.target) else {
            return Ok(());
        };
        if metadata.file_type().is_symlink() {
            return Err(Error::new(Reason::IsLink));
        }
        let found = if metadata.is_dir() {
            Shape::Folder
        } else {
            Shape::File
        };
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(Error::new(Reason::WrongKind {
                found: "a pipe, device or socket",
                wanted: self.shape.name(),
            }));
        }
        if found != self.shape {
            return Err(Error::new(Reason::WrongKind {
                found: found.name(),
                wanted: self.shape.name(),
            }));
        }
        if !self.force {
            return Err(Error::new(Reason::Exists));
        }
        if found == Shape::Folder && !is_replaceable(&self.target) {
            return Err(Error::new(Reason::NotACheckpoint));
        }
        Ok(())
    }

    fn sibling(&self, end: &str) -> PathBuf {
        // Room for the ending within the 255 bytes that file systems allow.
        let name = if self.name.len() > 200 {
            use std::hash::{DefaultHasher, Hash, Hasher};
            let mut hasher = DefaultHasher::new();
            self.name.hash(&mut hasher);
            let cut = self.name.floor_char_boundary(180);
            format!("{}-{:016x}", &self.name[..cut], hasher.finish())
        } else {
            self.name.clone()
        };
        self.parent.join(format!(".{name}.loratool-{end}"))
    }

    /// Writes one small file, complete or not at all.
    ///
    /// # Errors
    /// As [`Destination::begin`], and what writing gives.
    pub fn write(self, bytes: &[u8]) -> Result<()> {
        let name = self.name.clone();
        let sink = self.begin()?;
        let mut file = sink.create(&name)?;
        file.write(bytes)?;
        file.finish()?;
        sink.publish()
    }

    /// Locks the output, sweeps what dead runs left, and creates the hidden sibling.
    ///
    /// # Errors
    /// [`Reason::Busy`] if another run holds the lock; what creating files gives.
    pub fn begin(self) -> Result<Sink> {
        let lock = Lock::take(&self.sibling("lock"), &self.target)?;
        let (temporary, aside) = (self.sibling("tmp"), self.sibling("old"));
        // Under the lock whatever carries these names was left by a run that died.
        if is_there(&aside) {
            if !is_there(&self.target) {
                // It died between setting the old output aside and moving the new one in.
                system::rename_new(&aside, &self.target)
                    .map_err(|e| Error::io(Reason::Rename, e).in_file(&aside))?;
            } else {
                remove(&aside).map_err(|e| Error::io(Reason::Write, e).in_file(&aside))?;
            }
        }
        remove(&temporary).map_err(|e| Error::io(Reason::Write, e).in_file(&temporary))?;
        // The lock may have been waited for by a check that is old now.
        self.check_existing().map_err(|e| e.in_file(&self.target))?;
        let sink = Sink {
            destination: self,
            temporary,
            aside,
            lock,
            published: false,
            folders: Mutex::default(),
        };
        if sink.destination.shape == Shape::Folder {
            let faults = &sink.destination.faults;
            faults
                .before(Operation::Create)
                .and_then(|()| std::fs::create_dir(&sink.temporary))
                .map_err(|e| Error::io(Reason::Create, e).in_file(&sink.destination.target))?;
        }
        Ok(sink)
    }
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Shape::File => "a file",
            Shape::Folder => "a folder",
        }
    }
}

/// Whether `--force` may replace a folder: it is empty or one checkpoint, not somebody's home and not
/// a collection of models.
fn is_replaceable(folder: &Path) -> bool {
    let is_empty = || std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    holds_a_result(folder) || is_empty()
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    #[cfg(unix)]
    fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).ok()?;
        Some(Identity(metadata.dev(), metadata.ino()))
    }

    #[cfg(not(unix))]
    fn of(path: &Path) -> Option<Self> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        path.canonicalize().ok()?.hash(&mut hasher);
        Some(Identity(0, hasher.finish()))
    }
}

/// An exclusive lock on an output name, gone with the process.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(path: &Path, target: &Path) -> Result<Self> {
        for _ in 0..100 {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            #[cfg(unix)]
            {
                use std::os::unix::fs::OpenOptionsExt;
                options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC);
            }
            let file = options
                .open(path)
                .map_err(|e| Error::io(Reason::Lock, e).in_file(path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => {
                    return Err(Error::new(Reason::Busy).in_file(target));
                }
                Err(std::fs::TryLockError::Error(e)) => {
                    return Err(Error::io(Reason::Lock, e).in_file(path));
                }
            }
            // The holder before us may have removed the file between our open and our lock.
            if same_file(&file, path) {
                return Ok(Lock {
                    path: path.to_owned(),
                    _file: file,
                });
            }
        }
        Err(Error::new(Reason::Busy).in_file(target))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while still held, so nobody can lock a file that is about to vanish unnoticed.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(named)) = (file.metadata(), std::fs::symlink_metadata(path)) else {
        return false;
    };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

#[cfg(not(unix))]
fn same_file(_file: &File, path: &Path) -> bool {
    path.exists()
}

/// An output being built. Dropped without [`Sink::publish`], it leaves nothing behind.
#[derive(Debug)]
pub struct Sink {
    destination: Destination,
    temporary: PathBuf,
    aside: PathBuf,
    // Held until the end: dropped after the temporary is gone.
    lock: Lock,
    published: bool,
    /// Folders in the output, those within others behind them.
    folders: Mutex<BTreeSet<PathBuf>>,
}

impl Sink {
    /// Creates a file of the output; `name` may have folders in front and is ignored where the
    /// output is one file.
    ///
    /// # Errors
    /// [`Reason::Create`].
    pub fn create(&self, name: &str) -> Result<OutputFile> {
        let (path, shown) = match self.destination.shape {
            Shape::File => (self.temporary.clone(), self.destination.target.clone()),
            Shape::Folder => (
                self.temporary.join(name),
                self.destination.target.join(name),
            ),
        };
        let fail = |e| Error::io(Reason::Create, e).in_file(&shown);
        if let Some((folders, _)) = name.rsplit_once('/')
            && self.destination.shape == Shape::Folder
        {
            self.create_folders(folders).map_err(fail)?;
        }
        self.destination
            .faults
            .before(Operation::Create)
            .map_err(fail)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(fail)?;
        let faults = self.destination.faults.clone();
        Ok(OutputFile {
            file,
            path,
            shown,
            written: 0,
            started: 0,
            finished: 0,
            faults,
        })
    }

    fn create_folders(&self, folders: &str) -> io::Result<()> {
        let mut path = self.temporary.clone();
        let mut created = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        for folder in folders.split('/') {
            path.push(folder);
            if !created.contains(&path) {
                self.destination.faults.before(Operation::Create)?;
                std::fs::create_dir(&path)?;
                created.insert(path.clone());
            }
        }
        Ok(())
    }

    /// Moves the complete output into place, durably.
    ///
    /// # Errors
    /// [`Reason::Sync`], [`Reason::Rename`], [`Reason::Appeared`].
    pub fn publish(mut self) -> Result<()> {
        let Destination {
            target,
            parent,
            shape,
            force,
            faults,
            ..
        } = &self.destination;
        let sync = |folder: &Path| {
            let result = faults
                .before(Operation::Sync)
                .and_then(|()| system::sync_folder(folder));
            result.map_err(|e| Error::io(Reason::Sync, e).in_file(target))
        };
        if *shape == Shape::Folder {
            let folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
            for folder in folders.iter().rev() {
                sync(folder)?;
            }
            drop(folders);
            sync(&self.temporary)?;
        }
        let fail = |e: io::Error| match e.kind() {
            io::ErrorKind::AlreadyExists => Error::new(Reason::Appeared).in_file(target),
            _ => Error::io(Reason::Rename, e).in_file(target),
        };
        faults.before(Operation::Rename).map_err(fail)?;
        let exists = is_there(target);
        if exists && *force {
            // Hours may have gone by: what is there now need not be what was checked.
            let checked = self.destination.check_existing();
            checked.map_err(|e| e.in_file(target))?;
        }
        match (exists && *force, shape) {
            (false, _) => system::rename_new(&self.temporary, target).map_err(fail)?,
            (true, Shape::File) => std::fs::rename(&self.temporary, target).map_err(fail)?,
            (true, Shape::Folder) => {
                if !system::exchange(&self.temporary, target).map_err(fail)? {
                    std::fs::rename(target, &self.aside).map_err(fail)?;
                    if let Err(error) = std::fs::rename(&self.temporary, target) {
                        let _ = std::fs::rename(&self.aside, target);
                        return Err(fail(error));
                    }
                }
            }
        }
        self.published = true;
        // The rename is done: a failure from here on is about durability, not about content.
        let result = sync(parent).map_err(|e| {
            e.with_hint("the result is complete and in place, but may not survive a power cut")
        });
        let _ = remove(&self.temporary);
        let _ = remove(&self.aside);
        result
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if !self.published {
            let _ = remove(&self.temporary);
        }
        let _ = &self.lock;
    }
}

/// A file of an output, written from its first byte to its last.
#[derive(Debug)]
pub struct OutputFile {
    file: File,
    path: PathBuf,
    shown: PathBuf,
    written: u64,
    started: u64,
    finished: u64,
    faults: Faults,
}

/// Bytes between two hints to the kernel (`docs/design.md` says what was measured).
const CHUNK: u64 = 8 << 20;

/// Chunks on their way to the disk before the writer waits.
const CHUNKS_BEHIND: u64 = 4;

impl OutputFile {
    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// The hidden path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`Reason::Write`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK as usize) {
            let result = self
                .faults
                .before(Operation::Write)
                .and_then(|()| self.file.write_all(chunk));
            result.map_err(|e| Error::io(Reason::Write, e).in_file(&self.shown))?;
            self.advance(chunk.len() as u64);
        }
        Ok(())
    }

    /// Appends a range of an input, inside the kernel where that is possible.
    ///
    /// # Errors
    /// [`Reason::Write`], [`Reason::InputShrank`], [`Reason::Read`].
    pub fn copy(&mut self, input: &Input, offset: u64, length: u64) -> Result<()> {
        let mut done = 0;
        let mut buffer = Vec::new();
        while done < length {
            let count = (length - done).min(CHUNK);
            let result =
                self.faults
                    .before(Operation::Write)
                    .and_then(|()| match buffer.is_empty() {
                        true => system::copy_range(
                            input.file(),
                            offset + done,
                            &self.file,
                            count as usize,
                        ),
                        false => Ok(None),
                    });
            let copied = result.map_err(|e| Error::io(Reason::Write, e).in_file(&self.shown))?;
            let copied = match copied {
                Some(copied) if copied > 0 => copied as u64,
                // Not possible here, or the file ended: reading tells which.
                _ => {
                    buffer.resize(count as usize, 0);
                    input.read_at(&mut buffer[..count as usize], offset + done)?;
                    self.file
                        .write_all(&buffer[..count as usize])
                        .map_err(|e| Error::io(Reason::Write, e).in_file(&self.shown))?;
                    count
                }
            };
            done += copied;
            self.advance(copied);
        }
        Ok(())
    }

    /// Replaces the first bytes by as many others.
    ///
    /// # Errors
    /// [`Reason::Write`].
    pub fn overwrite_start(&mut self, bytes: &[u8]) -> Result<()> {
        debug_assert!(bytes.len() as u64 <= self.written);
        let result = self.faults.before(Operation::Write).and_then(|()| {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(bytes)?;
            self.file.seek(SeekFrom::End(0)).map(drop)
        });
        result.map_err(|e| Error::io(Reason::Write, e).in_file(&self.shown))
    }

    /// Makes the file durable and closes it.
    ///
    /// # Errors
    /// [`Reason::Sync`].
    pub fn finish(self) -> Result<PathBuf> {
        let result = self
            .faults
            .before(Operation::Sync)
            .and_then(|()| self.file.sync_all());
        result.map_err(|e| Error::io(Reason::Sync, e).in_file(&self.shown))?;
        Ok(self.path)
    }

    /// Keeps the disk busy while the rest is computed, and the page cache free.
    fn advance(&mut self, count: u64) {
        self.written += count;
        while self.written - self.started >= CHUNK {
            if self.started - self.finished >= CHUNKS_BEHIND * CHUNK {
                system::finish_writeback(&self.file, self.finished, CHUNK);
                self.finished += CHUNK;
            }
            system::start_writeback(&self.file, self.started, CHUNK);
            self.started += CHUNK;
        }
    }
}
