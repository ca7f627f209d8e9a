//! Files for volumes: the same seed makes the same bytes.

use std::{
    collections::BTreeSet,
    fs,
    io::{Seek, SeekFrom, Write},
    path::Path,
};

use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

/// Returns the seed of a random test: `FLOCKER_SEED`, else a new one. Prints it, so that a failure can be repeated.
pub fn seed() -> u64 {
    let given = std::env::var("FLOCKER_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| rand::rng().random());
    eprintln!("seed: repeat with FLOCKER_SEED={seed}");
    seed
}

/// Returns a source of random numbers that a seed repeats.
pub fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Writes a file of bytes that do not compress.
pub fn write_random(path: &Path, seed: u64, bytes: u64) {
    let mut random = random(seed);
    let mut file = fs::File::create(path).unwrap_or_else(|error| panic!("create {}: {error}", path.display()));
    let mut block = vec![0; 1 << 16];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(block.len() as u64) as usize;
        random.fill_bytes(&mut block[..part]);
        file.write_all(&block[..part]).expect("write a test file");
        left -= part as u64;
    }
}

/// Writes `count` small files (1 to `up_to` bytes) below a folder, a hundred in each subfolder.
pub fn write_small_files(folder: &Path, seed: u64, count: u32, up_to: usize) {
    let mut random = random(seed);
    let mut block = vec![0; up_to];
    for number in 0..count {
        let subfolder = folder.join(format!("d{:04}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&subfolder).expect("make a folder");
        }
        let size = random.random_range(1..=up_to);
        random.fill_bytes(&mut block[..size]);
        fs::write(subfolder.join(format!("f{number:06}")), &block[..size]).expect("write a small file");
    }
}

/// Writes a file of which half compresses away: 4 KiB of noise and 4 KiB of text in turn.
pub fn write_half_random(path: &Path, seed: u64, bytes: u64) {
    const PART: usize = 4096;
    let mut random = random(seed);
    let mut file = fs::File::create(path).unwrap_or_else(|error| panic!("create {}: {error}", path.display()));
    let text = b"the quick brown fox jumps over the lazy dog; ";
    let mut block: Vec<u8> = text.iter().copied().cycle().take(16 * PART).collect();
    let mut left = bytes;
    while left > 0 {
        block.chunks_mut(PART).step_by(2).for_each(|part| random.fill_bytes(part));
        let part = left.min(block.len() as u64) as usize;
        file.write_all(&block[..part]).expect("write a test file");
        left -= part as u64;
    }
}

/// Overwrites `count` blocks of 4 KiB of a file at random places. Returns how many different ones they were.
pub fn scribble(path: &Path, seed: u64, count: u32) -> u64 {
    let mut random = random(seed);
    let mut file = fs::File::options().write(true).open(path).expect("open a file to change");
    let blocks = (file.metadata().expect("stat").len() / 4096).max(1);
    let mut block = [0; 4096];
    let mut changed = BTreeSet::new();
    for _ in 0..count {
        random.fill_bytes(&mut block);
        let number = random.random_range(0..blocks);
        changed.insert(number);
        file.seek(SeekFrom::Start(number * 4096)).expect("seek");
        file.write_all(&block).expect("overwrite a block");
    }
    changed.len() as u64
}

/// Fills a folder with a small ordinary tree: text, folders, links, a mode, about `kibibytes` in all.
pub fn write_ordinary_tree(folder: &Path, seed: u64, kibibytes: u64) {
    use std::os::unix::fs::{PermissionsExt, symlink};
    write_small_files(&folder.join("many"), seed, 120, 2048);
    write_random(&folder.join("data.bin"), seed ^ 1, kibibytes << 10);
    fs::write(folder.join("script.sh"), "#!/bin/sh\necho hello\n").expect("write a script");
    fs::set_permissions(folder.join("script.sh"), fs::Permissions::from_mode(0o750)).expect("set a mode");
    fs::hard_link(folder.join("script.sh"), folder.join("many/again.sh")).expect("hard link");
    symlink("script.sh", folder.join("link")).expect("symlink");
    fs::create_dir(folder.join("empty")).expect("make a folder");
}
