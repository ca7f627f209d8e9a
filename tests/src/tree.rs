//! An oracle for file trees: lists everything that must survive a push, with no code of the program's.
//!
//! Folders are read through open directories, so that paths longer than PATH_MAX are no limit.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fmt,
    io::Read,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::Path,
};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

/// A tree as it is, by path from its root; the root itself is the empty path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing(pub BTreeMap<Vec<u8>, Entry>);

/// One file, folder, link or other thing.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is, with its contents.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Seconds and nanoseconds.
    pub mtime: (i64, u64),
    /// Attributes in order of their names.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// The first path of its hard-link group, where there are several.
    pub same_as: Option<String>,
}

/// What a path is.
#[derive(Clone, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Directory,
    /// A file: its size and the BLAKE3 of its contents.
    File(u64, String),
    /// A symlink and its target.
    Symlink(String),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character or block device and its number.
    Device(char, u64),
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory => f.write_str("directory"),
            Self::File(size, digest) => write!(f, "file of {size} bytes {}", &digest[..8]),
            Self::Symlink(target) => write!(f, "symlink to {target}"),
            Self::Fifo => f.write_str("fifo"),
            Self::Socket => f.write_str("socket"),
            Self::Device(kind, number) => write!(f, "device {kind} {number:#x}"),
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = self.mtime;
        write!(f, "{:?} {:o} {:?} {seconds}.{nanos:09}", self.kind, self.mode, self.owner)?;
        if let Some(first) = &self.same_as {
            write!(f, " same as {first}")?;
        }
        self.xattrs.iter().try_for_each(|(name, value)| write!(f, " {name}={}", value.escape_ascii()))
    }
}

impl Listing {
    /// Lists a tree.
    #[track_caller]
    pub fn of(root: &Path) -> Self {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(root, flags, Mode::empty())
            .unwrap_or_else(|error| panic!("cannot list {}: {error}", root.display()));
        let mut walk = Walk { listing: Self::default(), first_of_inode: HashMap::new() };
        walk.entry(&directory, b"", b".");
        walk.forget_single_links();
        walk.listing
    }

    /// Returns the listing without one path.
    pub fn without(mut self, path: &str) -> Self {
        assert!(self.0.remove(path.as_bytes()).is_some(), "{path} is not in the listing");
        self
    }

    /// Returns the listing with the times of folders set to zero, for trees that are written to.
    pub fn without_folder_times(mut self) -> Self {
        for entry in self.0.values_mut().filter(|entry| entry.kind == Kind::Directory) {
            entry.mtime = (0, 0);
        }
        self
    }

    /// Returns the listing with whole seconds, for file systems that keep no more.
    pub fn in_whole_seconds(mut self) -> Self {
        for entry in self.0.values_mut() {
            entry.mtime.1 = 0;
        }
        self
    }

    /// Returns what differs, one line each.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let shown = |path: &[u8]| path.escape_ascii().to_string();
        let mut lines = Vec::new();
        for (path, entry) in &self.0 {
            match other.0.get(path) {
                None => lines.push(format!("only left:  {} {entry:?}", shown(path))),
                Some(there) if there != entry => {
                    lines.push(format!("differs:    {}\n  left:  {entry:?}\n  right: {there:?}", shown(path)));
                }
                Some(_) => {}
            }
        }
        let added = other.0.iter().filter(|(path, _)| !self.0.contains_key(*path));
        lines.extend(added.map(|(path, entry)| format!("only right: {} {entry:?}", shown(path))));
        lines
    }
}

/// Asserts that two listings are equal; shows the first differences.
#[track_caller]
pub fn assert_same(left: &Listing, right: &Listing) {
    let lines = left.differences(right);
    let shown: Vec<_> = lines.iter().take(20).map(String::as_str).collect();
    assert!(lines.is_empty(), "the trees differ in {} places:\n{}", lines.len(), shown.join("\n"));
}

/// Asserts that two trees are equal in everything but sockets' existence.
#[track_caller]
pub fn assert_equal(left: &Path, right: &Path) {
    assert_same(&Listing::of(left), &Listing::of(right));
}

/// Returns the space that the files of a tree take, each inode once, in bytes.
pub fn allocated_bytes(root: &Path) -> u64 {
    let output = std::process::Command::new("du").args(["-s", "-B1"]).arg(root).output().expect("run du");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().next().and_then(|number| number.parse().ok()).expect("du prints a number")
}

struct Walk {
    listing: Listing,
    first_of_inode: HashMap<(u64, u64), String>,
}

impl Walk {
    /// An inode may have further names elsewhere (in other snapshots); within the tree it is one name then.
    fn forget_single_links(&mut self) {
        let mut names = HashMap::<String, u32>::new();
        for first in self.listing.0.values().filter_map(|entry| entry.same_as.clone()) {
            *names.entry(first).or_default() += 1;
        }
        for entry in self.listing.0.values_mut() {
            entry.same_as.take_if(|first| names[first] == 1);
        }
    }

    fn entry(&mut self, parent: &OwnedFd, parent_path: &[u8], name: &[u8]) {
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).expect("stat");
        let path = match (name, parent_path) {
            (b".", _) => Vec::new(),
            (name, b"") => name.to_vec(),
            (name, parent_path) => [parent_path, b"/", name].concat(),
        };
        let open = |flags: OFlags| {
            let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::openat(parent, name, flags, Mode::empty())
                .unwrap_or_else(|error| panic!("open {}: {error}", path.escape_ascii()))
        };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File(stat.st_size as u64, digest(open(OFlags::empty()))),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new()).expect("readlink");
                Kind::Symlink(target.to_bytes().escape_ascii().to_string())
            }
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice => Kind::Device('c', stat.st_rdev),
            FileType::BlockDevice => Kind::Device('b', stat.st_rdev),
            FileType::Unknown => panic!("{}: unknown kind of file", path.escape_ascii()),
        };
        let same_as = (kind != Kind::Directory && stat.st_nlink > 1).then(|| {
            let shown = path.escape_ascii().to_string();
            self.first_of_inode.entry((stat.st_dev, stat.st_ino)).or_insert(shown).clone()
        });
        let entry = Entry {
            mode: stat.st_mode & 0o7777,
            owner: (stat.st_uid, stat.st_gid),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            xattrs: xattrs(parent.as_fd(), name),
            same_as,
            kind,
        };
        let descend = (entry.kind == Kind::Directory).then(|| open(OFlags::DIRECTORY));
        self.listing.0.insert(path.clone(), entry);
        if let Some(directory) = descend {
            for name in names(&directory) {
                self.entry(&directory, &path, &name);
            }
        }
    }
}

fn names(directory: &OwnedFd) -> Vec<Vec<u8>> {
    let entries = Dir::read_from(directory).expect("read a folder");
    let names = entries.map(|entry| entry.expect("read a folder").file_name().to_bytes().to_vec());
    let mut names: Vec<_> = names.filter(|name| name != b"." && name != b"..").collect();
    names.sort();
    names
}

fn digest(file: OwnedFd) -> String {
    let mut file = std::fs::File::from(file);
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; 1 << 18];
    loop {
        match file.read(&mut block).expect("read a file") {
            0 => return hasher.finalize().to_hex().to_string(),
            length => hasher.update(&block[..length]),
        };
    }
}

fn xattrs(parent: BorrowedFd<'_>, name: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut place = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    place.extend_from_slice(name);
    let place = OsString::from_vec(place);
    let mut list = vec![0; 1 << 16];
    let Ok(length) = rustix::fs::llistxattr(&place, &mut list[..]) else { return Vec::new() };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found = Vec::new();
    for attribute in names {
        let mut value = vec![0; 1 << 16];
        let attribute = OsString::from_vec(attribute.to_vec());
        let length = rustix::fs::lgetxattr(&place, &attribute, &mut value[..]).expect("read an attribute");
        value.truncate(length);
        found.push((attribute.to_string_lossy().into_owned(), value));
    }
    found.sort();
    found
}
