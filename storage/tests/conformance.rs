//! Every driver against the one suite. A new driver is one test here.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_storage::conformance;
use support::{Folders, LoopMount};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directory_passes_in_a_temporary_folder() {
    conformance::run(Folders::temporary).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directory_passes_on_xfs_with_reflinks() {
    let Some(mount) = LoopMount::try_new("xfs", 2 << 30, &["-q", "-m", "reflink=1"]) else { return };
    conformance::run(|| Folders::on(mount.path())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directory_passes_on_btrfs() {
    let Some(mount) = LoopMount::try_new("btrfs", 2 << 30, &["-q"]) else { return };
    conformance::run(|| Folders::on(mount.path())).await;
}
