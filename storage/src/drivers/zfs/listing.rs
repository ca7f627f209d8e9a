//! Reading what `zfs get -H -p` prints: one line per property, four fields parted by tabs.
//!
//! Pure functions over text, tested on recorded output of zfs-fuse 0.7 and OpenZFS 2.3 in `testdata/`.

use std::collections::BTreeMap;

/// The fields asked for, in this order.
pub(super) const FIELDS: &str = "name,property,value,source";

/// A dataset or snapshot with what was asked of it: only properties of its own, not inherited ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// `pool/path` or `pool/path@snapshot`.
    pub(super) name: String,
    /// Those that have a value.
    pub(super) properties: BTreeMap<String, String>,
}

impl Found {
    /// Returns a property.
    pub(super) fn property(&self, name: &str) -> Option<&str> {
        self.properties.get(name).map(String::as_str)
    }

    /// Returns the part behind the `@` of a snapshot.
    pub(super) fn snapshot(&self) -> Option<&str> {
        self.name.split_once('@').map(|(_, snapshot)| snapshot)
    }

    /// Returns the part before the `@`.
    pub(super) fn dataset(&self) -> &str {
        self.name.split_once('@').map_or(&self.name, |(dataset, _)| dataset)
    }

    pub(super) fn guid(&self) -> Option<u64> {
        self.property("guid")?.parse().ok()
    }
}

/// Parses the output; objects stay in the order of the program. A line that is none of this form (a value of somebody
/// else's property may hold a line end) is passed over.
pub(super) fn parse(output: &[u8]) -> Vec<Found> {
    let mut all: Vec<Found> = Vec::new();
    for line in String::from_utf8_lossy(output).lines() {
        let mut fields = line.split('\t');
        let (Some(name), Some(property)) = (fields.next(), fields.next()) else { continue };
        let rest: Vec<&str> = fields.collect();
        let [value @ .., source] = rest.as_slice() else { continue };
        if value.is_empty() || name.is_empty() {
            continue;
        }
        if all.last().is_none_or(|last| last.name != name) {
            all.push(Found { name: name.to_owned(), ..Found::default() });
        }
        let value = value.join("\t");
        let counts = *source == "local" || (*source == "-" && value != "-");
        if let Some(last) = all.last_mut().filter(|_| counts) {
            last.properties.insert(property.to_owned(), value);
        }
    }
    all
}

/// Reads one value out of a table as `zpool get PROPERTY POOL` prints it: two lines, the value third in the second.
pub(super) fn table_value(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    text.lines().nth(1)?.split_whitespace().nth(2).map(str::to_owned)
}

/// Reads the name and the guid of a pool out of what `zdb -l` prints of a device.
pub(super) fn label(output: &[u8]) -> Option<(String, u64)> {
    let text = String::from_utf8_lossy(output);
    let field = |key: &str| {
        text.lines().find_map(|line| line.trim().strip_prefix(key)?.trim().strip_prefix(':')?.trim().into())
    };
    let name: Option<&str> = field("name");
    let guid: Option<&str> = field("pool_guid");
    let name = name?.trim_start_matches('=').trim().trim_matches('\'').to_owned();
    Some((name, guid?.trim_start_matches('=').trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_listing_of_zfs_fuse_is_read() {
        let found = parse(include_bytes!("testdata/get-fuse.txt"));
        let names: Vec<_> = found.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["za/f/volumes", "za/f/volumes/v1", "za/f/volumes/v1@s1", "za/f/volumes/v1@s2"]);
        assert_eq!(found[1].property("org.flocker:record"), Some(r#"{"a":1, "x=y":"z"}"#));
        assert_eq!(found[2].property("org.flocker:record"), None, "inherited properties do not count");
        assert_eq!(found[2].property("org.flocker:pending"), Some("yes"));
        assert_eq!((found[2].snapshot(), found[2].dataset()), (Some("s1"), "za/f/volumes/v1"));
        assert!(found.iter().all(|it| it.guid().is_some()));
        assert_eq!(found[1].property("origin"), None, "'-' is no value");
    }

    #[test]
    fn a_value_with_tabs_and_lines_of_somebody_else_does_no_harm() {
        let found = parse(b"p\tx:y\ta\tb\tlocal\np\tx:z\tone\nmore\tlocal\np\tguid\t7\t-\nq\n\t\t\t\n");
        assert_eq!(found.iter().find(|it| it.name == "p").unwrap().property("x:y"), Some("a\tb"));
    }

    #[test]
    fn a_label_is_read() {
        let text = b"--------\nLABEL 0\n--------\n    version: 23\n    name: 'tank'\n    state: 0\n    pool_guid: 42\n    hostname: 'h'\n";
        assert_eq!(label(text), Some(("tank".to_owned(), 42)));
        assert_eq!(label(b"failed to unpack label 0\n"), None);
    }

    #[test]
    fn a_table_has_its_value_third() {
        assert_eq!(
            table_value(b"NAME  PROPERTY  VALUE  SOURCE\nza    guid      7      default\n").as_deref(),
            Some("7")
        );
        assert_eq!(table_value(b"NAME\n"), None);
    }
}
