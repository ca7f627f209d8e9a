//! Peers and other users who mean no good.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use bytes::Bytes;
use flocker_storage::{
    delta::{DeltaFormat, ReceiveRequest},
    error::ErrorKind,
    model::{Role, VolumeRecord},
};

use crate::{rig::*, support};

/// The preamble of a native delta, and the head of the kernel's stream behind it.
const HEAD: usize = 24 + 17;
const COMMAND_HEAD: usize = 10;

/// The checksum of a command, as the kernel computes it (`fs/btrfs/send.c`).
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

fn command(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let body: Vec<u8> = attributes
        .iter()
        .flat_map(|(kind, value)| [&kind.to_le_bytes()[..], &(value.len() as u16).to_le_bytes(), value].concat())
        .collect();
    let head = [&(body.len() as u32).to_le_bytes()[..], &kind.to_le_bytes(), &[0; 4]].concat();
    let mut command = [head, body].concat();
    let sum = crc32c(&command);
    command[6..COMMAND_HEAD].copy_from_slice(&sum.to_le_bytes());
    command
}

const MKFILE: u16 = 3;
const SYMLINK: u16 = 8;
const WRITE: u16 = 15;
const PATH: u16 = 15;
const PATH_LINK: u16 = 17;
const INODE: u16 = 3;
const OFFSET: u16 = 18;
const DATA: u16 = 19;

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_reaches_nothing_outside_the_place_it_lands_in() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, _) = pair(&mount).await;
    let format = DeltaFormat("btrfs-send/1".to_owned());
    let stream = read(&*a, None, &one, &format).await.unwrap().concat();
    let first = HEAD + COMMAND_HEAD + u32::from_le_bytes(stream[HEAD..HEAD + 4].try_into().unwrap()) as usize;
    let outside = mount.path().join("outside");
    let precious = outside.join("precious");
    let (inode, offset) = (300_u64.to_le_bytes(), 0_u64.to_le_bytes());
    let into = |path: &str, before: Vec<u8>| {
        let write = command(WRITE, &[(PATH, path.as_bytes()), (OFFSET, &offset), (DATA, b"overwritten")]);
        [before, write].concat()
    };
    let link = |to: &str| command(SYMLINK, &[(PATH, b"link"), (INODE, &inode), (PATH_LINK, to.as_bytes())]);
    let make = |path: &str| command(MKFILE, &[(PATH, path.as_bytes()), (INODE, &inode)]);
    let up = format!("../../../../..{}/precious", outside.display());
    let attacks = [
        into("link", link(precious.to_str().unwrap())),
        into("link/precious", link(outside.to_str().unwrap())),
        into(&up, Vec::new()),
        into("link", link(&up)),
        make(&format!("../../../../..{}/new", outside.display())),
    ];
    for attack in attacks {
        fs::create_dir_all(&outside).unwrap();
        fs::write(&precious, "precious").unwrap();
        let id = flocker_storage::model::VolumeId::mint();
        let target = VolumeRecord { id, ..volume.clone() };
        let bytes = [&stream[..first], &attack, &stream[first..]].concat();
        let taken = take_in(&*b, &target, None, &one, &format, &[Bytes::from(bytes)]).await;
        let error = taken.err().unwrap();
        assert!(matches!(error.kind, ErrorKind::Corrupt(_)), "{error:?}");
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert!(b.lineage(id).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_gets_at_what_is_being_received() {
    let Some(mount) = mount() else { return };
    if !support::have("setpriv", support::has_program("setpriv")) {
        return;
    }
    let (a, b, volume, one, _) = pair(&mount).await;
    fs::set_permissions(mount.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let open_file =
        |path: &Path| support::as_nobody(Path::new("sh")).args(["-c", "echo x >> \"$0\""]).arg(path).output().unwrap();
    // All modes on the way and of the file itself allow it, but for those that the driver sets.
    let public = mount.path().join("public");
    fs::write(&public, "").unwrap();
    fs::set_permissions(&public, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(open_file(&public).status.success());
    for format in [native(&*a), vec![DeltaFormat::tree()]].concat() {
        let id = flocker_storage::model::VolumeId::mint();
        let record = VolumeRecord { id, role: Role::Replica, ..volume.clone() };
        let chunks = read(&*a, None, &one, &format).await.unwrap();
        let snapshot = one.snapshot.clone();
        let request = ReceiveRequest { volume: record, snapshot, base: None, format: format.clone(), resume: None };
        let mut receiving = b.receive(request).await.unwrap();
        for chunk in chunks {
            receiving.write(chunk).await.unwrap();
        }
        let place = mount.path().join(format!("b/staging/receive-{id}-{}", one.snapshot.id));
        let file = place.join("incoming/open-to-all");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        for dir in [&place, &place.join("incoming"), &mount.path().join("b/staging")] {
            assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700, "{}", dir.display());
        }
        assert!(!open_file(&file).status.success());
        fs::remove_file(&file).unwrap();
        receiving.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_adds_to_a_subvolume_that_is_being_received_is_noticed() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, _) = pair(&mount).await;
    let format = &native(&*a)[0];
    let id = flocker_storage::model::VolumeId::mint();
    let record = VolumeRecord { id, role: Role::Replica, ..volume.clone() };
    let stream = read(&*a, None, &one, format).await.unwrap().concat();
    let snapshot = one.snapshot.clone();
    let request = ReceiveRequest { volume: record, snapshot, base: None, format: format.clone(), resume: None };
    let mut receiving = b.receive(request).await.unwrap();
    // All but the end.
    receiving.write(Bytes::copy_from_slice(&stream[..stream.len() - COMMAND_HEAD])).await.unwrap();
    let tree = mount.path().join(format!("b/staging/receive-{id}-{}/incoming/tree", one.snapshot.id));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !tree.join("data").exists() {
        assert!(std::time::Instant::now() < deadline, "it arrives");
        std::thread::yield_now();
    }
    fs::write(tree.join("smuggled"), "x").unwrap();
    receiving.write(Bytes::copy_from_slice(&stream[stream.len() - COMMAND_HEAD..])).await.unwrap();
    let error = receiving.commit().await.unwrap_err();
    assert!(matches!(&error.kind, ErrorKind::Corrupt(why) if why.contains("announced")), "{error:?}");
    assert!(b.lineage(id).await.is_err());
}
