//! What a first push takes at least: each thing that has to be done with its bytes and files, done alone, in processor seconds.
//!
//! `cargo bench -p flocker-transport --bench floor`; `FLOCKER_BENCH_DIR` says where the data lies (the temporary folder when left out),
//! `FLOCKER_BENCH_MIB` and `FLOCKER_BENCH_FILES` how much there is. Both ends are on this machine, so the sum divided by its processors is how
//! long a push takes if no processor ever waits, nothing is copied between the parts and nothing else is done. docs/BENCHMARKS.md compares it
//! with what other tools take.
#![allow(clippy::unwrap_used)]

mod bare;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
};

use bare::*;
use rand::{Rng as _, RngCore, SeedableRng, rngs::StdRng};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, Timestamps, futimens, mkdirat, openat, statx},
    io::{read, write},
    time::{ClockId, Timespec, clock_gettime},
};

/// The level that a push settles on where processors are what it waits for.
const LEVEL: i32 = -10;
/// As the benchmark of pushes makes them.
const FILES_PER_FOLDER: u32 = 100;
const LONGEST_FILE: usize = 2000;
/// A record of the portable format beside the contents: name, mode, owner, time.
const RECORD: usize = 64;

#[tokio::main]
async fn main() {
    let text = |name: &str| std::env::var(name).ok();
    let number = |name: &str, otherwise: usize| text(name).and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (mebibytes, files) = (number("FLOCKER_BENCH_MIB", 1024), number("FLOCKER_BENCH_FILES", 50_000) as u32);
    let above = text("FLOCKER_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into);
    let folder = tempfile::tempdir_in(above).unwrap();
    rustls::crypto::aws_lc_rs::default_provider().install_default().unwrap();
    let processors = std::thread::available_parallelism().unwrap().get() as f64;

    println!("| what | processor seconds |\n|---|---:|");
    let sum = one_file(folder.path(), mebibytes).await;
    println!(
        "| **{mebibytes} MiB, half of it compressible**: sum; on {processors} processors | {sum:.2}; {:.2} s |",
        sum / processors
    );
    let sum = small_files(folder.path(), files).await;
    println!("| **{files} small files**: sum; on {processors} processors | {sum:.2}; {:.2} s |", sum / processors);
}

/// Does something, and prints what it took in processor seconds of this process, those of the kernel included.
fn row<T>(what: &str, sum: &mut f64, work: impl FnOnce() -> T) -> T {
    let before = processor_seconds();
    let done = work();
    let took = processor_seconds() - before;
    println!("| {what} | {took:.2} |");
    *sum += took;
    done
}

fn processor_seconds() -> f64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::ProcessCPUTime);
    tv_sec as f64 + tv_nsec as f64 / 1e9
}

/// Carries so many bytes that do not compress over a bare QUIC stream.
async fn carry(bytes: usize, sum: &mut f64) {
    let data = Repeat::of(1);
    let left = bytes.div_ceil(CHUNK);
    let before = processor_seconds();
    by_quic(Repeat { left, ..data }).await;
    let took = processor_seconds() - before;
    println!("| a bare QUIC stream of {} MB, both ends | {took:.2} |", bytes / 1_000_000);
    *sum += took;
}

async fn one_file(folder: &Path, mebibytes: usize) -> f64 {
    let (from, to) = (folder.join("from"), folder.join("to"));
    let count = mebibytes * 4;
    let mut chunk = half_random();
    let source = File::create(&from).unwrap();
    let mut random = StdRng::seed_from_u64(2);
    for at in 0..count {
        // No two chunks are the same.
        random.fill_bytes(&mut chunk[..64]);
        source.write_all_at(&chunk, (at * CHUNK) as u64).unwrap();
    }
    let (mut sum, source, target) = (0.0, File::open(&from).unwrap(), File::create(&to).unwrap());
    let mut compressor = zstd::bulk::Compressor::new(LEVEL).unwrap();
    let mut decompressor = zstd::bulk::Decompressor::new().unwrap();
    let mut packed = Vec::with_capacity(zstd::zstd_safe::compress_bound(CHUNK));
    let mut wire = 0;
    row("read the file", &mut sum, || {
        (0..count).for_each(|at| source.read_exact_at(&mut chunk, (at * CHUNK) as u64).unwrap());
    });
    row("compress it", &mut sum, || {
        for _ in 0..count {
            packed.clear();
            wire += compressor.compress_to_buffer(&chunk, &mut packed).unwrap();
        }
    });
    carry(wire, &mut sum).await;
    row("unpack it", &mut sum, || {
        for _ in 0..count {
            let mut unpacked = Vec::with_capacity(CHUNK);
            assert_eq!(decompressor.decompress_to_buffer(&packed, &mut unpacked).unwrap(), CHUNK);
        }
    });
    row("hash it once, to know that it is what was sent", &mut sum, || {
        let mut hasher = blake3::Hasher::new();
        for _ in 0..count {
            hasher.update(&chunk);
        }
        hasher.finalize()
    });
    row("write the file", &mut sum, || {
        (0..count).for_each(|at| target.write_all_at(&chunk, (at * CHUNK) as u64).unwrap());
        target.sync_all().unwrap();
    });
    sum
}

/// 4 KiB of noise and 4 KiB of text in turn.
fn half_random() -> Vec<u8> {
    let text = b"the quick brown fox jumps over the lazy dog; ";
    let mut chunk: Vec<u8> = text.iter().copied().cycle().take(CHUNK).collect();
    let mut random = StdRng::seed_from_u64(1);
    chunk.chunks_mut(4096).step_by(2).for_each(|part| random.fill_bytes(part));
    chunk
}

async fn small_files(folder: &Path, files: u32) -> f64 {
    let (from, to) = (folder.join("a"), folder.join("b"));
    let mut random = StdRng::seed_from_u64(3);
    let mut noise = vec![0; LONGEST_FILE];
    random.fill_bytes(&mut noise);
    fs::create_dir_all(&to).unwrap();
    let sizes: Vec<usize> = (0..files).map(|_| random.random_range(1..=LONGEST_FILE)).collect();
    for folder in 0..files.div_ceil(FILES_PER_FOLDER) {
        fs::create_dir_all(from.join(format!("d{folder:05}"))).unwrap();
    }
    let place = |number: u32| (format!("d{:05}", number / FILES_PER_FOLDER), format!("f{number:06}"));
    for (number, size) in (0..).zip(&sizes) {
        let (folder, name) = place(number);
        fs::write(from.join(folder).join(name), &noise[..*size]).unwrap();
    }
    let folders = OFlags::RDONLY | OFlags::DIRECTORY;
    let (a, b) =
        (openat(CWD, &from, folders, Mode::empty()).unwrap(), openat(CWD, &to, folders, Mode::empty()).unwrap());
    let mut sum = 0.0;
    let mut buffer = vec![0; LONGEST_FILE];
    row("look at each file, open, read and close it", &mut sum, || {
        for first in (0..files).step_by(FILES_PER_FOLDER as usize) {
            let inside = openat(&a, place(first).0, folders, Mode::empty()).unwrap();
            for number in first..files.min(first + FILES_PER_FOLDER) {
                let (_, name) = place(number);
                statx(&inside, &name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS).unwrap();
                let file = openat(&inside, &name, OFlags::RDONLY | OFlags::NOFOLLOW, Mode::empty()).unwrap();
                assert_eq!(read(&file, &mut buffer).unwrap(), sizes[number as usize]);
            }
        }
    });
    carry(sizes.iter().map(|size| size + RECORD).sum(), &mut sum).await;
    row("hash what each has, to know that it is what was sent", &mut sum, || {
        sizes.iter().map(|size| blake3::hash(&noise[..*size]).as_bytes()[0]).fold(0, |all, byte| all ^ byte)
    });
    row("make each file, write it, set its time, look at it and close it", &mut sum, || {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 1, tv_nsec: 1 },
            last_modification: Timespec { tv_sec: 1, tv_nsec: 1 },
        };
        for first in (0..files).step_by(FILES_PER_FOLDER as usize) {
            let (folder, _) = place(first);
            mkdirat(&b, &folder, Mode::RWXU).unwrap();
            let inside = openat(&b, &folder, folders, Mode::empty()).unwrap();
            for number in first..files.min(first + FILES_PER_FOLDER) {
                let (_, name) = place(number);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let file = openat(&inside, &name, flags, Mode::RUSR | Mode::WUSR).unwrap();
                write(&file, &noise[..sizes[number as usize]]).unwrap();
                futimens(&file, &times).unwrap();
                statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).unwrap();
            }
        }
    });
    sum
}
