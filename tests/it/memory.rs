//! The largest files that the limits admit, and larger ones: memory and time are limited by the kernel, so a
//! run that needs more dies of it.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use crate::hostile_support::{Member, Room, zip};

/// Most memory of a run: private memory that can be written, in KiB.
const MEMORY: usize = 200_000;

/// Most seconds of processor time.
const SECONDS: usize = if cfg!(debug_assertions) { 4 } else { 1 };

/// Inspects a file under the limits and gives the exit code; none if it died.
fn inspect(path: &Path) -> Option<i32> {
    let limits = format!("ulimit -d {MEMORY} && ulimit -t {SECONDS} && exec \"$0\" inspect \"$1\"");
    let run = Command::new("sh")
        .args(["-c", &limits, env!("CARGO_BIN_EXE_loratool")])
        .arg(path)
        .output()
        .unwrap();
    println!(
        "{}: {}",
        path.display(),
        String::from_utf8_lossy(&run.stderr)
    );
    run.status.code()
}

fn file(room: &Room, name: &str, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) {
    let mut file = BufWriter::new(std::fs::File::create(room.path(name)).unwrap());
    write(&mut file).unwrap();
    file.flush().unwrap();
}

/// A safetensors file of one header text.
fn header(room: &Room, name: &str, parts: impl Iterator<Item = String>, ends: [&str; 2]) {
    let text: Vec<String> = parts.collect();
    let text = format!("{}{}{}", ends[0], text.join(","), ends[1]);
    file(room, name, |file| {
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())
    });
}

/// A GGUF file of quantised tensors without elements, whose names have a length.
fn infos(room: &Room, name: &str, length: usize) {
    const COUNT: u64 = 199_000;
    file(room, name, |file| {
        file.write_all(b"GGUF")?;
        file.write_all(&3u32.to_le_bytes())?;
        file.write_all(&COUNT.to_le_bytes())?;
        file.write_all(&0u64.to_le_bytes())?;
        for number in 0..COUNT {
            file.write_all(&(length as u64).to_le_bytes())?;
            file.write_all(format!("{number:0>length$}").as_bytes())?;
            // One axis of no elements, Q4_0, at the start of the data.
            file.write_all(&1u32.to_le_bytes())?;
            file.write_all(&0u64.to_le_bytes())?;
            file.write_all(&2u32.to_le_bytes())?;
            file.write_all(&0u64.to_le_bytes())?;
        }
        // The data start at a multiple of 32.
        let end = 24 + COUNT as usize * (8 + length + 4 + 8 + 4 + 8);
        file.write_all(&vec![0; end.next_multiple_of(32) - end])
    });
}

/// An array of numpy in Fortran order.
fn fortran(rows: usize, columns: usize) -> Vec<u8> {
    let header =
        format!("{{'descr': '|u1', 'fortran_order': True, 'shape': ({rows}, {columns}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\0".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + rows * columns, 0);
    bytes
}

/// An archive of torch with one pickle.
fn pickle(body: Vec<u8>) -> Vec<u8> {
    let bytes = [b"\x80\x02".to_vec(), body, b".".to_vec()].concat();
    zip(&[Member::stored("x/data.pkl", bytes)]).bytes
}

#[test]
fn the_worst_files_are_read_or_refused_in_little_memory_and_time() {
    const COUNT: usize = 199_000;
    let room = Room::new();
    let entry = |number: usize, length: usize| {
        format!("\"{number:0>length$}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}")
    };
    let pair =
        |number: usize, length: usize| format!("\"{number:0>length$}\":\"{number:0>length$}\"");
    let metadata = ["{\"__metadata__\":{", "}}"];
    header(
        &room,
        "long-names.safetensors",
        (0..COUNT).map(|n| entry(n, 420)),
        ["{", "}"],
    );
    header(
        &room,
        "names.safetensors",
        (0..COUNT).map(|n| entry(n, 150)),
        ["{", "}"],
    );
    header(
        &room,
        "metadata.safetensors",
        (0..COUNT).map(|n| pair(n, 240)),
        metadata,
    );
    header(
        &room,
        "one.safetensors",
        std::iter::once(format!("\"k\":\"{}\"", "v".repeat(99_000_000))),
        metadata,
    );
    infos(&room, "long-names.gguf", 450);
    infos(&room, "names.gguf", 150);
    room.write("large.npy", fortran(1 << 10, 120 << 10));
    room.write("fortran.npy", fortran(1 << 10, 60 << 10));
    let zeros = Member::deflated("a.npy", fortran(1 << 10, 120 << 10));
    room.write("zeros.npz", zip(&[zeros]).bytes);
    let memo = (0..1_000_001u32)
        .flat_map(|n| [&b"r"[..], &n.wrapping_mul(0x9e37_79b9).to_le_bytes()].concat());
    room.write("memo.pt", pickle([b"N".to_vec(), memo.collect()].concat()));
    room.write(
        "tuples.pt",
        pickle([b"N".to_vec(), vec![0x85; 1_000_001]].concat()),
    );
    let names = room.names();
    assert_eq!(names.len(), 11);
    for name in names {
        let code = inspect(&room.path(&name));
        let admitted = ["names.safetensors", "names.gguf", "fortran.npy"].contains(&&*name);
        let refused = |code: i32| (1..=99).contains(&code);
        let is_right = code.is_some_and(|code| if admitted { code == 0 } else { refused(code) });
        assert!(is_right, "{name}: {code:?}");
    }
}
