//! Programs started on free ports with a data folder of their own, and a small HTTP client.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex,
        mpsc::{Receiver, channel},
    },
    time::{Duration, Instant},
};

use serde_json::Value;

/// Longest wait for anything that must come.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) const API: &str = env!("CARGO_BIN_EXE_agent-api");
pub(crate) const WORKER: &str = env!("CARGO_BIN_EXE_worker");
pub(crate) const MIGRATE: &str = env!("CARGO_BIN_EXE_migrate");
pub(crate) const WEB: &str = env!("CARGO_BIN_EXE_web");

fn command(program: &str, data: &Path, env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("DATA_DIR", data).envs(env.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Runs the migration; returns what it logged.
pub(crate) fn migrate(data: &Path) -> String {
    let output = command(MIGRATE, data, &[]).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// A program that listens.
pub(crate) struct Program {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Mutex<Receiver<String>>,
}

impl Program {
    pub(crate) fn start(program: &str, data: &Path, env: &[(&str, &str)]) -> Self {
        let mut child = command(program, data, env).env("PORT", "0").spawn().unwrap();
        let (sender, log) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut program = Self { child, address, log: Mutex::new(log) };
        let line = program.wait_for_line("listening on http://");
        program.address = line.split("http://").nth(1).unwrap().parse().unwrap();
        program
    }

    /// The next line of its log that contains `text`.
    pub(crate) fn wait_for_line(&self, text: &str) -> String {
        let end = Instant::now() + SOON;
        loop {
            let line = self.log.lock().unwrap().recv_timeout(end.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|_| panic!("no line with {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }

    /// Waits for its end: the log ends with the process.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        while self.log.lock().unwrap().recv_timeout(SOON).is_ok() {}
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::yield_now();
        }
        panic!("the program does not end");
    }

    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut stream = self.send(&format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"));
        stream.read_all()
    }

    pub(crate) fn get_json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Begins a POST; its answer can be read as it comes.
    pub(crate) fn post(&self, path: &str, body: &str) -> Answer {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
    }

    fn send(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        Answer { stream: BufReader::new(stream), status: 0, chunked: false }
    }

    /// A whole chat: its events by name.
    pub(crate) fn chat(&self, body: &Value) -> Vec<(String, Value)> {
        let mut answer = self.post("/v1/chat", &body.to_string());
        std::iter::from_fn(|| answer.event()).collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An HTTP answer.
pub(crate) struct Answer {
    stream: BufReader<TcpStream>,
    status: u16,
    chunked: bool,
}

impl Answer {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Reads the head, once; returns the status.
    pub(crate) fn status(&mut self) -> u16 {
        if self.status == 0 {
            self.status = self.line().split(' ').nth(1).unwrap().parse().unwrap();
            loop {
                match self.line().to_lowercase().as_str() {
                    "" => break,
                    "transfer-encoding: chunked" => self.chunked = true,
                    _ => {}
                }
            }
        }
        self.status
    }

    /// The next piece of the body; `None` at its proper end. A body that is cut off fails the test.
    fn piece(&mut self) -> Option<String> {
        self.status();
        if !self.chunked {
            let mut rest = String::new();
            self.stream.read_to_string(&mut rest).unwrap();
            return (!rest.is_empty()).then_some(rest);
        }
        let line = self.line();
        let size = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("the answer was cut off: {line:?}"));
        let mut piece = vec![0; size + 2];
        self.stream.read_exact(&mut piece).unwrap();
        piece.truncate(size);
        (size > 0).then(|| String::from_utf8(piece).unwrap())
    }

    /// The next server-sent event; each comes in a piece of its own.
    pub(crate) fn event(&mut self) -> Option<(String, Value)> {
        loop {
            let piece = self.piece()?;
            let field = |name: &str| piece.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            if let (Some(event), Some(data)) = (field("event:"), field("data:")) {
                return Some((event.to_owned(), serde_json::from_str(data).unwrap()));
            }
        }
    }

    pub(crate) fn read_all(&mut self) -> (u16, String) {
        let status = self.status();
        (status, std::iter::from_fn(|| self.piece()).collect())
    }
}
