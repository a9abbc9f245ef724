//! A no-op plan in a cold process: starts, reads stack file and state, compares, prints, ends.
//!
//! `cargo bench -p orchestra --bench cold_plan` prints the rows of `docs/benchmarks.md`. The resources are services with
//! zero replicas, so that the control plane has them all and no process is needed.

use std::{
    fmt::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

const ORCHESTRA: &str = env!("CARGO_BIN_EXE_orchestra");

fn stack(count: usize) -> String {
    let mut text = String::from("version: 1\nname: big\nservices:\n");
    for index in 0..count {
        let _ = write!(
            text,
            "  s{index}:\n    command: [\"/bin/sleep\", \"1000\"]\n    env: {{INDEX: \"{index}\", LOG_LEVEL: info}}\n    replicas: 0\n"
        );
        if index % 10 != 0 {
            let _ = writeln!(text, "    depends_on: {{s{}: started}}", index - 1);
        }
    }
    text
}

fn orchestra(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(ORCHESTRA);
    command
        .args(arguments)
        .current_dir(home)
        .env("ORCHESTRA_HOME", home.join("state"))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// User and system seconds of all children so far, and the largest resident size of one in KiB.
fn children() -> (f64, i64) {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    #[expect(unsafe_code, reason = "the standard library does not report what a child used")]
    // SAFETY: getrusage fills the whole structure, which is valid when zeroed.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    #[expect(clippy::cast_precision_loss, reason = "microseconds of a benchmark")]
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    (seconds(usage.ru_utime) + seconds(usage.ru_stime), usage.ru_maxrss)
}

fn main() {
    println!("| resources | up (first) | no-op plan: CPU | wall | resident |\n|---|---|---|---|---|");
    // Ascending, because the resident size that the kernel reports is the largest so far.
    for count in [100, 1_000, 10_000] {
        let home = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(home.path().join("orchestra.yaml"), stack(count)).expect("the folder is writable");
        let begun = Instant::now();
        assert!(orchestra(home.path(), &["up"]).status().expect("the binary runs").success());
        let up = begun.elapsed();
        assert!(orchestra(home.path(), &["server", "stop"]).status().expect("the binary runs").success());
        let before = children().0;
        let begun = Instant::now();
        for _ in 0..5 {
            let status = orchestra(home.path(), &["plan", "--exit-code"]).status().expect("the binary runs");
            assert!(status.success(), "a no-op plan has no changes");
        }
        let wall = begun.elapsed() / 5;
        let (after, resident) = children();
        println!(
            "| {count} | {} ms | {:.0} ms | {} ms | {} MB |",
            up.as_millis(),
            (after - before) / 5.0 * 1000.0,
            wall.as_millis(),
            resident / 1024
        );
        // Only the proxy is left; it has nothing to serve.
        end_proxy(home.path());
    }
}

/// Ends the proxy of a home that goes away.
fn end_proxy(home: &Path) {
    let wanted = home.join("state");
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(arguments) = std::fs::read(process.path().join("cmdline")) else { continue };
        let mut parts = arguments.split(|byte| *byte == 0);
        let ours = parts.clone().any(|part| part == b"proxy")
            && parts.any(|part| part == wanted.as_os_str().as_encoded_bytes());
        if let (true, Some(pid)) = (ours, process.file_name().to_str().and_then(|name| name.parse::<i32>().ok())) {
            let pid = rustix::process::Pid::from_raw(pid).expect("a process id is not zero");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}
