//! Child programs: the one place of this crate that starts them.
//!
//! Owns how: arguments as a list (no shell), an environment of three variables, standard error kept up to a limit, and an
//! error that names the whole command. Refuses to know what the programs do. All calls block.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io::{self, Read},
    os::{fd::AsFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::fs::Access;

use crate::error::ErrorKind;

/// How much of a program's standard error is kept: its first 64 KiB, where the cause is.
pub const STDERR_LIMIT: usize = 64 * 1024;

/// The most output that [`run`] takes. What is larger is read with [`Running`].
pub const STDOUT_LIMIT: u64 = 64 * 1024 * 1024;

/// How often [`Running::ends_within`] looks.
const POLL: Duration = Duration::from_millis(10);

/// Where programs are looked for; the node's own environment does not decide it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds a program, so that it is started from its path: where the child would have to look for it, the standard library copies
/// this process for that (fork), which takes the longer the larger it is.
fn find(program: &str) -> PathBuf {
    let mut places = PATH.split(':').map(|folder| Path::new(folder).join(program));
    places.find(|place| rustix::fs::access(place, Access::EXEC_OK).is_ok()).unwrap_or_else(|| program.into())
}

/// A program that could not be started or did not succeed.
#[derive(Debug)]
pub struct CommandError {
    command: String,
    why: Why,
    stdout: Vec<u8>,
}

#[derive(Debug)]
enum Why {
    Io(io::Error),
    Failed { status: ExitStatus, stderr: String },
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.why {
            Why::Io(error) => write!(f, "`{}`: {error}", self.command),
            Why::Failed { status, stderr } => write!(f, "`{}` failed ({status}): {}", self.command, stderr.trim()),
        }
    }
}

impl std::error::Error for CommandError {}

impl CommandError {
    /// Returns what the program wrote to standard error; empty where it never ran.
    pub fn stderr(&self) -> &str {
        match &self.why {
            Why::Io(_) => "",
            Why::Failed { stderr, .. } => stderr,
        }
    }

    /// Returns what it wrote to standard output before it failed; kept by [`run`] and [`run_holding`] only.
    pub fn stdout(&self) -> &[u8] {
        &self.stdout
    }

    /// Returns the exit code of a program that ran and ended by itself.
    pub fn code(&self) -> Option<i32> {
        match &self.why {
            Why::Io(_) => None,
            Why::Failed { status, .. } => status.code(),
        }
    }

    /// Tells whether the program is not installed.
    pub fn is_missing(&self) -> bool {
        matches!(&self.why, Why::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Sorts it by the words of strerror(3), which programs end their lines with, under `LC_ALL=C`.
    pub fn into_kind(self) -> ErrorKind {
        let ends = |words: &str| self.stderr().lines().any(|line| line.trim_end().ends_with(words));
        if ends("No space left on device") || ends("Disk quota exceeded") {
            return ErrorKind::NoSpace;
        }
        if ends("Operation not permitted") || ends("Permission denied") {
            return ErrorKind::PermissionDenied;
        }
        ErrorKind::Io(io::Error::other(self))
    }
}

/// Whether a program gets something to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Nothing.
    Nothing,
    /// A pipe that the caller writes to; see [`Running::take_stdin`].
    Pipe,
}

/// Runs a program to its end and returns its standard output.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> Result<Vec<u8>, CommandError> {
    to_the_end(&Running::start(program, arguments, Input::Nothing)?)
}

/// Like [`run`]; the program holds a descriptor of `held` while it runs. See [`Running::start_holding`].
pub fn run_holding<A: AsRef<OsStr>>(program: &str, arguments: &[A], held: &File) -> Result<Vec<u8>, CommandError> {
    to_the_end(&Running::start_holding(program, arguments, Input::Nothing, held)?)
}

fn to_the_end(running: &Running) -> Result<Vec<u8>, CommandError> {
    let mut output = Vec::new();
    if let Some(stdout) = running.take_stdout() {
        let read = stdout.take(STDOUT_LIMIT).read_to_end(&mut output);
        read.map_err(|error| running.failed(Why::Io(error)))?;
    }
    match running.finish() {
        Ok(()) => Ok(output),
        Err(error) => Err(CommandError { stdout: output, ..error }),
    }
}

/// How much a pipe is to hold, in bytes: the most that an ordinary user may ask for (pipe(7)); Linux gives it 64 KiB. Program and
/// daemon wait less for each other then.
const PIPE_LENGTH: usize = 1024 * 1024;

fn widen(pipe: &impl AsFd) {
    // Where the user has too much in pipes already, it stays as it is.
    let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_LENGTH);
}

/// A program that runs. Dropping the value kills it and waits for it.
pub struct Running {
    command: String,
    child: Mutex<Child>,
    stdin: Mutex<Option<ChildStdin>>,
    stdout: Mutex<Option<ChildStdout>>,
    complaints: Mutex<Option<JoinHandle<String>>>,
}

impl Running {
    /// Starts a program.
    pub fn start<A: AsRef<OsStr>>(program: &str, arguments: &[A], input: Input) -> Result<Self, CommandError> {
        let stdin = if input == Input::Pipe { Stdio::piped() } else { Stdio::null() };
        Self::spawn(program, arguments, stdin, Stdio::piped())
    }

    /// Starts a program that holds a descriptor of `held`, and with it the file's lock (flock(2)), for as long as it
    /// runs, even where this process dies. Where it reads a pipe, that descriptor is its standard output, which is then
    /// not read; else its standard input, which it must not read.
    pub fn start_holding<A: AsRef<OsStr>>(
        program: &str,
        arguments: &[A],
        input: Input,
        held: &File,
    ) -> Result<Self, CommandError> {
        let copy = held.try_clone();
        let held = copy.map_err(|error| CommandError {
            command: program.to_owned(),
            why: Why::Io(error),
            stdout: Vec::new(),
        })?;
        match input {
            Input::Pipe => Self::spawn(program, arguments, Stdio::piped(), held.into()),
            Input::Nothing => Self::spawn(program, arguments, held.into(), Stdio::piped()),
        }
    }

    fn spawn<A: AsRef<OsStr>>(
        program: &str,
        arguments: &[A],
        stdin: Stdio,
        stdout: Stdio,
    ) -> Result<Self, CommandError> {
        let words: Vec<OsString> = arguments.iter().map(|argument| argument.as_ref().to_owned()).collect();
        let shown = words.iter().map(|word| format!(" {}", word.to_string_lossy())).collect::<String>();
        let command = format!("{program}{shown}");
        tracing::debug!(command, "starts a program");
        let failed =
            |error: io::Error| CommandError { command: command.clone(), why: Why::Io(error), stdout: Vec::new() };
        let mut child = Command::new(find(program))
            .arg0(program)
            .args(&words)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", PATH)
            .env("TZ", "UTC")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let complaints = std::thread::Builder::new().name("flocker-stderr".to_owned()).spawn(move || keep(stderr));
        let complaints = match complaints {
            Ok(thread) => thread,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(error));
            }
        };
        Ok(Self {
            command,
            child: Mutex::new(child),
            stdin: Mutex::new(stdin),
            stdout: Mutex::new(stdout),
            complaints: Mutex::new(Some(complaints)),
        })
    }

    /// Returns the pipe that the program reads from, once.
    pub fn take_stdin(&self) -> Option<ChildStdin> {
        locked(&self.stdin).take().inspect(widen)
    }

    /// Returns the pipe that the program writes to, once.
    pub fn take_stdout(&self) -> Option<ChildStdout> {
        locked(&self.stdout).take().inspect(widen)
    }

    /// Ends its input and waits for it to end.
    pub fn finish(&self) -> Result<(), CommandError> {
        self.finish_hearing().map(drop)
    }

    /// Like [`finish`](Self::finish); returns what it wrote to standard error although it succeeded.
    pub fn finish_hearing(&self) -> Result<String, CommandError> {
        drop(self.take_stdin());
        // Closing the pipe instead would kill a program that says good-bye.
        if let Some(mut stdout) = self.take_stdout() {
            let _ = io::copy(&mut stdout, &mut io::sink());
        }
        let status = locked(&self.child).wait().map_err(|error| self.failed(Why::Io(error)))?;
        let stderr = locked(&self.complaints).take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        if status.success() { Ok(stderr) } else { Err(self.failed(Why::Failed { status, stderr })) }
    }

    /// Waits for it to end by itself, this long at most; tells whether it did. Its output must be small.
    pub fn ends_within(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        while matches!(locked(&self.child).try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }

    /// Kills it. Its pipes end; [`Running::finish`] then fails.
    pub fn kill(&self) {
        let _ = locked(&self.child).kill();
    }

    fn failed(&self, why: Why) -> CommandError {
        CommandError { command: self.command.clone(), why, stdout: Vec::new() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        let _ = self.finish();
    }
}

/// A program that several hold; see [`Running::kill`].
pub type Shared = Arc<Running>;

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads what a program writes, behind what a buffer has: so many bytes or some more, and less only at the end.
pub fn append(from: &ChildStdout, buffer: &mut Vec<u8>, length: usize) -> io::Result<()> {
    let enough = buffer.len() + length;
    buffer.reserve_exact(length);
    while buffer.len() < enough {
        match rustix::io::read(from, rustix::buffer::spare_capacity(buffer)) {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads to the end, so that the program never waits, and keeps the beginning.
fn keep(stderr: Option<impl Read>) -> String {
    let Some(mut stderr) = stderr else { return String::new() };
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stderr.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => kept.extend_from_slice(&buffer[..length.min(STDERR_LIMIT - kept.len())]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_program_gets_its_arguments_as_they_are_and_a_clean_environment() {
        assert_eq!(run("printf", &["%s|", "a b", "$(id)", "*"]).unwrap(), b"a b|$(id)|*|");
        let environment = String::from_utf8(run::<&str>("env", &[]).unwrap()).unwrap();
        let mut names: Vec<_> = environment.lines().filter_map(|line| line.split('=').next()).collect();
        names.sort_unstable();
        assert_eq!(names, ["LC_ALL", "PATH", "TZ"]);
    }

    #[test]
    fn a_failure_names_the_command_and_says_what_the_program_said() {
        let error = run("ls", &["/no/such/place"]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("`ls /no/such/place` failed") && text.contains("No such file"), "{text}");
        assert!(run("no-such-program", &[""; 0]).unwrap_err().is_missing());
    }

    #[test]
    fn a_program_that_complains_without_end_is_read_and_cut() {
        let error = run(
            "sh",
            &[
                "-c",
                "i=0; while [ $i -lt 3000 ]; do echo $i-0123456789012345678901234567890123456789 >&2; i=$((i+1)); done; exit 3",
            ],
        );
        assert_eq!(error.unwrap_err().stderr().len(), STDERR_LIMIT);
    }

    #[test]
    fn a_failure_keeps_what_was_said_before_it() {
        assert_eq!(run("sh", &["-c", "echo so far; exit 2"]).unwrap_err().stdout(), b"so far\n");
    }

    #[test]
    fn a_program_holds_the_lock_of_a_file_until_it_ends() {
        use rustix::fs::{FlockOperation, flock};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        for input in [Input::Nothing, Input::Pipe] {
            let held = File::create(&path).unwrap();
            flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
            let program = if input == Input::Pipe { ("cat", vec![]) } else { ("sleep", vec!["1000"]) };
            let running = Running::start_holding(program.0, &program.1, input, &held).unwrap();
            drop(held);
            let other = File::open(&path).unwrap();
            assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err(), "{program:?}");
            drop(running);
            flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
        }
    }

    #[test]
    fn pipes_of_programs_hold_a_mebibyte() {
        let running = Running::start("cat", &[] as &[&str], Input::Pipe).unwrap();
        let (stdin, stdout) = (running.take_stdin().unwrap(), running.take_stdout().unwrap());
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&stdin).unwrap(), PIPE_LENGTH);
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&stdout).unwrap(), PIPE_LENGTH);
    }

    #[test]
    fn a_program_that_was_killed_ends_its_output() {
        let running = Running::start("sleep", &["1000"], Input::Nothing).unwrap();
        running.kill();
        assert!(running.finish().is_err());
    }
}
