//! The official OpenFeature client of Python against the protocol on a real socket, and a subscriber to changes.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use orchestra_flags::ofrep::{KEEP_ALIVE, MAX_BODY, Request, Served, Settings, answer, change_event};
use orchestra_model::flag::{FlagSet, Override, OverrideBy, OverrideServe};
use serde_json::{Value, json};

use crate::{all, flags, served};

mod official;

use official::{Client, python};

/// How long an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The smallest host: a thread per connection. It shows what a host must do, and nothing else.
struct Host {
    address: SocketAddr,
    state: Arc<(Mutex<Arc<Served>>, Condvar)>,
}

impl Host {
    fn start(served: Served) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new((Mutex::new(Arc::new(served)), Condvar::new()));
        let shared = Arc::clone(&state);
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || while serve(&stream, &state).is_some() {});
            }
        });
        Self { address, state }
    }

    fn change(&self, served: Served) {
        *self.state.0.lock().unwrap() = Arc::new(served);
        self.state.1.notify_all();
    }
}

/// One request and its response; `None` ends the connection.
fn serve(stream: &TcpStream, (current, changed): &(Mutex<Arc<Served>>, Condvar)) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?, first.next()?);
    let headers: Vec<(String, &str)> =
        lines.filter_map(|line| line.split_once(':')).map(|(n, v)| (n.to_ascii_lowercase(), v.trim())).collect();
    let header = |name: &str| -> Vec<&str> {
        headers.iter().filter(|(found, _)| found == name).map(|(_, value)| *value).collect()
    };
    let length = header("content-length").first().map_or(0, |length| length.parse::<usize>().unwrap());
    let mut body = vec![0; length.min(MAX_BODY + 1)];
    reader.read_exact(&mut body).ok()?;

    let mut served = Arc::clone(&current.lock().unwrap());
    let response = answer(&served, &Request { method, path, header: &header, body: &body });
    let mut bytes = format!("HTTP/1.1 {} x\r\n", response.status).into_bytes();
    for (name, value) in &response.headers {
        bytes.extend(format!("{name}: {value}\r\n").bytes());
    }
    if !response.follow {
        bytes.extend(format!("content-length: {}\r\n\r\n", response.body.len()).bytes());
        bytes.extend(response.body);
        return (&*stream).write_all(&bytes).ok();
    }
    bytes.extend(b"connection: close\r\n\r\n");
    bytes.extend(response.body);
    (&*stream).write_all(&bytes).ok()?;
    loop {
        let mut now = current.lock().unwrap();
        while Arc::ptr_eq(&now, &served) {
            let (next, waited) = changed.wait_timeout(now, PATIENCE).unwrap();
            now = next;
            if waited.timed_out() {
                (&*stream).write_all(KEEP_ALIVE).ok()?;
            }
        }
        served = Arc::clone(&now);
        drop(now);
        (&*stream).write_all(&change_event(&served)).ok()?;
    }
}

#[test]
fn the_official_client_understands_us() {
    let Some(python) = python() else { return };
    let settings = || Settings { keys: vec![Settings::digest_of_key("secret")], ..Settings::default() };
    let host = Host::start(Served { settings: settings(), ..served(&flags()) });
    let mut client = Client::start(&python, &format!("http://{}", host.address));
    let staff = json!({"email": "a@acme.example"});
    for (kind, flag, default, key, attributes, expected) in [
        ("boolean", "editor", json!(false), "u", json!({}), json!([true, "on", "STATIC"])),
        ("boolean", "old-search", json!(true), "u", json!({}), json!([false, "off", "DISABLED"])),
        ("string", "banner", json!("mine"), "u", staff, json!(["Happy holidays", "festive", "TARGETING_MATCH"])),
        ("string", "banner", json!("mine"), "u", json!({"plan": "free"}), json!(["Hello", "plain", "UNKNOWN"])),
        ("string", "banner", json!("mine"), "u", json!({"plan": "trial"}), json!(["mine", "code", "TARGETING_MATCH"])),
        ("integer", "replies", json!(0), "user-4", json!({}), json!([10, "many", "SPLIT"])),
        ("float", "tenants", json!(0.5), "u", json!({}), json!([1.0, "low", "UNKNOWN"])),
        (
            "object",
            "limits",
            json!({}),
            "u",
            json!({}),
            json!([{"tokens": 100, "tools": ["search"]}, "small", "STATIC"]),
        ),
    ] {
        let question = json!({"kind": kind, "flag": flag, "default": default, "key": key, "attributes": attributes});
        let answer = client.ask(&question);
        assert_eq!(json!([answer["value"], answer["variant"], answer["reason"]]), expected, "{question}: {answer}");
        assert_eq!(answer["error"], Value::Null, "{question}");
    }
    for (kind, flag, default, error) in [
        ("boolean", "no-such-flag", json!(true), "FLAG_NOT_FOUND"),
        ("boolean", "banner", json!(true), "TYPE_MISMATCH"),
        ("integer", "replies", json!(7), "TARGETING_KEY_MISSING"),
    ] {
        let answer = client.ask(&json!({"kind": kind, "flag": flag, "default": default}));
        assert_eq!((&answer["value"], answer["error"].as_str()), (&default, Some(error)), "{answer}");
    }
    let tenant = json!({"kind": "float", "flag": "tenants", "default": 0.5, "attributes": {"tenant": {"id": 1}}});
    assert_eq!(client.ask(&tenant)["error"], "INVALID_CONTEXT");

    // A verdict turns a flag off: the next answer says so, without any restart.
    let mut set = flags();
    let by = OverrideBy::Verdict { release: orchestra_model::ReleaseNumber(7) };
    let over = Override { serve: OverrideServe::Off, by, reason: "5xx".to_owned(), since: 1 };
    set.overrides.insert("editor".parse().unwrap(), over);
    host.change(Served { settings: settings(), ..served(&set) });
    let answer = client.ask(&json!({"kind": "boolean", "flag": "editor", "default": true, "key": "u"}));
    assert_eq!(json!([answer["value"], answer["reason"]]), json!([false, "DISABLED"]));
    assert_eq!(answer["metadata"]["orchestra.override.release"], 7);
}

#[test]
fn a_subscriber_hears_of_changes_and_fetches_them() {
    let host = Host::start(served(&flags()));
    let stream = TcpStream::connect(host.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (&stream).write_all(b"GET /ofrep/v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut event = || {
        let data = lines.by_ref().map(Result::unwrap).find_map(|line| line.strip_prefix("data: ").map(str::to_owned));
        serde_json::from_str::<Value>(&data.unwrap()).unwrap()["etag"].as_str().unwrap().to_owned()
    };
    let first = event();
    let (context, before) = (json!({"targetingKey": "u"}), served(&flags()));
    let etag = all(&before, &context, &[]).header("etag").unwrap().to_owned();

    let mut set: FlagSet = flags();
    set.flags.get_mut("editor").unwrap().enabled = false;
    let after = served(&set);
    host.change(after.clone());
    assert_ne!(event(), first);
    assert_eq!(all(&after, &context, &[("if-none-match", &etag)]).status, 200);
    // Back again: the digest names the content, so the old one counts again.
    host.change(before.clone());
    assert_eq!(event(), first);
    assert_eq!(all(&before, &context, &[("if-none-match", &etag)]).status, 304);
}
