//! The walls between crates and the promises of the documents, held over the sources themselves.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn metadata() -> Value {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The dependencies of a crate on other crates of the workspace, `dev` ones left out.
fn arrows_of(package: &Value) -> BTreeSet<String> {
    let dependencies = package["dependencies"].as_array().unwrap().iter();
    let ours = dependencies.filter(|d| d["path"].is_string() && d["kind"] != "dev");
    ours.map(|dependency| dependency["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn crates_depend_on_each_other_along_the_arrows_only() {
    let allowed: &[(&str, &[&str])] = &[
        ("flocker", &["flocker-node"]),
        ("flocker-node", &["flocker-certs", "flocker-replication", "flocker-storage", "flocker-transport"]),
        ("flocker-transport", &["flocker-certs"]),
        ("flocker-replication", &["flocker-storage"]),
        ("flocker-certs", &[]),
        ("flocker-storage", &[]),
    ];
    let metadata = metadata();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        if ["flocker-bench", "flocker-tests"].contains(&name) {
            continue;
        }
        let (_, allowed) = allowed.iter().find(|(crate_name, _)| *crate_name == name).expect("a crate of the design");
        for arrow in arrows_of(package) {
            assert!(allowed.contains(&arrow.as_str()), "{name} depends on {arrow}");
        }
    }
}

#[test]
fn replication_does_no_io_and_sees_only_the_model_of_storage() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let replication = packages.iter().find(|package| package["name"] == "flocker-replication").unwrap();
    for dependency in replication["dependencies"].as_array().unwrap() {
        let name = dependency["name"].as_str().unwrap();
        let pure = dependency["kind"] == "dev" || !["tokio", "quinn", "rand", "rusqlite", "rustix"].contains(&name);
        assert!(pure, "replication depends on {name}");
        if name == "flocker-storage" && dependency["kind"] != "dev" {
            assert_eq!(dependency["uses_default_features"], false);
            assert_eq!(dependency["features"], Value::Array(vec![]));
        }
    }
    for (path, text) in sources("replication/src") {
        for word in ["std::fs", "std::net", "SystemTime", "Instant::now", "Timestamp::now", "Zoned::now"] {
            assert!(!text.contains(word), "{} uses {word}", path.display());
        }
    }
}

#[test]
fn every_crate_takes_the_workspaces_lints_and_forbids_unsafe_code() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"forbid\""));
    let metadata = metadata();
    for package in metadata["packages"].as_array().unwrap() {
        let path = package["manifest_path"].as_str().unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains("[lints]\nworkspace = true"), "{path}");
        assert_eq!(package["license"], "Apache-2.0", "{path}");
        assert_eq!(package["publish"], Value::Array(vec![]), "{path}");
    }
}

#[test]
fn words_of_a_driver_stay_in_its_folder() {
    let words = ["dataset", "bookmark", "subvolume", "resume token", "resume_token", "txg", "qgroup", "zpool"];
    for folder in ["storage/src", "replication/src", "transport/src", "certs/src", "node/src", "cli/src"] {
        for (path, text) in sources(folder) {
            if path.components().any(|part| part.as_os_str() == "drivers") {
                continue;
            }
            let text = text.to_lowercase();
            for word in words {
                assert!(!text.contains(word), "{} says {word:?}", path.display());
            }
        }
    }
}

#[test]
fn files_stay_short() {
    for folder in ["storage", "replication", "transport", "certs", "node", "cli", "tests"] {
        for (path, text) in sources(folder) {
            let own = text.split("#[cfg(test)]").next().unwrap().lines().count();
            assert!(own <= 700, "{} has {own} lines before its tests", path.display());
        }
    }
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for target in links(&text) {
            let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
            if path.contains("://") || path.starts_with("mailto:") {
                continue;
            }
            let file = if path.is_empty() { document.clone() } else { document.parent().unwrap().join(path) };
            assert!(file.exists(), "{} links to {target}", document.display());
            if !anchor.is_empty() {
                let headings = anchors(&fs::read_to_string(&file).unwrap());
                assert!(headings.contains(anchor), "{} links to {target}", document.display());
            }
        }
    }
}

#[test]
fn the_documents_that_a_newcomer_looks_for_are_there() {
    let wanted = "README.md CHANGELOG.md CONTRIBUTING.md LICENSE deny.toml clippy.toml test .ci/run \
                  docs/ARCHITECTURE.md docs/PROTOCOL.md docs/DRIVERS.md docs/GLOSSARY.md docs/adr";
    for path in wanted.split_whitespace() {
        assert!(root().join(path).exists(), "{path} is missing");
    }
}

#[test]
fn the_commands_in_the_readme_exist() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let help = Command::new(flocker_tests::flocker_binary()).arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let verbs: BTreeSet<_> = help.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next()).collect();
    let mut seen = 0;
    let mut in_block = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        }
        let command = line.trim_start_matches("$ ").trim_start_matches("sudo ");
        let Some(rest) = command.strip_prefix("flocker ").filter(|_| in_block) else { continue };
        let mut words = rest.split_whitespace();
        let verb = words.find(|word| !word.starts_with('-') && !word.starts_with('/')).unwrap();
        seen += 1;
        assert!(verbs.contains(verb), "the README calls `flocker {verb}`, which does not exist:\n{help}");
    }
    assert!(seen > 10, "the README shows how it is used");
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let found =
        files_below(&root().join(folder)).into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    found.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

fn documents() -> Vec<PathBuf> {
    let top = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root().join(name));
    let below =
        files_below(&root().join("docs")).into_iter().filter(|path| path.extension().is_some_and(|e| e == "md"));
    top.into_iter().filter(|path| path.exists()).chain(below).collect()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

/// The targets of `[text](target)` outside of code.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        }
        if in_block {
            continue;
        }
        let prose: String = line.split('`').step_by(2).collect();
        for part in prose.split("](").skip(1) {
            found.extend(part.split(')').next().map(str::to_owned));
        }
    }
    found
}

/// The anchors of a document's headings, as code hosts make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|heading| {
            let words = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = words.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}
