//! How a failure is told: `error: …`, its causes, its evidence, `hint: …`; and the exit code it ends with.
//!
//! Owns the exit codes. Refuses to know what was being done. Chains of causes are printed here and nowhere else in
//! this crate.

use std::{fmt, io, process::ExitCode};

use flocker_node::{
    api::{client::ClientError, types::ApiProblem},
    config::Paths,
    daemon::DaemonError,
    setup::SetupError,
};

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Everything was done.
    Done = 0,
    /// It failed.
    Failure = 1,
    /// It was called wrongly.
    Usage = 2,
    /// What was named is not there.
    NotFound = 3,
    /// Something is in the way: diverged, in use, exists.
    Conflict = 4,
    /// The daemon or the peer does not answer.
    Unreachable = 5,
    /// The user stopped it.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// Returns the exit of a code as [`ApiProblem::exit_code`] gives it.
    pub(crate) fn from_code(code: i32) -> Self {
        match code {
            0 => Self::Done,
            2 => Self::Usage,
            3 => Self::NotFound,
            4 => Self::Conflict,
            5 => Self::Unreachable,
            130 => Self::Interrupted,
            _ => Self::Failure,
        }
    }
}

/// A failure that this program itself finds.
#[derive(Debug)]
pub(crate) struct Stop {
    message: String,
    hint: Option<String>,
    exit: Exit,
}

impl Stop {
    /// Makes a failure with its exit code.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, exit }
    }

    /// Says what to do next.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Stop {}

fn problem_in(error: &anyhow::Error) -> Option<&ApiProblem> {
    error.chain().find_map(|cause| match cause.downcast_ref::<ClientError>() {
        Some(ClientError::Problem(problem)) => Some(problem),
        _ => cause.downcast_ref::<ApiProblem>(),
    })
}

/// Returns the exit code of a failure.
pub(crate) fn exit_of(error: &anyhow::Error) -> Exit {
    for cause in error.chain() {
        if let Some(stop) = cause.downcast_ref::<Stop>() {
            return stop.exit;
        }
        if let Some(failed) = cause.downcast_ref::<ClientError>() {
            return Exit::from_code(failed.exit_code());
        }
        if let Some(problem) = cause.downcast_ref::<ApiProblem>() {
            return Exit::from_code(problem.exit_code());
        }
        if let Some(failed) = cause.downcast_ref::<SetupError>() {
            return Exit::from_code(failed.exit_code());
        }
        if let Some(DaemonError::AlreadyRunning(_)) = cause.downcast_ref::<DaemonError>() {
            return Exit::Conflict;
        }
    }
    Exit::Failure
}

/// Tells whether the failure is only that nobody reads our standard output any more (`flocker list | head -1`).
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(broken))
}

/// Tells a failure in full. `paths` is this call's node, for the way to start it.
pub(crate) fn tell(error: &anyhow::Error, paths: Option<&Paths>) -> String {
    let mut text = format!("error: {error}\n");
    let mut said = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // A transparent layer says what its source says.
        if !said.ends_with(&cause) {
            text.push_str(&format!("  because: {cause}\n"));
        }
        said = cause;
    }
    if let Some(problem) = problem_in(error) {
        for (name, value) in &problem.evidence {
            text.push_str(&format!("  {}: {}\n", name.replace('_', " "), plain(value)));
        }
    }
    if let Some(hint) = hint_of(error, paths) {
        text.push_str(&format!("hint: {hint}\n"));
    }
    text
}

fn plain(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        serde_json::Value::Object(fields) => {
            fields.iter().map(|(name, value)| format!("{name} {}", plain(value))).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}

fn hint_of(error: &anyhow::Error, paths: Option<&Paths>) -> Option<String> {
    for cause in error.chain() {
        if let Some(stop) = cause.downcast_ref::<Stop>() {
            return stop.hint.clone();
        }
        if let Some(ClientError::Unreachable { .. }) = cause.downcast_ref::<ClientError>() {
            return paths.map(how_to_start);
        }
    }
    problem_in(error).and_then(|problem| problem.hint.clone())
}

/// Says how the node of this call comes to run.
pub(crate) fn how_to_start(paths: &Paths) -> String {
    let command = command_for(paths);
    if paths.config.exists() {
        format!("start the daemon with: {command} node start")
    } else {
        format!(
            "there is no node in {} yet; make one with: {command} init (or: {command} join TOKEN), then start it with: \
             {command} node start",
            paths.state.display()
        )
    }
}

/// Returns `flocker` with the `--state` that this call's node needs.
pub(crate) fn command_for(paths: &Paths) -> String {
    let is_default = Paths::resolve(None, None).is_ok_and(|default| default.state == paths.state);
    if is_default { "flocker".to_owned() } else { format!("flocker --state {}", paths.state.display()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{collections::BTreeMap, path::PathBuf};

    use anyhow::{Context as _, anyhow};
    use flocker_node::api::client::Unreachable;
    use serde_json::json;

    use super::*;

    fn problem(status: u16) -> ApiProblem {
        ApiProblem {
            status,
            code: "blocked".into(),
            detail: "cannot destroy db@one: clones depend on it".into(),
            hint: Some("destroy the clones first".into()),
            evidence: BTreeMap::from([("dependent_clones".into(), json!(["db2", "db3"]))]),
        }
    }

    #[test]
    fn a_problem_is_told_with_its_evidence_and_hint() {
        let told = tell(&anyhow!(ClientError::Problem(problem(409))), None);
        assert_eq!(
            told,
            "error: cannot destroy db@one: clones depend on it\n  dependent clones: db2, db3\n\
             hint: destroy the clones first\n"
        );
    }

    #[test]
    fn a_chain_is_told_from_the_outside_in() {
        let error = Err::<(), _>(problem(500)).context("cannot push db@one to host-b").unwrap_err();
        let told = tell(&error, None);
        assert!(told.starts_with("error: cannot push db@one to host-b\n  because: cannot destroy db@one"), "{told}");
    }

    #[test]
    fn each_status_of_a_problem_has_its_exit_code() {
        let cases = [
            (400, Exit::Usage),
            (422, Exit::Usage),
            (404, Exit::NotFound),
            (409, Exit::Conflict),
            (502, Exit::Unreachable),
            (504, Exit::Unreachable),
            (500, Exit::Failure),
        ];
        for (status, exit) in cases {
            assert_eq!(exit_of(&anyhow!(ClientError::Problem(problem(status)))), exit, "{status}");
            assert_eq!(exit_of(&Err::<(), _>(problem(status)).context("outer").unwrap_err()), exit, "{status}");
        }
        assert_eq!(exit_of(&anyhow!("anything else")), Exit::Failure);
        assert_eq!(exit_of(&anyhow!(Stop::new(Exit::Interrupted, "stopped"))), Exit::Interrupted);
    }

    #[test]
    fn a_daemon_that_does_not_run_is_told_with_the_way_to_start_it() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::resolve(Some(folder.path().to_owned()), None).unwrap();
        let down = || ClientError::Unreachable { socket: PathBuf::from("/x/api.sock"), why: Unreachable::Missing };
        let bare = tell(&anyhow!(down()), Some(&paths));
        assert!(bare.contains("there is no socket at this path"), "{bare}");
        assert!(bare.contains(&format!("flocker --state {} init", folder.path().display())), "{bare}");
        std::fs::write(&paths.config, "").unwrap();
        let stopped = tell(&anyhow!(down()), Some(&paths));
        let wanted = format!("hint: start the daemon with: flocker --state {} node start\n", folder.path().display());
        assert!(stopped.ends_with(&wanted), "{stopped}");
        assert_eq!(exit_of(&anyhow!(down())), Exit::Unreachable);
    }
}
