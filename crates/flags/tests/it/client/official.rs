//! The official OpenFeature client of Python as a program that answers questions. Tests of several crates use this file.
//!
//! The client comes from the Python package index, once per target folder. Where that cannot be reached, or Python cannot
//! make virtual environments, a test says so loudly and proves nothing.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use serde_json::Value;

/// A Python that has the client, or nothing where it cannot be had.
pub(crate) fn python() -> Option<PathBuf> {
    let requirements = concat!(env!("CARGO_MANIFEST_DIR"), "/../flags/tests/it/client/requirements.txt");
    python_with("openfeature-client", "sys.version_info >= (3, 10)", Path::new(requirements))
}

/// A Python that has what these requirements name, or nothing where it cannot be had. `usable` says, in Python, for which
/// ones they are.
pub(crate) fn python_with(name: &str, usable: &str, requirements: &Path) -> Option<PathBuf> {
    let skipped = |why: &str| {
        let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {name}: {why} ***\n");
    };
    let script = format!("import sys, platform, venv, ensurepip; sys.exit(not ({usable}))");
    if !Command::new("python3").args(["-c", &script]).status().is_ok_and(|status| status.success()) {
        skipped(&format!("it needs Python with venv (Debian: apt-get install python3-venv) and {usable}"));
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    // Two at one time wait for each other; the second finds everything done.
    let lock = File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    let (venv, wanted) = (folder.join("venv"), fs::read_to_string(requirements).unwrap());
    let (python, done) = (venv.join("bin/python"), folder.join("installed.txt"));
    if fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) && python.exists() {
        return Some(python);
    }
    let made = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // pip wants the user's settings: the index may be a mirror.
    let installed = Command::new(&python)
        .args(["-m", "pip", "install", "--only-binary=:all:", "--require-hashes", "--no-deps", "--quiet"])
        .args(["--retries", "1", "--disable-pip-version-check", "--no-input", "-r"])
        .arg(requirements)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&installed.stderr).into_owned();
    if !installed.status.success() {
        let unreachable = ["Max retries", "from versions: none", "No matching distribution", "onnection", "timed out"];
        assert!(!said.contains("DO NOT MATCH THE HASHES"), "{said}");
        assert!(unreachable.iter().any(|sign| said.contains(sign)), "pip failed:\n{said}");
        skipped(&format!("the package index cannot be reached\n{}", said.trim()));
        return None;
    }
    fs::write(done, wanted).unwrap();
    Some(python)
}

/// A program that uses the client.
pub(crate) struct Client {
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    pub(crate) fn start(python: &Path, endpoint: &str) -> Self {
        let mut process = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../flags/tests/it/client/ask.py"))
            .env("OFREP_ENDPOINT", endpoint)
            .env("NO_PROXY", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (questions, answers) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, questions, answers }
    }

    /// Value, variant and reason, or the value and the error.
    pub(crate) fn ask(&mut self, question: &Value) -> Value {
        writeln!(self.questions, "{question}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the client ended at {question}");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
