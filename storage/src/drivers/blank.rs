//! Whether a file or device is free to be made a pool of.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    os::fd::AsFd as _,
};

use crate::tree::data::next_data;

/// How much of its beginning is looked at, in bytes.
const LOOK_BYTES: u64 = 1024 * 1024;

/// Tells whether nothing was written to a file, and whether a device begins with zeroes. A file that somebody wrote to is not
/// ours even where its beginning is zero. How many blocks it takes does not tell: see [`crate::tree::entry::Stat`].
pub(super) fn is_blank(file: &mut File) -> io::Result<bool> {
    let stat = file.metadata()?;
    if stat.is_file() && next_data(file.as_fd(), 0, stat.len())?.is_some() {
        return Ok(false);
    }
    let mut beginning = Vec::new();
    file.rewind()?;
    file.take(LOOK_BYTES).read_to_end(&mut beginning)?;
    Ok(beginning.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_file_is_blank_until_somebody_writes_to_it() {
        let length = 64 * LOOK_BYTES;
        for (at, bytes) in [(0, &b"photographs"[..]), (length - 11, b"photographs"), (length / 2, &[0; 4096])] {
            let mut file = tempfile::tempfile().unwrap();
            assert!(is_blank(&mut file).unwrap(), "empty");
            file.set_len(length).unwrap();
            assert!(is_blank(&mut file).unwrap(), "a hole");
            file.write_all_at(bytes, at).unwrap();
            // Before and after it is written back.
            assert!(!is_blank(&mut file).unwrap(), "{at}");
            file.sync_all().unwrap();
            assert!(!is_blank(&mut file).unwrap(), "{at}");
        }
    }
}
