//! Factors that wait for the format to be written: in a file without a name, which vanishes with the process.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Reason, Result};
use crate::tensor::Tensor;

pub(super) struct Spool {
    file: Arc<Mutex<File>>,
    length: u64,
}

impl Spool {
    /// Opens one in a folder.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder);
        let file = file.map_err(|e| Error::io(Reason::Create, e).in_file(folder))?;
        Ok(Spool {
            file: Arc::new(Mutex::new(file)),
            length: 0,
        })
    }

    /// Puts the bytes of a tensor away, and gives the tensor that reads them back.
    pub(super) fn keep(&mut self, tensor: &Tensor) -> Result<Tensor> {
        let bytes = tensor.bytes()?;
        let (offset, length) = (self.length, bytes.len());
        let place = tensor.input.path().to_owned();
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let written = file
                .seek(SeekFrom::Start(offset))
                .and_then(|_| file.write_all(&bytes));
            written.map_err(|e| Error::io(Reason::Write, e))?;
        }
        self.length += length as u64;
        let file = self.file.clone();
        let made = move || {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            let mut bytes = vec![0; length];
            let read = file
                .seek(SeekFrom::Start(offset))
                .and_then(|_| file.read_exact(&mut bytes));
            read.map_err(|e| Error::io(Reason::Read, e).in_file(&place))?;
            Ok(bytes)
        };
        Ok(tensor.derived(tensor.dtype, tensor.shape.clone(), Arc::new(made)))
    }
}
