//! Compression of tarballs: what is written as asked for, and told by its first bytes where it is read.

use std::{
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
};

use flate2::{bufread::MultiGzDecoder, write::GzEncoder};
use serde::{Deserialize, Serialize};

use super::BUFFER;

/// zstd's own default: about three times as dense as level 1 of gzip at its speed.
const ZSTD_LEVEL: i32 = 3;

/// The largest window that a zstd stream may ask for, as a power of two: 128 MiB, as `zstd -d` allows.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a tarball is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By zstd.
    Zstd,
    /// By gzip.
    Gzip,
}

impl Compression {
    /// Tells it by the end of a file's name: `.tar.zst` and `.tzst`, `.tar.gz` and `.tgz`, all others plain.
    pub fn of_file_name(name: &str) -> Self {
        let ends = |endings: [&str; 2]| endings.iter().any(|ending| name.ends_with(ending));
        match () {
            () if ends([".zst", ".tzst"]) => Self::Zstd,
            () if ends([".gz", ".tgz"]) => Self::Gzip,
            () => Self::None,
        }
    }

    /// Returns the word that a user types.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// Compresses what is written. Without [`finish`](Self::finish) the stream is incomplete, and readers notice.
pub(super) enum Encoder<W: Write> {
    None(W),
    Zstd(zstd::stream::write::Encoder<'static, W>),
    Gzip(GzEncoder<W>),
}

impl<W: Write> Encoder<W> {
    pub(super) fn new(compression: Compression, out: W) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(out),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
            Compression::Gzip => Self::Gzip(GzEncoder::new(out, flate2::Compression::default())),
        })
    }

    pub(super) fn finish(self) -> io::Result<()> {
        match self {
            Self::None(mut out) => out.flush(),
            Self::Zstd(encoder) => encoder.finish()?.flush(),
            Self::Gzip(encoder) => encoder.finish()?.flush(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(out) => out.flush(),
            Self::Zstd(encoder) => encoder.flush(),
            Self::Gzip(encoder) => encoder.flush(),
        }
    }
}

/// Formats that are known by their first bytes and not read.
const FOREIGN: [(&[u8], &str, &str); 4] = [
    (b"\xfd7zXZ\0", "xz", "xz -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"PK\x03\x04", "zip, which is no tarball", "unzip"),
];

/// Decompresses what is read, as its first bytes say.
pub(super) fn decode<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    const GZIP: &[u8] = b"\x1f\x8b";
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
    let mut input = BufReader::with_capacity(BUFFER, Peeked::new(input)?);
    let start = input.fill_buf()?;
    if start.starts_with(GZIP) {
        return Ok(Box::new(MultiGzDecoder::new(input)));
    }
    if start.starts_with(ZSTD) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        return Ok(Box::new(decoder));
    }
    if let Some((_, name, program)) = FOREIGN.iter().find(|(magic, ..)| start.starts_with(magic)) {
        let why =
            format!("it is compressed by {name}; plain, gzip and zstd are read (`{program} FILE | flocker import …`)");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(Box::new(input))
}

/// The longest beginning that tells a format.
const MAGIC_LIMIT: usize = 6;

/// An input whose first read gives enough to tell the format by, however finely it comes.
struct Peeked<R> {
    start: io::Cursor<Vec<u8>>,
    rest: R,
}

impl<R: Read> Peeked<R> {
    fn new(mut rest: R) -> io::Result<Self> {
        let mut start = Vec::new();
        (&mut rest).take(MAGIC_LIMIT as u64).read_to_end(&mut start)?;
        Ok(Self { start: io::Cursor::new(start), rest })
    }
}

impl<R: Read> Read for Peeked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.start.read(buffer)? {
            0 => self.rest.read(buffer),
            count => Ok(count),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn encoded(compression: Compression, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = Encoder::new(compression, &mut out).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap();
        out
    }

    fn decoded(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decode(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn what_was_compressed_is_told_and_read_back() {
        for compression in [Compression::None, Compression::Zstd, Compression::Gzip] {
            let bytes = encoded(compression, b"some text");
            assert_eq!(decoded(&bytes).unwrap(), b"some text", "{compression}");
            // Two streams in a row are one, as for gunzip and zstd -d.
            assert_eq!(decoded(&[bytes.clone(), bytes].concat()).unwrap(), b"some textsome text", "{compression}");
        }
        assert_eq!(decoded(b"").unwrap(), b"");
    }

    #[test]
    fn a_cut_stream_is_an_error_and_so_is_a_foreign_format() {
        for compression in [Compression::Zstd, Compression::Gzip] {
            let bytes = encoded(compression, &[7; 10_000]);
            assert!(decoded(&bytes[..bytes.len() - 3]).is_err(), "{compression}");
        }
        let error = decoded(b"\xfd7zXZ\0rest").unwrap_err();
        assert!(error.to_string().contains("xz -dc FILE"), "{error}");
    }

    #[test]
    fn a_file_name_tells_the_compression() {
        let of = |name| Compression::of_file_name(name);
        assert_eq!(
            [of("db.tar"), of("db.tar.zst"), of("db.tgz")],
            [Compression::None, Compression::Zstd, Compression::Gzip]
        );
    }
}
