//! Hooks of rollouts: a question to somebody else that is asked once. 2xx or exit code 0 says yes.

use std::{
    collections::BTreeMap,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use orchestra_model::rollout::HookCall;
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
};

use crate::{
    check::{Fault, clean, no_answer},
    http::Request,
    outside::Place,
    target::HttpCheck,
};

/// What is kept of a command's standard error: its end, where programs say what went wrong.
const STDERR: usize = 64 * 1024;

/// How long what was written last is waited for once the command has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Asks a hook; `document` is the JSON that a webhook gets as the body of a POST, and a command on its standard input.
/// A command runs in `directory`, with nothing of the server's environment but `PATH` and `HOME`, in a process group of
/// its own that is killed when the time is over. It is killed as well when the thread ends that began it: that of a server
/// ends with the server.
///
/// # Errors
///
/// The reason for a no, in one line for people: the status, the exit code with the last line of standard error, or why
/// there was no answer.
pub async fn ask(call: &HookCall, directory: &str, document: &str, timeout: Duration) -> Result<(), String> {
    let mut stage = "";
    let asked = async {
        match call {
            HookCall::Webhook { url } => webhook(url, document, &mut stage).await,
            HookCall::Command(command) => run(command, directory, document).await,
        }
    };
    let answer = tokio::time::timeout(timeout, asked).await;
    answer.unwrap_or_else(|_| Err(no_answer(timeout, stage)))
}

async fn webhook(url: &str, document: &str, stage: &mut &'static str) -> Result<(), String> {
    let place = Place::of(url)?;
    let (connection, address) = place.connect(None, stage).await?;
    let headers = [("Host", place.authority), ("User-Agent", "orchestra"), ("Content-Type", "application/json")];
    let check = HttpCheck {
        address,
        method: "POST".to_owned(),
        path: if place.path.starts_with('/') { place.path.to_owned() } else { format!("/{}", place.path) },
        headers: headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect::<BTreeMap<_, _>>(),
        body: Some(document.to_owned()),
        status: (200..300).collect(),
        contains: None,
    };
    match Request::new(&check)?.ask_through(connection, stage).await {
        Ok(_) => Ok(()),
        Err(Fault::Answer(answer)) => Err(answer),
        Err(Fault::Io(error)) => Err(format!("{error} {stage}")),
    }
}

/// Kills a command's process group, unless it has ended.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let group = self.0.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn run(command: &[String], directory: &str, document: &str) -> Result<(), String> {
    let (program, arguments) = command.split_first().ok_or("the command is empty")?;
    let mut child = Command::new(program);
    child
        .args(arguments)
        .current_dir(directory)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    for name in ["PATH", "HOME"] {
        if let Some(value) = std::env::var_os(name) {
            child.env(name, value);
        }
    }
    #[expect(unsafe_code, reason = "a server that is killed cannot end its hooks, and the next one asks again")]
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
    unsafe {
        child.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let mut child = child.spawn().map_err(|error| format!("{program}: {error}"))?;
    let mut group = Group(child.id());
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // One that does not read its input may still say yes.
            let _ = stdin.write_all(document.as_bytes()).await;
        }
    };
    let mut said = Vec::new();
    let read = async {
        if let Some(stderr) = stderr {
            last_of(stderr, &mut said).await;
        }
    };
    let status = {
        let pipes = async { tokio::join!(write, read) };
        tokio::pin!(pipes);
        // Both arms are cancel-safe: what was read stays in `said`.
        tokio::select! {
            _ = &mut pipes => child.wait().await,
            status = child.wait() => {
                // The answer is the exit code. What it left behind may hold the pipes open for as long as it likes.
                let _ = tokio::time::timeout(LAST_WORDS, pipes).await;
                status
            }
        }
    };
    let status = status.map_err(|error| error.to_string())?;
    // The leader was reaped: its number may be somebody else's soon. What it left behind is its own affair.
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).map(clean);
    Err(last.map_or_else(|| words(status), |last| format!("{}: {last}", words(status))))
}

/// Reads to the end, however long that is, because who writes into a pipe that nobody reads is killed; keeps the last
/// bytes of it in `said`.
async fn last_of(mut source: impl AsyncRead + Unpin, said: &mut Vec<u8>) {
    // Cancel-safe: what was read is in `said`.
    while source.read_buf(said).await.is_ok_and(|read| read > 0) {
        if said.len() > 2 * STDERR {
            said.drain(..said.len() - STDERR);
        }
    }
}

fn words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn command(script: &str, timeout: u64) -> Result<(), String> {
        let call = HookCall::Command(["sh", "-c", script].map(str::to_owned).to_vec());
        ask(&call, "/", r#"{"service":"api"}"#, Duration::from_millis(timeout)).await
    }

    #[tokio::test]
    async fn a_command_says_yes_by_exit_code_0() {
        assert_eq!(command("grep -q api", 5000).await, Ok(()));
        assert_eq!(command("exec true <&-", 5000).await, Ok(()));
        let refused = command("echo first >&2; echo 'too many errors' >&2; exit 3", 5000).await;
        assert_eq!(refused, Err("exit code 3: too many errors".to_owned()));
        assert_eq!(command("kill -9 $$", 5000).await, Err("signal 9".to_owned()));
        assert!(command("sleep 60", 50).await.unwrap_err().contains("no answer within 50ms"));
        // What it leaves behind holds its pipes open, and is nobody's answer.
        assert_eq!(command("sleep 6 & exit 0", 3_000).await, Ok(()));
        assert_eq!(command("sleep 6 & echo late >&2; exit 4", 3_000).await, Err("exit code 4: late".to_owned()));
        // However much it says, it ends by itself, and its last words are what is told.
        let long = "head -c 3000000 /dev/zero | tr '\\0' x >&2 && echo >&2 && echo 'the end' >&2 && exit";
        assert_eq!(command(&format!("{long} 0"), 9_000).await, Ok(()));
        assert_eq!(command(&format!("{long} 5"), 9_000).await, Err("exit code 5: the end".to_owned()));
        let missing = HookCall::Command(vec!["/no/such/program".to_owned()]);
        assert!(ask(&missing, "/", "", Duration::from_secs(1)).await.unwrap_err().contains("/no/such/program"));
    }

    #[test]
    fn a_command_ends_with_the_server_that_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let said = folder.path().join("pid");
        let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 60", said.display());
        let wait = |what: &str, holds: &dyn Fn() -> bool| {
            let end = std::time::Instant::now() + Duration::from_secs(20);
            while !holds() {
                assert!(std::time::Instant::now() < end, "in vain: {what}");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        // Its end is that of a process as the kernel sees it: nothing is dropped, nobody cleans up.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let mut asked = Box::pin(command(&script, 60_000));
                runtime.block_on(async {
                    let begun = async {
                        while !said.exists() {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    };
                    tokio::select! {
                        _ = &mut asked => unreachable!("it sleeps"),
                        () = begun => {}
                    }
                });
                std::mem::forget(asked);
                std::mem::forget(runtime);
            });
        });
        let pid = std::fs::read_to_string(&said).unwrap();
        // A zombie is all that is left of it: whoever began it is this process, and does not ask.
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        wait("its end", &|| state().is_empty() || state().contains(") Z "));
    }

    async fn webhook(answer: &'static str) -> (Result<(), String>, String) {
        let (address, server) = crate::once::server(answer).await;
        let url = format!("http://{address}/gate?x=1");
        let call = HookCall::Webhook { url };
        tokio::join!(ask(&call, "/", "{}", Duration::from_secs(5)), server)
    }

    #[tokio::test]
    async fn a_webhook_says_yes_by_2xx() {
        let (answer, seen) = webhook("HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(answer, Ok(()));
        assert!(seen.starts_with("POST /gate?x=1 HTTP/1.1\r\n") && seen.contains("application/json"), "{seen}");
        let (answer, _) = webhook("HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(answer, Err("HTTP 302".to_owned()));
        let (answer, _) = webhook("garbage\r\n\r\n").await;
        assert!(answer.is_err());
        let (address, server) = crate::once::server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let call = HookCall::Webhook { url: format!("http://{address}?x=1") };
        let (answer, seen) = tokio::join!(ask(&call, "/", "{}", Duration::from_secs(5)), server);
        assert_eq!(answer, Ok(()));
        assert!(seen.starts_with("POST /?x=1 HTTP/1.1\r\n"), "{seen}");
        let nobody = HookCall::Webhook { url: "http://127.0.0.1:1/".to_owned() };
        assert!(ask(&nobody, "/", "{}", Duration::from_secs(5)).await.is_err());
    }

    /// Whoever waits in vain is told for what: TLS with a server that does not speak it looks like a slow answer otherwise.
    #[tokio::test]
    async fn silence_has_a_stage() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap();
        for (scheme, stage) in [("http", "while waiting for the answer"), ("https", "while agreeing on TLS")] {
            let call = HookCall::Webhook { url: format!("{scheme}://{address}/") };
            let said = ask(&call, "/", "{}", Duration::from_millis(300)).await;
            assert_eq!(said, Err(format!("no answer within 300ms {stage}")));
        }
    }
}
