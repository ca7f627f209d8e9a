//! Running the `flocker` command and reading what it prints.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::Value;

/// Returns the binary under test: the one beside this test's own executable.
///
/// # Panics
/// When it was not built; `./test` builds it first.
pub fn flocker_binary() -> PathBuf {
    if let Some(given) = std::env::var_os("FLOCKER_TEST_BINARY") {
        return given.into();
    }
    let own = std::env::current_exe().expect("a running test has an executable");
    let profile = own.ancestors().find(|folder| folder.join("flocker").is_file());
    let Some(profile) = profile else {
        panic!("no flocker binary beside {}; run: cargo build --workspace --all-features", own.display())
    };
    profile.join("flocker")
}

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it was called, for messages.
    pub call: String,
    /// Its exit code; 128 + signal when it was killed.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Asserts that it succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.ends_with(0)
    }

    /// Asserts its exit code.
    #[track_caller]
    pub fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code of {}\nstdout:\n{}\nstderr:\n{}", self.call, self.stdout, self.stderr);
        self
    }

    /// Asserts that its standard error holds each of these texts, in any case.
    #[track_caller]
    pub fn says(self, wanted: &[&str]) -> Self {
        let said = self.stderr.to_lowercase();
        for text in wanted {
            assert!(
                said.contains(&text.to_lowercase()),
                "{} does not say {text:?}\nstderr:\n{}\nstdout:\n{}",
                self.call,
                self.stderr,
                self.stdout
            );
        }
        self
    }

    /// Parses its standard output as one JSON value.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| {
            panic!("{} printed no JSON ({error}):\n{}\nstderr:\n{}", self.call, self.stdout, self.stderr)
        })
    }
}

/// A command that is running. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    call: String,
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Running {
    /// Starts a command with both outputs kept.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let call = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {call}: {error}"));
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Self { call, child, stdout, stderr }
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells whether it has ended.
    pub fn is_over(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn finish(mut self, within: Duration) -> Output {
        let deadline = Instant::now() + within;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let (stdout, stderr) = (text(self.stdout.take()), text(self.stderr.take()));
                panic!("{} did not end within {within:?}\nstdout:\n{stdout}\nstderr:\n{stderr}", self.call);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let (stdout, stderr) = (text(self.stdout.take()), text(self.stderr.take()));
        Output { call: self.call.clone(), code: code_of(status), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the exit code, 128 + signal for a killed process.
pub fn code_of(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Builds a call of the binary with no inherited settings of Flocker's.
pub fn flocker(state: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(flocker_binary());
    clean(&mut command);
    command.arg("--state").arg(state).args(args);
    command
}

/// Takes settings of Flocker's out of a command's environment.
pub fn clean(command: &mut Command) {
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("FLOCKER_") {
            command.env_remove(key);
        }
    }
    command.env("NO_COLOR", "1").env("LC_ALL", "C.UTF-8");
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

fn text(collector: Option<JoinHandle<Vec<u8>>>) -> String {
    let bytes = collector.map(|thread| thread.join().unwrap_or_default()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}
