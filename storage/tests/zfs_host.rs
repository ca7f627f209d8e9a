//! The fixture of the ZFS tests itself; see `support::zfs_fuse`.
#![allow(clippy::unwrap_used)]

mod support;

use support::zfs_fuse::ZfsHost;

#[tokio::test(flavor = "multi_thread")]
async fn a_test_has_a_host_with_zfs_to_itself() {
    let Some(host) = ZfsHost::enter("a_test_has_a_host_with_zfs_to_itself") else { return };
    let (mount, dataset) = (host.folder().join("mount"), host.dataset("data"));
    host.zfs(&["set", &format!("mountpoint={}", mount.display()), &dataset]);
    std::fs::write(mount.join("file"), "contents").unwrap();
    host.zfs(&["snapshot", &format!("{dataset}@one")]);
    let listed = host.zfs(&["list", "-H", "-r", "-t", "snapshot", "-o", "name", host.root()]);
    assert_eq!(listed, format!("{dataset}@one\n"));
    if host.is_fuse() {
        assert_eq!(host.zpool(&["list", "-H", "-o", "name"]), "tank\n");
    }
    host.destroy(&dataset);
}
