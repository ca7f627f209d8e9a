//! The document with the results: each ground has a section between two comments, which is put there anew.

use std::path::Path;

use anyhow::{Context as _, bail};

use crate::{ground::Ground, table::HEAD};

/// What `statfs(2)` says of a tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// What was measured on one ground.
#[derive(Debug)]
pub(crate) struct Section {
    key: String,
    text: String,
}

impl Section {
    /// Begins it with what was measured where.
    pub(crate) fn new(ground: Ground, folder: &Path, scale: f64, runs: usize) -> anyhow::Result<Self> {
        let found = rustix::fs::statfs(folder).with_context(|| format!("look at {}", folder.display()))?;
        let place = if found.f_type as u64 == TMPFS_MAGIC { "memory" } else { "disk" };
        let system = rustix::system::uname();
        let (release, processors) = (system.release().to_string_lossy(), std::thread::available_parallelism()?);
        let today = jiff::Zoned::now().date();
        let key = format!("{}-{place}", ground.name());
        let text = format!(
            "{today}, Linux {release}, {processors} processors{}, files in {place}, scale {scale}, runs of each: {runs}.\n\n{HEAD}",
            model().map(|model| format!(" ({model})")).unwrap_or_default()
        );
        Ok(Self { key, text })
    }

    /// Returns what it has so far.
    pub(crate) fn text(&self) -> &str {
        self.text.trim_end()
    }

    /// Adds rows to its table.
    pub(crate) fn add(&mut self, rows: &str) {
        self.text.push_str(rows);
    }

    /// Returns a document with this in it: in the place of what was measured on the same ground before, else at its end.
    pub(crate) fn put_into(&self, document: &str) -> anyhow::Result<String> {
        let (begin, end) = (format!("<!-- measured: {} -->", self.key), format!("<!-- end: {} -->", self.key));
        let section = format!("{begin}\n{}\n{end}", self.text());
        Ok(match (document.split_once(&begin), document.split_once(&end)) {
            (Some((before, rest)), Some((_, after))) if rest.contains(&end) => format!("{before}{section}{after}"),
            (None, None) => format!("{}\n\n{section}\n", document.trim_end()),
            _ => bail!("the document is unchanged: it has not both of {begin} and {end}, one behind the other"),
        })
    }
}

/// The name of the processor, where the kernel tells it.
fn model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> Section {
        Section { key: "zfs-disk".to_owned(), text: format!("{text}\n") }
    }

    #[test]
    fn a_section_takes_the_place_of_the_one_before_and_touches_nothing_else() {
        let first = section("one").put_into("# Title\n\nwords\n").unwrap();
        assert_eq!(first, "# Title\n\nwords\n\n<!-- measured: zfs-disk -->\none\n<!-- end: zfs-disk -->\n");
        let more = format!("{first}\nmore words\n");
        assert_eq!(section("two").put_into(&more).unwrap(), more.replace("one", "two"));
    }

    #[test]
    fn a_document_with_half_a_section_is_refused() {
        for document in ["<!-- measured: zfs-disk -->\n", "<!-- end: zfs-disk -->\n<!-- measured: zfs-disk -->\n"] {
            let refusal = section("one").put_into(document).unwrap_err().to_string();
            assert!(refusal.contains("the document is unchanged"), "{refusal}");
        }
    }

    #[test]
    fn a_section_says_where_it_was_measured() {
        let folder = tempfile::tempdir().unwrap();
        let section = Section::new(Ground::Btrfs, folder.path(), 0.5, 2).unwrap();
        assert!(section.key.starts_with("btrfs-"), "{section:?}");
        assert!(section.text().contains("scale 0.5, runs of each: 2.\n\n| case |"), "{section:?}");
    }
}
