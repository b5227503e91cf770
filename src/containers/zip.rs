//! A zip archive, as `torch.save` and `numpy.savez` write it, read strictly.
//!
//! Source: PKWARE APPNOTE 6.3.10, and `caffe2/serialize/inline_container.cc` (what torch writes: members
//! that are stored as they are, data descriptors, zip64 where needed, no comment). Readers of zip differ
//! in what they accept, so everything that could be read in two ways is refused: a comment at the end, two
//! members of one name, local headers that disagree with the directory, members that overlap, and bytes
//! that belong to no member.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// Most members.
const MEMBER_LIMIT: usize = 100_000;

/// Largest central directory.
const DIRECTORY_LIMIT: u64 = 64 << 20;

/// Longest name of a member.
const NAME_LIMIT: usize = 4096;

/// A data descriptor with its signature and two sizes of eight bytes.
const DESCRIPTOR: u64 = 24;

const END: u64 = 22;
const END_64: u64 = 56;
const LOCATOR: u64 = 20;
const CENTRAL: usize = 46;
const LOCAL: usize = 30;

/// Most bytes of one file that are held in memory because they do not lie in it as they are: members
/// that are compressed, and tensors that are no single piece.
pub(super) const MEMORY_LIMIT: u64 = 128 << 20;

pub(super) fn beyond_memory() -> Reason {
    Reason::TooMany {
        what: "bytes that are compressed or lie scattered",
        limit: MEMORY_LIMIT as usize,
    }
}

/// A member.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) deflated: bool,
    checksum: u32,
    compressed: u64,
    pub(super) size: u64,
    flags: u16,
    header: u64,
    /// First byte of its data.
    pub(super) start: u64,
}

/// An archive, whose members are known and do not overlap.
pub(super) struct Archive {
    input: Arc<Input>,
    pub(super) members: Vec<Member>,
    by_name: HashMap<String, usize>,
}

fn wrong<T>(problem: &'static str) -> Result<T> {
    Err(Error::new(Reason::Zip { problem }))
}

/// Little-endian numbers, one after the other; what is missing is zero, so lengths are checked before.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn number(&mut self, size: usize) -> u64 {
        let (taken, rest) = self.0.split_at(size.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0; 8];
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    fn two(&mut self) -> u16 {
        self.number(2) as u16
    }

    fn four(&mut self) -> u32 {
        self.number(4) as u32
    }
}

/// The name of the first member, as far as the first bytes of a file hold it.
pub(super) fn first_name(head: &[u8]) -> Option<&[u8]> {
    let length = Fields(head.get(26..28)?).two();
    let name = head.strip_prefix(b"PK\x03\x04")?.get(LOCAL - 4..)?;
    Some(&name[..name.len().min(length.into())])
}

impl Archive {
    pub(super) fn read(input: Arc<Input>) -> Result<Self> {
        let (directory, count) = directory(&input)?;
        let mut bytes = vec![0; (directory.1 - directory.0) as usize];
        input.read_at(&mut bytes, directory.0)?;
        let mut members = Vec::with_capacity(count.min(bytes.len() / CENTRAL));
        let mut rest = bytes.as_slice();
        for _ in 0..count {
            members.push(entry(&mut rest)?);
        }
        if !rest.is_empty() {
            return wrong("its directory holds more than its members");
        }
        let mut by_name = HashMap::with_capacity(members.len());
        for (place, member) in members.iter().enumerate() {
            // Torch's reader does not tell letters of different case apart.
            if by_name.insert(member.name.to_lowercase(), place).is_some() {
                return Err(Error::new(Reason::DuplicateMember).on(&*member.name));
            }
        }
        let mut archive = Archive {
            input,
            members,
            by_name,
        };
        archive.locate(directory.0)?;
        Ok(archive)
    }

    /// Compares the local headers with the directory, and the members with each other.
    fn locate(&mut self, end: u64) -> Result<()> {
        let mut order: Vec<usize> = (0..self.members.len()).collect();
        order.sort_by_key(|place| self.members[*place].header);
        let mut free = 0u64;
        let mut gap = 0;
        for place in order {
            let member = &mut self.members[place];
            if member.header < free {
                return Err(Error::new(Reason::Zip {
                    problem: "two members overlap",
                })
                .on(&*member.name));
            }
            if member.header - free > gap {
                return Err(Error::new(Reason::Zip {
                    problem: "bytes before this member belong to none",
                })
                .on(&*member.name));
            }
            free = member
                .open(&self.input, end)
                .map_err(|e| e.on(&*member.name))?;
            gap = if member.flags & 8 != 0 { DESCRIPTOR } else { 0 };
        }
        if end - free > gap {
            return wrong("bytes before its directory belong to no member");
        }
        Ok(())
    }

    /// The file.
    pub(super) fn input(&self) -> &Arc<Input> {
        &self.input
    }

    /// The member of a name.
    pub(super) fn member(&self, name: &str) -> Option<&Member> {
        let place = self.by_name.get(&name.to_lowercase())?;
        Some(&self.members[*place]).filter(|member| member.name == name)
    }

    /// The bytes of a member, compared with their checksum; `budget` is what may be allocated, and is
    /// reduced.
    pub(super) fn bytes(&self, member: &Member, budget: &mut u64) -> Result<Vec<u8>> {
        let fail = |reason| Err(Error::new(reason).on(&*member.name));
        if member.size > *budget {
            return fail(beyond_memory());
        }
        *budget -= member.size;
        let bytes = if member.deflated {
            if member.compressed > *budget {
                return fail(beyond_memory());
            }
            let mut packed = vec![0; member.compressed as usize];
            self.input.read_at(&mut packed, member.start)?;
            // One byte more than claimed shows that there is more.
            let limit = (member.size as usize).saturating_add(1);
            match miniz_oxide::inflate::decompress_to_vec_with_limit(&packed, limit) {
                Ok(bytes) => bytes,
                Err(_) => {
                    return fail(Reason::Zip {
                        problem: "its compressed data are wrong, or more than it claims",
                    });
                }
            }
        } else {
            let mut bytes = vec![0; member.size as usize];
            self.input.read_at(&mut bytes, member.start)?;
            bytes
        };
        if bytes.len() as u64 != member.size {
            return fail(Reason::Zip {
                problem: "it has another size than it claims",
            });
        }
        if crc32fast::hash(&bytes) != member.checksum {
            return fail(Reason::Checksum);
        }
        Ok(bytes)
    }

    /// Compares every stored member with its checksum, piece by piece.
    pub(super) fn verify(&self, watch: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for member in self.members.iter().filter(|member| !member.deflated) {
            let mut hasher = crc32fast::Hasher::new();
            let mut done = 0;
            while done < member.size {
                watch()?;
                let count = (member.size - done).min(buffer.len() as u64) as usize;
                self.input
                    .read_at(&mut buffer[..count], member.start + done)?;
                hasher.update(&buffer[..count]);
                done += count as u64;
            }
            if hasher.finalize() != member.checksum {
                return Err(Error::new(Reason::Checksum).on(&*member.name));
            }
        }
        Ok(())
    }
}

impl Member {
    /// Finds the first byte of the data; returns the first byte behind them.
    fn open(&mut self, input: &Input, end: u64) -> Result<u64> {
        let length = (LOCAL + self.name.len()) as u64;
        if self
            .header
            .checked_add(length)
            .is_none_or(|stop| stop > end)
        {
            return wrong("a member lies behind the end");
        }
        let mut bytes = vec![0; length as usize];
        input.read_at(&mut bytes, self.header)?;
        let mut fields = Fields(&bytes);
        let signature = fields.four();
        let _version = fields.two();
        let (flags, method) = (fields.two(), fields.two());
        let _time_and_date = fields.four();
        let (checksum, compressed, size) = (fields.four(), fields.four(), fields.four());
        let (name, extra) = (fields.two(), fields.two());
        if signature != 0x0403_4b50 {
            return wrong("a member does not start with a header");
        }
        let same_name =
            usize::from(name) == self.name.len() && bytes[LOCAL..] == *self.name.as_bytes();
        if !same_name
            || flags != self.flags
            || (method == 8) != self.deflated
            || !matches!(method, 0 | 8)
        {
            return wrong("a header and the directory disagree");
        }
        // A member whose sizes follow its data says nothing here, and a large one in its extra field.
        let agrees = |here: u32, there: u64| here == u32::MAX || u64::from(here) == there;
        let sizes = checksum == self.checksum
            && agrees(compressed, self.compressed)
            && agrees(size, self.size);
        if flags & 8 == 0 && !sizes {
            return wrong("a header and the directory disagree");
        }
        self.start = self.header + length + u64::from(extra);
        match self.start.checked_add(self.compressed) {
            Some(stop) if stop <= end => Ok(stop),
            _ => wrong("a member lies behind the end"),
        }
    }
}

/// The bytes of the central directory, and the number of members.
fn directory(input: &Input) -> Result<((u64, u64), usize)> {
    let length = input.len();
    if length < END {
        return wrong("its end is missing; the file is cut");
    }
    let mut bytes = [0; END as usize];
    input.read_at(&mut bytes, length - END)?;
    let mut fields = Fields(&bytes);
    if fields.four() != 0x0605_4b50 {
        return wrong("its end is missing; the file is cut, or bytes follow it");
    }
    let (disk, first_disk) = (fields.two(), fields.two());
    let (here, count) = (fields.two(), fields.two());
    let (size, start) = (fields.four(), fields.four());
    if disk != 0 || first_disk != 0 || here != count || fields.two() != 0 {
        return wrong("it has several parts, or a comment");
    }
    let mut end = length - END;
    let mut found = (u64::from(count), u64::from(size), u64::from(start));
    let large = match end.checked_sub(LOCATOR) {
        Some(at) => {
            let mut bytes = [0; LOCATOR as usize];
            input.read_at(&mut bytes, at)?;
            let mut fields = Fields(&bytes);
            let is_locator = fields.four() == 0x0706_4b50;
            let disk = fields.four();
            let place = fields.number(8);
            (is_locator && disk == 0).then_some((at, place))
        }
        None => None,
    };
    if let Some((locator, place)) = large {
        if locator.checked_sub(END_64) != Some(place) {
            return wrong("its 64-bit end is not where it should be");
        }
        let mut bytes = [0; END_64 as usize];
        input.read_at(&mut bytes, place)?;
        let mut fields = Fields(&bytes);
        let (signature, rest) = (fields.four(), fields.number(8));
        let _versions = fields.four();
        let disks = (fields.four(), fields.four());
        let (here, all) = (fields.number(8), fields.number(8));
        let wide = (all, fields.number(8), fields.number(8));
        if signature != 0x0606_4b50 || rest != END_64 - 12 || disks != (0, 0) || here != all {
            return wrong("its 64-bit end is damaged");
        }
        let agrees = |short: u64, most: u64, long: u64| short == most || short == long;
        if !agrees(found.0, u16::MAX.into(), wide.0)
            || !agrees(found.1, u32::MAX.into(), wide.1)
            || !agrees(found.2, u32::MAX.into(), wide.2)
        {
            return wrong("its two ends disagree");
        }
        found = wide;
        end = place;
    }
    let (count, size, start) = found;
    if start.checked_add(size) != Some(end) {
        return wrong("its directory is not where it should be");
    }
    if size > DIRECTORY_LIMIT {
        return Err(Error::new(Reason::HeaderTooLarge {
            bytes: size,
            limit: DIRECTORY_LIMIT,
        }));
    }
    if count > MEMBER_LIMIT as u64 {
        return Err(Error::new(Reason::TooMany {
            what: "members of the archive",
            limit: MEMBER_LIMIT,
        }));
    }
    Ok(((start, end), count as usize))
}

/// One entry of the central directory.
fn entry(rest: &mut &[u8]) -> Result<Member> {
    let Some((fixed, variable)) = rest.split_at_checked(CENTRAL) else {
        return wrong("its directory ends too early");
    };
    let mut fields = Fields(fixed);
    let signature = fields.four();
    let _versions = fields.four();
    let (flags, method) = (fields.two(), fields.two());
    let _time_and_date = fields.four();
    let checksum = fields.four();
    let (mut compressed, mut size) = (u64::from(fields.four()), u64::from(fields.four()));
    let (name, extra, comment) = (fields.two(), fields.two(), fields.two());
    let disk = fields.two();
    let _attributes = fields.number(6);
    let mut header = u64::from(fields.four());
    if signature != 0x0201_4b50 || disk != 0 {
        return wrong("its directory is damaged");
    }
    let Some((name, variable)) = variable.split_at_checked(name.into()) else {
        return wrong("its directory ends too early");
    };
    let Some((extra, variable)) = variable.split_at_checked(extra.into()) else {
        return wrong("its directory ends too early");
    };
    let Some((_, variable)) = variable.split_at_checked(comment.into()) else {
        return wrong("its directory ends too early");
    };
    *rest = variable;
    if name.len() > NAME_LIMIT {
        return Err(Error::new(Reason::NameTooLong {
            bytes: name.len(),
            limit: NAME_LIMIT,
        }));
    }
    let Ok(name) = std::str::from_utf8(name) else {
        return wrong("the name of a member is not valid UTF-8");
    };
    let fail = |problem| Err(Error::new(Reason::Zip { problem }).on(name));
    if let Some(long) = long_sizes(extra) {
        let mut long = Fields(long);
        for field in [&mut size, &mut compressed, &mut header] {
            if *field == u64::from(u32::MAX) {
                if long.0.len() < 8 {
                    return fail("a 64-bit size is missing");
                }
                *field = long.number(8);
            }
        }
    }
    let refuse = |what| Err(Error::new(Reason::ZipMember { what }).on(name));
    if flags & 1 != 0 || flags & (1 << 6) != 0 || flags & (1 << 13) != 0 {
        return refuse("encrypted");
    }
    let deflated = match method {
        0 => false,
        8 => true,
        _ => return refuse("compressed by another method than deflate"),
    };
    if !deflated && compressed != size {
        return fail("it is stored in more or fewer bytes than it has");
    }
    Ok(Member {
        name: name.to_owned(),
        deflated,
        checksum,
        compressed,
        size,
        flags,
        header,
        start: 0,
    })
}

/// The extra field with 64-bit sizes.
fn long_sizes(mut extra: &[u8]) -> Option<&[u8]> {
    loop {
        let (head, rest) = extra.split_at_checked(4)?;
        let mut fields = Fields(head);
        let (kind, length) = (fields.two(), fields.two());
        let (data, rest) = rest.split_at_checked(length.into())?;
        if kind == 1 {
            return Some(data);
        }
        extra = rest;
    }
}
