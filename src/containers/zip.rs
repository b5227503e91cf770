//! The directory of a zip archive, and the members that are compressed.
//!
//! Source: PKWARE's APPNOTE; the records are parsed by `rawzip`, which shows every entry, also those that
//! share a name. An archive has one reading: no two names alike, no two members on the same bytes, local
//! and central headers agree on names. Members that are stored stay in the file, so their checksums are
//! not asked; those that are compressed are inflated up to their stated size and their checksum compared.

use std::collections::HashSet;
use std::io::Read;

use rawzip::{CompressionMethod, ZipArchive};

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// Most members of an archive.
const MEMBER_LIMIT: usize = 100_000;

/// Largest archive that is read where it cannot be mapped.
const READ_LIMIT: u64 = 1 << 30;

/// Most that a byte of deflate can stand for (RFC 1951: 258 bytes in two bits).
const DEFLATE_RATIO: u64 = 1032;

/// A member of an archive.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    /// Deflated, or stored as it is.
    pub(super) deflated: bool,
    /// Where its bytes start in the file.
    pub(super) offset: u64,
    /// Number of bytes in the file.
    pub(super) compressed: u64,
    /// Number of bytes that they stand for.
    pub(super) size: u64,
    /// CRC-32 of those.
    crc: u32,
}

fn broken(problem: impl std::fmt::Display) -> Error {
    let problem = format!("the zip archive is broken: {problem}");
    Error::new(Reason::Structure { problem })
}

/// The members of an archive by ascending offset.
pub(super) fn members(input: &Input) -> Result<Vec<Member>> {
    let read;
    let bytes = match input.map() {
        Some(bytes) => bytes,
        None => {
            read = input.read_all(READ_LIMIT)?;
            &read
        }
    };
    let archive = ZipArchive::from_slice(bytes).map_err(broken)?;
    let mut members = Vec::new();
    let mut spans = Vec::new();
    let mut seen = HashSet::new();
    for entry in archive.entries() {
        let entry = entry.map_err(broken)?;
        if members.len() == MEMBER_LIMIT {
            return Err(Error::new(Reason::TooMany {
                what: "members",
                limit: MEMBER_LIMIT,
            }));
        }
        let path = entry.file_path();
        let name = std::str::from_utf8(path.as_bytes())
            .map_err(|_| broken("a name is not UTF-8"))?
            .to_owned();
        let fail = |error: Error| Err(error.on(&*name));
        if !seen.insert(name.clone()) {
            return fail(Error::new(Reason::DuplicateKey { key: name.clone() }));
        }
        if entry.flags().is_encrypted() {
            let problem = "it is encrypted".to_owned();
            return fail(Error::new(Reason::Stored { problem }));
        }
        let method = entry.compression_method();
        if method != CompressionMethod::STORE && method != CompressionMethod::DEFLATE {
            let problem = format!("its compression ({method:?}) is not supported");
            return fail(Error::new(Reason::Stored { problem }));
        }
        let place = archive.get_entry(entry.wayfinder()).map_err(broken)?;
        if place.local_header().file_path().as_bytes() != path.as_bytes() {
            return fail(broken("two headers of one member have different names"));
        }
        let (start, end) = place.compressed_data_range();
        let member = Member {
            deflated: method == CompressionMethod::DEFLATE,
            offset: start,
            compressed: end - start,
            size: entry.uncompressed_size_hint(),
            crc: entry.crc32(),
            name,
        };
        if !member.deflated && member.size != member.compressed {
            return Err(broken("a stored member has two sizes").on(member.name));
        }
        spans.push((entry.local_header_offset(), end, members.len()));
        members.push(member);
    }
    if members.len() as u64 != archive.entries_hint() {
        return Err(broken(
            "its directory does not hold as many members as it says",
        ));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].1 > pair[1].0 {
            let other = members[pair[0].2].name.clone();
            return Err(Error::new(Reason::Overlap { other }).on(&*members[pair[1].2].name));
        }
    }
    if spans
        .last()
        .is_some_and(|last| last.1 > archive.directory_offset())
    {
        return Err(broken("a member reaches into the directory"));
    }
    members.sort_by_key(|member| member.offset);
    Ok(members)
}

/// Inflates a member of at most `limit` bytes, and checks its size and its checksum.
pub(super) fn inflate(input: &Input, member: &Member, limit: u64) -> Result<Vec<u8>> {
    let fail = |error: Error| Err(error.on(&*member.name));
    if member.size > limit {
        return fail(Error::new(Reason::FileTooLarge {
            bytes: member.size,
            limit,
        }));
    }
    if member.size > member.compressed.saturating_mul(DEFLATE_RATIO) {
        return fail(broken("a member is too small for the size that it states"));
    }
    let read;
    let start = member.offset as usize;
    let compressed = match input.map() {
        Some(bytes) => &bytes[start..start + member.compressed as usize],
        None => {
            let mut bytes = vec![0; member.compressed as usize];
            input.read_at(&mut bytes, member.offset)?;
            read = bytes;
            &read
        }
    };
    let mut bytes = Vec::with_capacity(member.size as usize);
    // One byte more than there may be tells a member that goes on.
    let mut decoder = flate2::read::DeflateDecoder::new(compressed);
    if let Err(problem) = (&mut decoder).take(member.size + 1).read_to_end(&mut bytes) {
        return fail(broken(problem));
    }
    if bytes.len() as u64 != member.size || decoder.total_in() != member.compressed {
        return fail(broken("a member does not have the size that it states"));
    }
    let mut crc = flate2::Crc::new();
    crc.update(&bytes);
    if crc.sum() != member.crc {
        return fail(Error::new(Reason::Checksum));
    }
    Ok(bytes)
}
