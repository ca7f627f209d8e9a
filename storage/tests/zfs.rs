//! What only the ZFS driver promises, and the shared suite on it.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use async_trait::async_trait;
use flocker_storage::{
    conformance::{self, Fixture},
    driver::Driver,
    drivers,
    error::Result,
};

/// Pools in datasets, each of a pool of its own in a sparse file.
struct Datasets {
    folder: tempfile::TempDir,
    prefix: String,
}

impl Datasets {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("t{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { folder: tempfile::tempdir_in("/dev/shm").unwrap(), prefix }
    }

    fn image(&self, pool: &str) -> PathBuf {
        self.folder.path().join(pool)
    }

    fn name(&self, pool: &str) -> String {
        format!("{}{pool}", self.prefix)
    }
}

impl Drop for Datasets {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.folder.path()).unwrap().flatten() {
            let name = self.name(&entry.file_name().to_string_lossy());
            let _ = Command::new("zpool").args(["destroy", "-f", &name]).status();
        }
    }
}

fn must(program: &str, words: &[&str]) {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[async_trait]
impl Fixture for Datasets {
    async fn open(&self, pool: &str) -> Result<Arc<dyn Driver>> {
        let image = self.image(pool);
        if !image.exists() {
            std::fs::File::create(&image).unwrap().set_len(2 << 30).unwrap();
            must("zpool", &["create", "-m", "none", &self.name(pool), image.to_str().unwrap()]);
        }
        drivers::open(&format!("zfs:{}/flocker", self.name(pool)).parse().unwrap()).await
    }

    fn plant_stranger(&self, pool: &str) -> bool {
        must("zfs", &["create", &format!("{}/flocker/volumes/somebodys", self.name(pool))]);
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zfs_passes_the_suite() {
    let only = std::env::var("CASE").unwrap_or_default();
    let mut failed = Vec::new();
    for (name, case) in conformance::cases().into_iter().filter(|(name, _)| name.contains(&only)) {
        let start = std::time::Instant::now();
        let done = tokio::spawn(async move { case(&conformance::Bench::on(Datasets::new())).await }).await;
        eprintln!("conformance: {name}: {} ({:?})", if done.is_ok() { "ok" } else { "FAILED" }, start.elapsed());
        failed.extend(done.is_err().then_some(name));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
