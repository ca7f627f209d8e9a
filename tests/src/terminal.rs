//! A terminal that a command draws on: what it was sent, and what a user saw last.
//!
//! Owns one pseudo-terminal per command. Understands as much of the control sequences as progress bars use.

use std::{
    fs::File,
    io::Read,
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// A command whose three streams are one terminal of 100 columns and 24 lines.
pub struct OnTerminal {
    child: Child,
    reader: Option<JoinHandle<Vec<u8>>>,
}

impl OnTerminal {
    /// Starts a command on a new terminal.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).expect("a terminal of our own");
        unlockpt(&master).expect("a terminal that opens");
        tcsetwinsize(&master, Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).expect("a size");
        let name = ptsname(&master, Vec::new()).expect("a terminal with a name");
        let open = || {
            let path = name.to_str().expect("a name in ASCII");
            File::options().read(true).write(true).open(path).expect("the terminal's other end")
        };
        command.stdin(Stdio::from(open())).stdout(Stdio::from(open())).stderr(Stdio::from(open()));
        let child = command.env("TERM", "xterm").env_remove("NO_COLOR").spawn().expect("the command starts");
        // Its copies of the other end must not outlive the child's.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut master = File::from(master);
        let reader = std::thread::spawn(move || {
            let (mut sent, mut buffer) = (Vec::new(), [0; 4096]);
            // The last close of the other end is an error here (EIO).
            while let Ok(length @ 1..) = master.read(&mut buffer) {
                sent.extend_from_slice(&buffer[..length]);
            }
            sent
        });
        Self { child, reader: Some(reader) }
    }

    /// Waits for the end; returns the exit code and everything that was sent to the terminal.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn finish(mut self, within: Duration) -> (i32, String) {
        let deadline = Instant::now() + within;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                break status;
            }
            assert!(Instant::now() < deadline, "it did not end within {within:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let sent = self.reader.take().expect("read once").join().expect("the reader ends");
        (crate::command::code_of(status), String::from_utf8_lossy(&sent).into_owned())
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the lines that stand on the terminal after everything that was sent: carriage returns, line feeds, cursor up
/// and down, and erasing are followed, colours are dropped.
pub fn screen(sent: &str) -> Vec<String> {
    let mut lines: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column) = (0_usize, 0_usize);
    let mut characters = sent.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\r' => column = 0,
            '\n' => row += 1,
            '\u{1b}' if characters.peek() == Some(&'[') => {
                characters.next();
                let mut number = String::new();
                let command = loop {
                    match characters.next() {
                        Some(digit) if digit.is_ascii_digit() || ";?".contains(digit) => number.push(digit),
                        other => break other,
                    }
                };
                let count = number.parse().unwrap_or(1);
                match command {
                    Some('A') => row = row.saturating_sub(count),
                    Some('B') => row += count,
                    Some('K') if number == "2" => lines[row].clear(),
                    Some('K') => lines[row].truncate(column),
                    Some('J') => {
                        lines[row].truncate(column);
                        lines.truncate(row + 1);
                    }
                    _ => {}
                }
            }
            '\u{1b}' => {}
            character => {
                let line = &mut lines[row];
                line.resize(line.len().max(column + 1), ' ');
                line[column] = character;
                column += 1;
            }
        }
        lines.resize(lines.len().max(row + 1), Vec::new());
    }
    let lines = lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_that_is_drawn_anew_and_cleared_leaves_what_stood_around_it() {
        let sent = "before\r\n[=>  ] 1\r\x1b[2K[==> ] 2\r\x1b[2K\x1b[31mafter\x1b[0m\r\n";
        assert_eq!(screen(sent), ["before", "after"]);
        assert_eq!(screen("a\r\nb\r\nc\x1b[2A\r\x1b[0Jx"), ["x"]);
    }
}
