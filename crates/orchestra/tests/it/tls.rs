//! TLS as users meet it: one word in the stack file, one authority to trust, and files that change.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::Signal;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};

use crate::{
    environment::{PATIENCE, TestEnvironment, find},
    flags::official,
    processes::{self, Role},
};

fn stack(tls: &str) -> String {
    format!(
        r#"
version: 1
name: tls
services:
  api:
    command: [APP]
    ports: {{web: {{port: auto, tls: {tls}}}}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    rollout: {{drain: {{requests: 2s, streams: 2s}}}}
  caller:
    command: [APP]
    ports: {{plain: auto}}
    env: {{API: "{{{{ services.api.url }}}}"}}
    depends_on: {{api: ready}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
"#
    )
}

/// Trusts the certificates of this text, and nobody else.
fn trusting(pem: &str) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

/// Status of `GET /version` over TLS, and the certificate that was shown.
fn get(config: &Arc<ClientConfig>, address: SocketAddr, name: &str) -> Result<(u16, Vec<u8>), String> {
    let text = |error: std::io::Error| error.to_string();
    let tcp = TcpStream::connect(address).map_err(|error| format!("connect: {error}"))?;
    tcp.set_read_timeout(Some(PATIENCE)).map_err(text)?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connection = ClientConnection::new(Arc::clone(config), name).map_err(|error| error.to_string())?;
    let mut stream = StreamOwned::new(connection, tcp);
    stream.write_all(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").map_err(text)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(text)?;
    let head = String::from_utf8_lossy(&answer);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or("no answer")?;
    Ok((status, stream.conn.peer_certificates().unwrap()[0].to_vec()))
}

/// What an instance finds in its environment.
fn variable(pid: u64, name: &str) -> String {
    let environ = String::from_utf8(fs::read(format!("/proc/{pid}/environ")).unwrap()).unwrap();
    let prefix = format!("{name}=");
    environ.split('\0').find_map(|line| line.strip_prefix(&prefix)).unwrap_or_else(|| panic!("no {name}")).to_owned()
}

/// Where a service is that is spoken to over TLS.
fn address(env: &TestEnvironment, service: &str) -> SocketAddr {
    let status = env.status();
    let url = find(&status, service)["addresses"][0]["url"].as_str().unwrap_or_default().to_owned();
    url.strip_prefix("https://").unwrap_or_else(|| panic!("`{url}` of {status:#}")).parse().unwrap()
}

fn soon<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_client_that_trusts_the_authority_is_served_whoever_dies() {
    let env = TestEnvironment::new();
    env.write(&stack("{names: [app.localhost]}"));
    env.ok(&["up"]);
    let pem = env.ok(&["tls", "trust", "--print"]).text();
    let (address, trusting_us) = (address(&env, "api"), trusting(&pem));
    for name in ["localhost", "app.localhost", "127.0.0.1"] {
        assert_eq!(get(&trusting_us, address, name).unwrap().0, 200, "{name}");
    }
    assert!(get(&trusting_us, address, "other.localhost").is_err(), "a name that nobody asked for");
    assert!(get(&trusting(""), address, "localhost").unwrap_err().contains("UnknownIssuer"));

    // Programs of the stack find the address and whom to trust.
    let pid = env.pids()["caller-r1-1"];
    assert_eq!(variable(pid, "API"), format!("https://{address}"));
    let file = variable(pid, "ORCHESTRA_CA_FILE");
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), pem.trim());
    assert!(fs::metadata(env.home().join("tls/authority/key.pem")).unwrap().len() > 0);

    let status = env.ok(&["tls", "status", "--json"]).json();
    assert_eq!(status["authority"]["path"], json!(file));
    let shown = &status["certificates"][0];
    assert_eq!(json!([shown["service"], shown["development"]]), json!(["api", true]), "{status:#}");
    assert_eq!(shown["names"], json!(["localhost", "app.localhost", "127.0.0.1", "::1"]));
    let text = env.ok(&["tls", "status"]).text();
    assert!(
        text.contains("tls/dev/api:web  development") && text.contains("Orchestra development authority"),
        "{text}"
    );

    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    assert_eq!(get(&trusting_us, address, "localhost").unwrap().0, 200, "without a server");
    // The next command starts another one, which keeps a proxy alive.
    assert_eq!(env.ok(&["tls", "trust", "--print"]).text(), pem, "the authority is the same");
    processes::kill(env.one(Role::Proxy).pid, Signal::KILL);
    assert_eq!(get(&trusting_us, address, "localhost").unwrap().0, 200, "a connection waits for the next proxy");
    let known = soon("the next server and the next proxy know each other", || {
        let status = env.ok(&["tls", "status", "--json"]).json();
        status["certificates"][0]["expires_at"].as_u64()
    });
    assert!(known > 0);
    env.finish();
}

/// `BoringSSL` knows no constraints on addresses, which the authority has, and refuses what is issued for an address.
#[test]
fn grpc_for_python_is_served_by_name() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/tls"));
    let usable = "(3, 10) <= sys.version_info < (3, 15) and platform.libc_ver()[0] == 'glibc' \
        and platform.machine() in ('x86_64', 'aarch64')";
    let Some(python) = official::python_with("grpc-for-python", usable, &folder.join("requirements.txt")) else {
        return;
    };
    let script = |name: &str| folder.join(name).display().to_string();
    let env = TestEnvironment::new();
    env.write(&format!(
        r#"
version: 1
name: tls
services:
  api:
    command: ["{}", "{}"]
    ports: {{grpc: {{port: auto, tls: {{names: [app.localhost]}}}}}}
    health: {{ready: {{tcp: true, every: 200ms, every_starting: 20ms}}}}
"#,
        python.display(),
        script("grpc_server.py")
    ));
    env.ok(&["up"]);
    let status = env.status();
    let url = find(&status, "api")["addresses"][0]["url"].as_str().unwrap_or_default();
    let address: SocketAddr = url.strip_prefix("grpcs://").unwrap_or_else(|| panic!("{status:#}")).parse().unwrap();
    let file = env.path("ca.pem");
    fs::write(&file, env.ok(&["tls", "trust", "--print"]).text()).unwrap();
    let called = Command::new(&python)
        .arg(script("grpc_client.py"))
        .arg(&file)
        .args([format!("localhost:{}", address.port()), format!("{address}=app.localhost")])
        .arg(format!("{address}=other.localhost"))
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&called.stdout), String::from_utf8_lossy(&called.stderr));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.get(..2), Some(&["heard", "heard"][..]), "{said}\n{errors}");
    assert!(lines[2].contains("Hostname Verification Check failed"), "the names are looked at: {said}");
    env.finish();
}

#[test]
fn what_is_issued_is_issued_anew_when_it_must_be() {
    let env = TestEnvironment::new();
    env.write(&stack("development"));
    env.ok(&["up"]);
    let config = trusting(&env.ok(&["tls", "trust", "--print"]).text());
    let address = address(&env, "api");
    let first = get(&config, address, "localhost").unwrap().1;
    let file = env.home().join("tls/issued/tls.dev/api.web.names.pem");
    let issued = fs::read_to_string(&file).unwrap();

    // As after half of it was lost: the next table finds it and puts another one in its place.
    fs::write(&file, &issued[..issued.len() / 2]).unwrap();
    env.ok(&["scale", "api=2"]);
    let second = soon("another certificate", || {
        let (status, shown) = get(&config, address, "localhost").unwrap();
        assert_eq!(status, 200);
        (shown != first).then_some(shown)
    });

    // Another name is another certificate, and the instances stay.
    let pids = env.pids();
    env.write(&stack("{names: [new.localhost]}").replace("ports: {web", "replicas: 2\n    ports: {web"));
    env.ok(&["up"]);
    let third = soon("a certificate for the new name", || get(&config, address, "new.localhost").ok());
    assert!(third.0 == 200 && third.1 != second);
    assert_eq!(env.pids(), pids, "no instance was replaced for a certificate");

    env.ok(&["down"]);
    assert!(!file.exists(), "what nobody uses is removed");
    env.finish();
}

#[test]
fn files_are_read_again_and_what_is_wrong_with_them_is_said() {
    let env = TestEnvironment::new();
    let (issuer, root) = {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().pem();
        (Issuer::new(params, key), root)
    };
    let issue = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["localhost".to_owned(), name.to_owned()]).unwrap();
        fs::write(env.path("cert.pem"), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(env.path("key.pem"), key.serialize_pem()).unwrap();
    };
    // First without any: everything else works, and somebody says so.
    env.write(&stack("{certificate: ./cert.pem, key: ./key.pem}"));
    env.ok(&["up"]);
    let (address, config) = (address(&env, "api"), trusting(&root));
    assert!(get(&config, address, "localhost").is_err());
    let problem = |what: &str, fits: &dyn Fn(&Value) -> bool| {
        soon(what, || {
            let status = env.ok(&["tls", "status", "--json"]).json();
            fits(&status["certificates"][0]).then(|| status["certificates"][0].clone())
        })
    };
    let told = problem("no file", &|shown| shown["problem"].is_string());
    assert!(told["problem"].as_str().unwrap().contains("cert.pem: No such file"), "{told:#}");
    let doctor = env.run(&["doctor", "--json"]).expect(1).text();
    assert!(doctor.contains("certificate tls/dev/api:web"), "{doctor}");

    issue("one.test");
    soon("the files are there", || get(&config, address, "one.test").ok());
    issue("two.test");
    soon("the files are new", || get(&config, address, "two.test").ok());
    fs::write(env.path("key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let told = problem("a key of another", &|shown| shown["problem"].is_string());
    assert!(told["problem"].as_str().unwrap().contains("does not belong"), "{told:#}");
    assert_eq!(get(&config, address, "two.test").unwrap().0, 200, "the pair before is shown");
    let events = env.ok(&["events", "--json"]).json_lines();
    let of = |kind: &str| events.iter().filter(|event| event["kind"] == kind).count();
    assert!(of("certificate_problem") >= 2 && of("certificate_served") >= 1, "{events:#?}");
    env.finish();
}

#[test]
fn commands_that_make_the_authority_at_once_get_the_same_one() {
    let env = TestEnvironment::new();
    let asked: Vec<_> = (0..4).map(|_| env.spawn(&["tls", "trust", "--print"])).collect();
    let printed: Vec<String> = asked.into_iter().map(|command| command.wait().expect(0).text()).collect();
    assert!(printed[0].starts_with("-----BEGIN CERTIFICATE-----"), "{}", printed[0]);
    assert!(printed.iter().all(|pem| *pem == printed[0]), "{printed:#?}");
    env.finish();
}
