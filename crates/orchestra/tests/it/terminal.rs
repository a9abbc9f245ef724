//! A real terminal: what a person sees on it at the end, and what Ctrl-C does that is typed on it.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Child,
    sync::mpsc,
    time::{Duration, Instant},
};

use crate::{
    environment::{PATIENCE, TestEnvironment},
    tour::STACK,
};

const COLUMNS: usize = 100;
const ROWS: usize = 30;

/// A command on a terminal of its own.
struct OnTerminal {
    child: Child,
    keys: File,
    output: mpsc::Receiver<Vec<u8>>,
    screen: Screen,
}

impl OnTerminal {
    fn start(env: &TestEnvironment, arguments: &[&str]) -> Self {
        let (master, terminal) = open();
        let mut command = env.command(arguments);
        command.env("NO_COLOR", "1").env("TERM", "xterm");
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap()).stderr(terminal);
        #[expect(unsafe_code, reason = "the terminal must be the one whose Ctrl-C reaches the command")]
        // SAFETY: both calls are async-signal-safe and touch no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        // It has copies of the terminal, which would keep the output open.
        drop(command);
        let keys = File::from(master);
        let (sender, output) = mpsc::channel();
        let mut reader = keys.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // EIO: nobody has the other side any more.
            while let Ok(read @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keys, output, screen: Screen::default() }
    }

    fn press_ctrl_c(&mut self) {
        self.keys.write_all(b"\x03").unwrap();
    }

    /// Waits until the screen is as wanted.
    #[track_caller]
    fn wait_for(&mut self, what: &str, fits: impl Fn(&Screen) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !fits(&self.screen) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.screen.write(&bytes),
                Err(error) => panic!("waited in vain for {what} ({error}):\n{}", self.screen.text()),
            }
        }
    }

    /// Waits for its end; gives its exit code and the last screen.
    #[track_caller]
    fn end(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(5)) {
                self.screen.write(&bytes);
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.screen.text());
        };
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(50)) {
            self.screen.write(&bytes);
        }
        (status.code(), self.screen.text())
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Both sides of a new terminal of the fixed size.
fn open() -> (OwnedFd, OwnedFd) {
    let (mut master, mut terminal) = (0, 0);
    let size = libc::winsize {
        ws_row: u16::try_from(ROWS).unwrap(),
        ws_col: u16::try_from(COLUMNS).unwrap(),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    #[expect(unsafe_code, reason = "the standard library opens no terminals")]
    // SAFETY: all pointers are valid or null as openpty(3) allows; on success both descriptors are ours alone.
    let (master, terminal) = unsafe {
        let opened =
            libc::openpty(&raw mut master, &raw mut terminal, std::ptr::null_mut(), std::ptr::null(), &raw const size);
        assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
        (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal))
    };
    // No process that is started meanwhile may hold it open.
    for descriptor in [&master, &terminal] {
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC).unwrap();
        assert!(descriptor.as_raw_fd() > 2);
    }
    (master, terminal)
}

/// What stands on a terminal: only the sequences that the product uses are known, so that another one is found.
#[derive(Default)]
struct Screen {
    lines: Vec<Vec<char>>,
    row: usize,
    column: usize,
    /// Of a sequence or character that is not complete yet.
    rest: Vec<u8>,
}

impl Screen {
    fn write(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.rest);
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(error) => {
                self.rest = bytes[error.valid_up_to()..].to_vec();
                std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap()
            }
        };
        let mut left = text;
        while let Some(c) = left.chars().next() {
            if c == '\u{1b}' {
                let Some(end) = left.find(|c: char| c.is_ascii_alphabetic()) else {
                    self.rest.splice(0..0, left.bytes());
                    return;
                };
                self.sequence(&left[..=end]);
                left = &left[end + 1..];
                continue;
            }
            match c {
                '\n' => self.row += 1,
                '\r' => self.column = 0,
                c => self.put(c),
            }
            left = &left[c.len_utf8()..];
        }
    }

    fn sequence(&mut self, sequence: &str) {
        let number = || sequence[2..sequence.len() - 1].parse::<usize>().unwrap_or(1);
        match sequence.as_bytes()[sequence.len() - 1] {
            // Up so many lines, to their beginning.
            b'F' => {
                assert!(number() < ROWS, "the tree is higher than the screen: {sequence:?}");
                self.row = self.row.checked_sub(number()).expect("it does not leave the screen");
                self.column = 0;
            }
            // Erases what follows.
            b'J' => {
                self.lines.truncate(self.row + 1);
                if let Some(line) = self.lines.get_mut(self.row) {
                    line.truncate(self.column);
                }
            }
            _ => panic!("an unknown sequence: {sequence:?}"),
        }
    }

    fn put(&mut self, c: char) {
        assert!(!c.is_control(), "{c:?} reaches the terminal");
        if self.column == COLUMNS {
            // As terminals wrap: a line of the tree that did so would be found twice, because it is drawn over too late.
            (self.row, self.column) = (self.row + 1, 0);
        }
        self.lines.resize_with(self.lines.len().max(self.row + 1), Vec::new);
        let line = &mut self.lines[self.row];
        line.resize(line.len().max(self.column + 1), ' ');
        line[self.column] = c;
        self.column += 1;
    }

    fn text(&self) -> String {
        self.lines.iter().map(|line| line.iter().collect::<String>() + "\n").collect()
    }

    fn contains(&self, text: &str) -> bool {
        self.text().contains(text)
    }
}

#[test]
fn the_tree_is_drawn_in_place_and_ctrl_c_is_heard() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["server", "start"]);
    let (code, screen) = OnTerminal::start(&env, &["up"]).end();
    assert_eq!(code, Some(0), "{screen}");
    let lines: Vec<&str> = screen.lines().collect();
    assert!(lines[0].starts_with("run_1  ") && lines[0].contains("  up  release 1  "), "{screen}");
    for (branch, service, count) in [("├─ ", "service.api", "2/2"), ("└─ ", "service.worker", "1/1")] {
        let found: Vec<_> = lines.iter().filter(|line| line.contains(service)).collect();
        // However often it was drawn, it stands there once.
        let [line] = found[..] else { panic!("{service} stands there {} times:\n{screen}", found.len()) };
        assert!(line.starts_with(branch) && line.contains("ready") && line.contains(count), "{screen}");
    }
    assert!(screen.contains(" is ready after ") && screen.contains("SERVICE  PORT"), "{screen}");

    // Once: it stops safely, and says what it leaves.
    env.write(&STACK.replace("VERSION: one", "VERSION: slow, START_DELAY_MS: \"60000\""));
    let mut up = OnTerminal::start(&env, &["up"]);
    up.wait_for("the rollout", |screen| screen.contains("service.api") && screen.contains("rolling"));
    up.press_ctrl_c();
    let (code, screen) = up.end();
    assert_eq!(code, Some(5), "{screen}");
    assert!(screen.contains("cancelling run_2: it stops safely"), "{screen}");
    assert!(screen.contains("release 1 is in force again"), "{screen}");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after Ctrl-C");

    // Twice, while the run cannot end yet: the command leaves it to the server.
    env.write(&STACK.replace("VERSION: one", "VERSION: stubborn, START_DELAY_MS: \"60000\", IGNORE_TERM: \"1\""));
    let mut up = OnTerminal::start(&env, &["up"]);
    up.wait_for("the rollout", |screen| screen.contains("service.api") && screen.contains("rolling"));
    up.press_ctrl_c();
    // Two signals that nobody has taken in between are one.
    up.wait_for("the cancellation", |screen| screen.contains("cancelling run_3: it stops safely"));
    up.press_ctrl_c();
    let (code, screen) = up.end();
    assert_eq!(code, Some(130), "{screen}");
    assert!(screen.contains("left run_3 to the server"), "{screen}");
    env.wait_for("the end of the run", |status| status["run"].is_null());
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after two times Ctrl-C");

    // `status --watch` ends by it too, and leaves a screen that is right.
    let mut watch = OnTerminal::start(&env, &["status", "--watch"]);
    watch.wait_for("the status", |screen| screen.contains("INSTANCE") && screen.contains("api-r1-1"));
    watch.press_ctrl_c();
    let (code, screen) = watch.end();
    assert_eq!(code, Some(130), "{screen}");
    assert_eq!(screen.matches("SERVICE").count(), 1, "{screen}");
    env.finish();
}
