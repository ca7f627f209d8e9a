//! Every driver against the one suite. A new driver is one test here.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_storage::conformance;
use support::{Folders, LoopMount, zfs_fuse::ZfsHost};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn btrfs_passes_on_a_loop_file() {
    let Some(mount) = LoopMount::try_new("btrfs", 4 << 30, &["-q"]) else { return };
    conformance::run(|| Folders::of("btrfs", mount.path())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn btrfs_passes_where_quotas_are_on() {
    let Some(mount) = LoopMount::try_new("btrfs", 4 << 30, &["-q"]) else { return };
    let enabled = std::process::Command::new("btrfs").args(["quota", "enable"]).arg(mount.path()).status().unwrap();
    assert!(enabled.success(), "{enabled}");
    conformance::run(|| Folders::of("btrfs", mount.path())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zfs_passes_the_even_cases() {
    let Some(host) = ZfsHost::enter("zfs_passes_the_even_cases") else { return };
    conformance::run_share(|| host.place(), 0, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zfs_passes_the_odd_cases() {
    let Some(host) = ZfsHost::enter("zfs_passes_the_odd_cases") else { return };
    conformance::run_share(|| host.place(), 1, 2).await;
}

/// Root runs the suite once more as somebody who may do little: this binary, copied to where that user can read it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directory_passes_as_an_ordinary_user() {
    if !support::have("root", support::is_root()) || !support::have("setpriv", support::has_program("setpriv")) {
        return;
    }
    let folder = support::open_folder();
    let binary = folder.path().join("suite");
    std::fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    let status = support::as_nobody(&binary)
        .args(["--exact", "directory_passes_in_a_temporary_folder", "--nocapture"])
        .env("TMPDIR", folder.path())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}
