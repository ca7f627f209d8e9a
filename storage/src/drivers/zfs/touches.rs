//! How often this process has changed a volume's dataset, so that what was read of it is known to hold or not.
//!
//! Owns the counts, and the knowledge which commands of `zfs` change what is remembered of a volume: its snapshots and their
//! records, its own record and properties. Each such command counts twice, before it runs and after it, so that what is read meanwhile is
//! not taken for the newest. Refuses to know what is remembered.

use std::{
    collections::HashMap,
    ffi::OsStr,
    sync::Mutex,
    thread::{self, ThreadId},
};

use super::{catalog::is_passing, pool::locked};

/// The counts of all volumes that were changed since the pool was opened.
#[derive(Debug, Default)]
pub(super) struct Touches(Mutex<HashMap<String, Touch>>);

#[derive(Debug, Clone, Copy)]
struct Touch {
    count: u64,
    /// Who touched it last.
    by: ThreadId,
    /// The count before the first of the touches that were by nobody else.
    since: u64,
}

/// How often a dataset had been touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark(u64);

impl Touches {
    /// Counts a command that is about to run, or has run.
    pub(super) fn count<A: AsRef<OsStr>>(&self, arguments: &[A]) {
        let words: Vec<&str> = arguments.iter().filter_map(|word| word.as_ref().to_str()).collect();
        let mut all = locked(&self.0);
        for dataset in changed(&words) {
            let me = thread::current().id();
            let touch = all.entry(dataset.to_owned()).or_insert(Touch { count: 0, by: me, since: 0 });
            if touch.by != me {
                (touch.by, touch.since) = (me, touch.count);
            }
            touch.count += 1;
        }
    }

    pub(super) fn mark(&self, dataset: &str) -> Mark {
        Mark(locked(&self.0).get(dataset).map_or(0, |touch| touch.count))
    }

    /// Tells whether nobody but the calling thread has touched a dataset since.
    pub(super) fn only_mine_since(&self, dataset: &str, mark: Mark) -> bool {
        locked(&self.0)
            .get(dataset)
            .is_none_or(|touch| touch.count == mark.0 || (touch.by == thread::current().id() && touch.since <= mark.0))
    }
}

/// Lists the datasets of volumes that a command may change. To put a head back changes none of what is remembered, nor does what
/// is taken for a moment only, nor what arrives before it has its record.
fn changed<'a>(words: &[&'a str]) -> Vec<&'a str> {
    let names = match words {
        ["get" | "list" | "send" | "receive" | "hold" | "release" | "mount" | "version" | "rollback", ..] => &[],
        // The origin of a clone stays as it is.
        ["clone", .., clone] => std::slice::from_ref(clone),
        names => names,
    };
    let of_volume = |name: &&'a str| {
        let (dataset, snapshot) = name.split_once('@').map_or((*name, None), |(dataset, name)| (dataset, Some(name)));
        let is_volume = dataset.rsplit_once('/').is_some_and(|(folder, _)| folder.ends_with("/volumes"));
        let counts = is_volume && !name.contains('=') && !snapshot.is_some_and(is_passing);
        counts.then_some(dataset)
    };
    names.iter().filter_map(of_volume).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: &str = "t/f/volumes/v";

    #[test]
    fn a_command_that_changes_a_volume_is_told_from_one_that_does_not() {
        let passing = format!("{V}@compare.01890000-0000-7000-8000-000000000001");
        let (snapshot, origin) = (format!("{V}@s"), format!("origin={V}@s"));
        let none: [&[&str]; 9] = [
            &["get", "-Hp", "-r", "guid", V],
            &["send", "-i", &snapshot, &snapshot],
            &["hold", "org.flocker", &snapshot],
            &["rollback", &snapshot],
            &["receive", "-s", "-u", &snapshot],
            &["clone", "-o", "readonly=on", &snapshot, "t/f/views/x"],
            &["snapshot", &passing],
            &["destroy", &passing],
            &["receive", "-u", "-o", &origin, "t/f/incoming/x@s"],
        ];
        for words in none {
            assert_eq!(changed(words), [""; 0], "{words:?}");
        }
        let trashed = snapshot.replace("@s", "@trash.01890000-0000-7000-8000-000000000001");
        let some: [&[&str]; 6] = [
            &["snapshot", "-o", "org.flocker:pending=yes", &snapshot],
            &["set", "org.flocker:record=1 volume/x@y", V],
            &["inherit", "org.flocker:record.1.0", &snapshot],
            &["rename", &snapshot, &trashed],
            &["rename", "t/f/incoming/x", V],
            &["clone", "t/f/volumes/other@s", V],
        ];
        for words in some {
            assert_eq!(changed(words), [V], "{words:?}");
        }
    }

    #[test]
    fn what_one_thread_did_is_told_from_what_others_did() {
        let (touches, words) = (Touches::default(), ["set", "a=b", V]);
        let start = touches.mark(V);
        assert!(touches.only_mine_since(V, start));
        touches.count(&words);
        assert_ne!(touches.mark(V), start);
        assert!(touches.only_mine_since(V, start));
        thread::scope(|scope| scope.spawn(|| touches.count(&words)).join()).ok();
        let theirs = touches.mark(V);
        assert!(!touches.only_mine_since(V, start), "the last one is another's");
        touches.count(&words);
        assert!(!touches.only_mine_since(V, start), "another's lies between");
        assert!(touches.only_mine_since(V, theirs));
    }
}
