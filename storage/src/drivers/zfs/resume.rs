//! Resume tokens: where a receive of OpenZFS stopped, as text that only its programs understand.
//!
//! A token from a peer is hostile: it names a dataset of ours, and `zfs send -t` would send what it names. So it is decoded
//! first, and only a token for the very snapshot and base that were asked for is used.

use std::collections::BTreeMap;

use super::{pool::Pool, volume::Volume};
use crate::{
    delta::{DeltaRequest, RESUME_POINT_LIMIT, ResumePoint},
    model::SnapshotKey,
};

/// Reads a token out of a resume point: four hexadecimal numbers parted by dashes, and nothing that a program could take
/// for anything else.
pub(super) fn token(point: &ResumePoint) -> std::result::Result<String, String> {
    let text = std::str::from_utf8(&point.0).unwrap_or_default();
    let parts: Vec<&str> = text.split('-').collect();
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    if parts.len() == 4 && parts.iter().all(is_number) && text.len() <= RESUME_POINT_LIMIT {
        Ok(text.to_owned())
    } else {
        Err("it is not of this format".to_owned())
    }
}

/// Reads what `zfs send -nvt TOKEN` says of a token: lines `key = value` beneath a heading.
pub(super) fn contents(output: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(output);
    let pair = |line: &str| {
        let (key, value) = line.trim().split_once(" = ")?;
        Some((key.to_owned(), value.trim().to_owned()))
    };
    text.lines().filter_map(pair).collect()
}

/// Reads a number as the program writes it.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

impl Pool {
    /// Decodes a token, whatever else the program says to it.
    pub(super) fn decode_token(&self, token: &str) -> BTreeMap<String, String> {
        match self.programs.zfs(&["send", "-nvt", token]) {
            Ok(output) => contents(&output),
            Err(trouble) => {
                let both = [trouble.error.stdout(), b"\n", trouble.error.stderr().as_bytes()].concat();
                contents(&both)
            }
        }
    }

    /// Says why a token is not for this delta.
    pub(super) fn check_token(
        &self,
        request: &DeltaRequest,
        volume: &Volume,
        token: &str,
    ) -> std::result::Result<(), String> {
        if !self.abilities.resume {
            return Err("no receive goes on in this pool".to_owned());
        }
        let said = self.decode_token(token);
        let guid = |key: &str| said.get(key).and_then(|text| number(text));
        let look = |key: SnapshotKey| match volume.guid_of(key.snapshot).filter(|_| key.volume == volume.id()) {
            Some(guid) => Ok(guid),
            None => self.guid_of("read delta of", key).map_err(|error| error.to_string()),
        };
        if guid("toguid").is_none() || guid("toguid") != Some(look(request.target)?) {
            return Err("it is of another snapshot".to_owned());
        }
        let base = request.base.map(look).transpose()?;
        if guid("fromguid").filter(|guid| *guid != 0) != base {
            return Err("it builds on another snapshot".to_owned());
        }
        if said.get("toname") != Some(&self.snapshot_name(request.target)) {
            return Err("it names another dataset".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_a_token_is_a_token() {
        let point = |text: &str| ResumePoint(text.to_owned().into_bytes().into());
        assert!(
            token(&point("1-10a4b1ae94-118-789c636064000310a500c4ec50360710e72765a52697303030419460caa7a515a796"))
                .is_ok()
        );
        for wrong in ["", "made up", "-t", "1-2-3", "1-2-3-4-5", "1-2-3-g", "1-2-3-4 ", "1--3-4", "../1-2-3-4"] {
            assert!(token(&point(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_the_program_says_of_a_token_is_read() {
        let said = contents(include_bytes!("testdata/token.txt"));
        assert_eq!(number(&said["toguid"]), Some(0x1f2e_3d4c_5b6a_7988));
        assert_eq!(said["toname"], "tank/flocker/volumes/v@s");
        assert_eq!(number(&said["bytes"]), Some(0x40_0000));
    }
}
