//! Sizes as people write them, in commands and in the configuration.

use std::str::FromStr;

/// A number of bytes: `512MiB`, `10G`, `1.5T`, `1000000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

/// Suffixes of a size and what they stand for. As in zfs and docker a lone letter is a power of 1024.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KIB", 1 << 10),
    ("KB", 1_000),
    ("M", 1 << 20),
    ("MIB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GIB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TIB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("P", 1 << 50),
    ("PIB", 1 << 50),
    ("PB", 1_000_000_000_000_000),
];

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            "it is not a size: write a number and a unit, such as 512MiB, 10G or 1.5T (K, M, G, T, P are powers of 1024)"
                .to_owned()
        };
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = unit.trim().to_ascii_uppercase();
        let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(wrong)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 9 || fraction.contains('.') {
            return Err(wrong());
        }
        let whole: u128 = whole.parse().map_err(|_| wrong())?;
        let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
        let scale = 10u128.pow(fraction.len() as u32);
        let bytes =
            whole.checked_mul(factor.into()).and_then(|bytes| bytes.checked_add(part * u128::from(factor) / scale));
        match bytes.map(u64::try_from) {
            Some(Ok(0)) => Err("it must be more than nothing".to_owned()),
            Some(Ok(bytes)) => Ok(Self(bytes)),
            _ => Err("it is more than 16 EiB".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_unless_they_say_kb() {
        for (text, bytes) in
            [("1", 1), ("10G", 10 << 30), ("512MiB", 512 << 20), ("1.5k", 1536), ("2 T", 2 << 40), ("3MB", 3_000_000)]
        {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "10X", "-1", "1.2.3G", "0", "99999999999P", "1e3", ".5G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
