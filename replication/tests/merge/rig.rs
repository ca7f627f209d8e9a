//! A tree as a listing, and a merge of three of them as the node runs it, for the tests beside it.

use std::collections::{BTreeMap, BTreeSet};

use flocker_replication::merge::{
    Decider, Group, Label, Labels, Meta, Outcome, Plan, Resolve, Row, Side, Survey, Version,
};
use flocker_storage::tree::{entry::Time, path::TreePath};

use crate::support::id;

pub(crate) type Listing = BTreeMap<TreePath, Version>;

pub(crate) fn path(text: &str) -> TreePath {
    TreePath::parse(text.as_bytes()).unwrap()
}

pub(crate) fn meta(mtime: i64) -> Meta {
    Meta { mode: 0o644, owner: (0, 0), mtime: Time { secs: mtime, nanos: 0 }, xattrs: Vec::new() }
}

fn labels() -> Labels {
    let label = |host: &str, tip: u128| Label { host: host.parse().unwrap(), tip: id(tip) };
    Labels { ours: label("host-a", 0xaaaa), theirs: label("host-b", 0xbbbb) }
}

pub(crate) struct Merged {
    pub(crate) plan: std::sync::Arc<Plan>,
    pub(crate) result: Listing,
}

pub(crate) fn merge(base: &Listing, ours: &Listing, theirs: &Listing, resolve: Resolve) -> Merged {
    let paths: BTreeSet<&TreePath> = base.keys().chain(ours.keys()).chain(theirs.keys()).collect();
    let row = |path| Row { path, base: base.get(path), ours: ours.get(path), theirs: theirs.get(path) };
    // What a real walk tells without a closer look.
    let same = |row: &Row<'_>| {
        row.base == row.ours && row.base == row.theirs && row.base.is_some_and(|base| base.group.is_none())
    };
    let mut survey = Survey::new(resolve);
    for path in &paths {
        let row = row(*path);
        match row.base.filter(|_| same(&row)) {
            Some(base) => survey.take_unchanged(path, &base.kind),
            None => survey.take(&row).unwrap(),
        }
    }
    let plan = survey.finish(&labels(), |path| paths.contains(path)).unwrap();
    let plan = std::sync::Arc::new(plan);
    let mut decider = Decider::new(plan.clone());
    let mut result = Listing::new();
    let mut sizes: BTreeMap<TreePath, u32> = BTreeMap::new();
    for path in &paths {
        let row = row(*path);
        if let Some(base) = row.base.filter(|_| same(&row)) {
            decider.pass_unchanged(path, &base.kind);
            result.insert((*path).clone(), base.clone());
            continue;
        }
        let Outcome::Keep(taken) = decider.decide(&row) else { continue };
        let body = match taken.body {
            Side::Ours => row.ours,
            Side::Theirs => row.theirs,
        };
        let body = body.unwrap_or_else(|| panic!("{path}: the result has what its side does not have"));
        let group = taken.group.map(|Group { first, names }| {
            sizes.insert(first.clone(), names);
            first
        });
        let version = Version { kind: body.kind.clone(), content: body.content, meta: taken.meta, group };
        result.insert((*path).clone(), version);
    }
    for copy in plan.copies() {
        let version = Version { group: None, ..copy.version.clone() };
        assert!(result.insert(copy.path.clone(), version).is_none(), "{}: something is there already", copy.path);
    }
    for (first, names) in sizes {
        let members = result.values().filter(|version| version.group.as_ref() == Some(&first)).count();
        assert_eq!(members, names as usize, "names of {first}");
    }
    Merged { plan, result }
}
