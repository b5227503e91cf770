//! A zip archive, as `torch.save` and `numpy.savez` write it, read strictly.
//!
//! Source: PKWARE APPNOTE 6.3.10, and `caffe2/serialize/inline_container.cc` (what torch writes: members
//! that are stored as they are, data descriptors, zip64 where needed, no comment). Readers of zip differ
//! in what they accept, so everything that could be read in two ways is refused: a comment at the end, two
//! members of one name, names that are cut or replaced, headers or descriptors that disagree with the
//! directory, members that overlap, and bytes that belong to no member.

use std::collections::HashMap;
use std::sync::Arc;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use super::NAME_LIMIT;
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// Most members.
const MEMBER_LIMIT: usize = 100_000;

/// Largest central directory.
const DIRECTORY_LIMIT: u64 = 64 << 20;

/// Most bytes that deflate makes of one: a match of 258 bytes takes two bits.
const RATIO_LIMIT: u64 = 1032;

/// General purpose flags: what follows the data of a member, and in what its name is written.
const SIZES_FOLLOW: u16 = 1 << 3;
const UTF_8: u16 = 1 << 11;

/// Flags of the three ways to encrypt.
const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;

/// Extra fields: sizes of 64 bits, and another name.
const LONG_SIZES: u16 = 1;
const OTHER_NAME: u16 = 0x7075;

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
        let bytes = taken.iter().rev();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
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
    let length = usize::from(Fields(head.get(26..28)?).two());
    let name = head.strip_prefix(b"PK\x03\x04")?.get(LOCAL - 4..)?;
    name.get(..length).or(Some(name))
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
        let mut order: Vec<&mut Member> = self.members.iter_mut().collect();
        order.sort_by_key(|member| member.header);
        let mut starts: Vec<u64> = order.iter().map(|member| member.header).collect();
        starts.push(end);
        if starts.first() != Some(&0) {
            return wrong("it does not start with a member");
        }
        for (member, next) in order.into_iter().zip(starts.into_iter().skip(1)) {
            let opened = member.open(&self.input, next);
            opened.map_err(|e| e.on(&*member.name))?;
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
        let member = self.members.get(*place)?;
        (member.name == name).then_some(member)
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
            if member.size / RATIO_LIMIT > member.compressed {
                return fail(Reason::Zip {
                    problem: "it claims more than its compressed data can hold",
                });
            }
            let mut packed = vec![0; member.compressed as usize];
            self.input.read_at(&mut packed, member.start)?;
            let mut bytes = vec![0; member.size as usize];
            if !inflate(&packed, &mut bytes) {
                return fail(Reason::Zip {
                    problem: "its compressed data are wrong, or more or less than it claims",
                });
            }
            bytes
        } else {
            let mut bytes = vec![0; member.size as usize];
            self.input.read_at(&mut bytes, member.start)?;
            bytes
        };
        if crc32fast::hash(&bytes) != member.checksum {
            return fail(Reason::Checksum);
        }
        Ok(bytes)
    }

    /// Compares every stored member with its checksum, piece by piece.
    pub(super) fn verify(&self, watch: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut buffer = Vec::new();
        for member in self.members.iter().filter(|member| !member.deflated) {
            buffer.resize(1 << 20, 0);
            let mut hasher = crc32fast::Hasher::new();
            let mut done = 0;
            while done < member.size {
                watch()?;
                let left = member.size - done;
                if left < buffer.len() as u64 {
                    buffer.truncate(left as usize);
                }
                self.input.read_at(&mut buffer, member.start + done)?;
                hasher.update(&buffer);
                done += buffer.len() as u64;
            }
            if hasher.finalize() != member.checksum {
                return Err(Error::new(Reason::Checksum).on(&*member.name));
            }
        }
        Ok(())
    }
}

/// Fills `bytes` from compressed data, which must hold that much and nothing else.
fn inflate(packed: &[u8], bytes: &mut [u8]) -> bool {
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let inflated = decompress(&mut DecompressorOxide::new(), packed, bytes, 0, flags);
    inflated == (TINFLStatus::Done, packed.len(), bytes.len())
}

impl Member {
    /// Finds the first byte of the data. The member reaches to `next`, neither further nor less far.
    fn open(&mut self, input: &Input, next: u64) -> Result<()> {
        const OVERLAP: &str = "it reaches into what follows it";
        let length = (LOCAL + self.name.len()) as u64;
        // One that lies behind what follows has no room at all.
        let room = next.saturating_sub(self.header);
        if length > room {
            return wrong(OVERLAP);
        }
        let mut bytes = vec![0; length as usize];
        input.read_at(&mut bytes, self.header)?;
        let mut fields = Fields(&bytes);
        let signature = fields.four();
        let _version = fields.two();
        let (flags, method) = (fields.two(), fields.two());
        let _time_and_date = fields.four();
        let checksum = fields.four();
        let (mut compressed, mut size) = (u64::from(fields.four()), u64::from(fields.four()));
        let (name, extra) = (fields.two(), fields.two());
        if signature != 0x0403_4b50 {
            return wrong("a member does not start with a header");
        }
        let data = length + u64::from(extra);
        if data
            .checked_add(self.compressed)
            .is_none_or(|end| end > room)
        {
            return wrong(OVERLAP);
        }
        let mut extra = vec![0; extra.into()];
        input.read_at(&mut extra, self.header + length)?;
        lengthen(&extra, [&mut size, &mut compressed, &mut 0])?;
        // What follows the data is not said before them.
        let agrees =
            |here: u64, there: u64| here == there || here == 0 && flags & SIZES_FOLLOW != 0;
        if usize::from(name) != self.name.len()
            || fields.0 != self.name.as_bytes()
            || flags != self.flags
            || method != if self.deflated { 8 } else { 0 }
            || !agrees(checksum.into(), self.checksum.into())
            || !agrees(compressed, self.compressed)
            || !agrees(size, self.size)
        {
            return wrong("a header and the directory disagree");
        }
        self.start = self.header + data;
        self.descriptor(input, self.start + self.compressed, next)
    }

    /// Compares what lies between the data and what follows with the checksum and the sizes.
    fn descriptor(&self, input: &Input, start: u64, end: u64) -> Result<()> {
        // A signature or none, and sizes of four bytes or eight.
        let (signed, wide) = match (end - start, self.flags & SIZES_FOLLOW != 0) {
            (0, false) => return Ok(()),
            (12, true) => (false, 4),
            (16, true) => (true, 4),
            (20, true) => (false, 8),
            (24, true) => (true, 8),
            _ => return wrong("the bytes behind it belong to no member"),
        };
        let mut bytes = vec![0; (end - start) as usize];
        input.read_at(&mut bytes, start)?;
        let mut fields = Fields(&bytes);
        if signed && fields.four() != 0x0807_4b50
            || fields.four() != self.checksum
            || fields.number(wide) != self.compressed
            || fields.number(wide) != self.size
        {
            return wrong("what follows its data and the directory disagree");
        }
        Ok(())
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
    // Python's reader ends a name at a zero, and reads one that is not said to be UTF-8 as code page 437.
    if name.contains('\0') || !name.is_ascii() && flags & UTF_8 == 0 {
        return fail("readers disagree on its name");
    }
    let sizes = [&mut size, &mut compressed, &mut header];
    lengthen(extra, sizes).map_err(|e| e.on(name))?;
    let refuse = |what| Err(Error::new(Reason::ZipMember { what }).on(name));
    if flags & ENCRYPTED != 0 {
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

/// Takes those of size, compressed size and place that do not fit into 32 bits from the extra field that
/// has them, in this order.
fn lengthen(mut extra: &[u8], numbers: [&mut u64; 3]) -> Result<()> {
    let mut long = None;
    // Fewer than four bytes are no field; writers pad with zeros.
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let mut fields = Fields(head);
        let (kind, length) = (fields.two(), fields.two());
        let Some((data, rest)) = rest.split_at_checked(length.into()) else {
            return wrong("an extra field of it ends too early");
        };
        if kind == OTHER_NAME {
            return wrong("readers disagree on its name");
        }
        if kind == LONG_SIZES && long.replace(Fields(data)).is_some() {
            return wrong("its 64-bit sizes are there twice");
        }
        extra = rest;
    }
    let Some(mut long) = long else {
        return Ok(());
    };
    for number in numbers {
        if *number == u64::from(u32::MAX) {
            if long.0.len() < 8 {
                return wrong("a 64-bit size is missing");
            }
            *number = long.number(8);
        }
    }
    Ok(())
}
