//! What a machine must have for a test, skipped loudly where it lacks it.
//!
//! `FLOCKER_REQUIRE` names what must not be skipped (CI names all): `root,xfs,btrfs,ext4,zfs-fuse,tun,postgres,ssh,rsync,…`.
//! `openzfs` is there in the test machine (tests/vm) only, where `./test vm` demands it.

use std::{env, path::Path, process::Command};

/// Tells whether this machine has what `need` names. Where it has not, prints why the test is left out.
///
/// # Panics
/// When the machine lacks it although `FLOCKER_REQUIRE` names it.
#[track_caller]
pub fn require(need: &str) -> bool {
    let Some(lack) = lack_of(need) else { return true };
    let required = env::var("FLOCKER_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|named| named.trim() == need), "FLOCKER_REQUIRE names {need}, but {lack}");
    eprintln!("SKIPPED {}: it needs {need}, but {lack}", std::thread::current().name().unwrap_or("test"));
    false
}

/// Tells whether the tests run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns the path of a program, looked for in `PATH` and where system programs are.
pub fn program(name: &str) -> Option<std::path::PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// Returns the folder with PostgreSQL's server programs, the newest version found.
pub fn postgres_bin() -> Option<std::path::PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .map(|version| version.path().join("bin"))
        .filter(|bin| bin.join("initdb").is_file() && bin.join("pgbench").is_file())
        .collect();
    found.sort();
    found.pop()
}

fn lack_of(need: &str) -> Option<String> {
    let without = |name: &str| program(name).is_none().then(|| format!("the program {name} is not there"));
    match need {
        "root" => (!is_root()).then(|| "the tests do not run as root".to_owned()),
        "xfs" => lack_of("root").or_else(|| without("mkfs.xfs")).or_else(|| unknown_filesystem("xfs")),
        "btrfs" => lack_of("root").or_else(|| without("mkfs.btrfs")).or_else(|| unknown_filesystem("btrfs")),
        "ext4" => lack_of("root").or_else(|| without("mkfs.ext4")).or_else(|| unknown_filesystem("ext4")),
        "postgres" => lack_of("root").or_else(|| {
            (postgres_bin().is_none() || user("postgres").is_none()).then(|| "PostgreSQL is not installed".to_owned())
        }),
        "zfs-fuse" => lack_of("root")
            .or_else(|| without("zfs-fuse"))
            .or_else(|| without("nsenter"))
            .or_else(|| (!Path::new("/dev/fuse").exists()).then(|| "there is no /dev/fuse".to_owned())),
        "tun" => lack_of("root")
            .or_else(|| ["setpriv", "unshare", "nsenter", "ip"].into_iter().find_map(without))
            .or_else(|| (!Path::new("/dev/net/tun").exists()).then(|| "there is no /dev/net/tun".to_owned())),
        "openzfs" => (!crate::zfs::has_openzfs()).then(|| "this is not the test machine of tests/vm".to_owned()),
        "setpriv" => without("setpriv"),
        "ssh" => without("sshd").or_else(|| without("ssh-keygen")),
        "rsync" => without("rsync"),
        "socat" => without("socat").or_else(|| without("openssl")),
        "syncoid" => without("syncoid"),
        "acl" => without("setfacl"),
        "setcap" => without("setcap"),
        other => Some(format!("the harness does not know {other}")),
    }
}

fn unknown_filesystem(name: &str) -> Option<String> {
    let known = || {
        let listed = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        listed.lines().any(|line| line.split_whitespace().last() == Some(name))
    };
    if known() {
        return None;
    }
    let _ = Command::new("modprobe").arg(name).output();
    (!known() || !Path::new("/dev/loop-control").exists())
        .then(|| format!("this kernel has no {name} or no loop devices"))
}

/// Returns uid and gid of a user of this machine.
pub fn user(name: &str) -> Option<(u32, u32)> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}
