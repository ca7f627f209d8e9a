//! The README's five minutes, typed in as they are written.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use flocker_tests::{
    LONG, Running, SHORT, Scratch, command::clean, flocker_binary, http, needs::program, node::free_address, wait_until,
};

#[test]
fn the_five_minutes_of_the_readme_work_as_written() {
    let scratch = Scratch::new();
    let ports = [free_address().port(), free_address().port()].map(|port| port.to_string());
    let commands = commands_under("## Five minutes");
    assert!(commands.len() > 20, "{commands:?}");
    let mut daemons = Vec::new();
    let mut token = String::new();
    for written in commands {
        let typed = written
            .replace("/tmp/", &format!("{}/", scratch.path().display()))
            .replace("7801", &ports[0])
            .replace("7802", &ports[1])
            .replace("TOKEN", &token)
            .replace("/usr/share/doc", some_documentation(&scratch).to_str().unwrap());
        if let Some(daemon) = typed.strip_suffix('&') {
            daemons.push(Running::start(&mut shell(&format!("exec {daemon}"))));
            let state = scratch.path().join(if daemons.len() == 1 { "a" } else { "b" });
            wait_until("the daemon is ready", SHORT, || {
                http::try_request(&state.join("api.sock"), "GET", "/readyz", None).filter(|answer| answer.status == 200)
            });
            continue;
        }
        if typed.starts_with("curl") && program("curl").is_none() {
            continue;
        }
        let refused = written.contains("push db@from-a");
        let output = Running::start(&mut shell(&typed)).finish(LONG).ends_with(if refused { 4 } else { 0 });
        if written.contains("token create") {
            let words = output.stdout.split_whitespace();
            token = words.max_by_key(|word| word.len()).expect("a token is printed").to_owned();
        }
    }
}

/// A small tree in the place of a large one.
fn some_documentation(scratch: &Scratch) -> std::path::PathBuf {
    let folder = scratch.path().join("source/doc");
    if !folder.exists() {
        fs::create_dir_all(&folder).unwrap();
        flocker_tests::data::write_ordinary_tree(&folder, 120, 2000);
    }
    folder
}

/// Builds a shell that finds the binary as a user's would.
fn shell(line: &str) -> Command {
    let folder = flocker_binary().parent().unwrap().display().to_string();
    let mut command = Command::new(program("setpriv").unwrap_or("env".into()));
    if command.get_program() != "env" {
        command.args(["--pdeathsig", "KILL"]);
    }
    command.args(["sh", "-c", line]).stdin(Stdio::null());
    clean(&mut command);
    command.env("PATH", format!("{folder}:{}", std::env::var("PATH").unwrap_or_default()));
    command
}

/// Returns the lines of the code blocks under a heading.
fn commands_under(heading: &str) -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("README.md");
    let text = fs::read_to_string(readme).unwrap();
    let section = text.split(heading).nth(1).unwrap().split("\n## ").next().unwrap();
    let blocks = section.split("```").skip(1).step_by(2);
    blocks.flat_map(|block| block.lines().filter(|line| !line.trim().is_empty())).map(str::to_owned).collect()
}
