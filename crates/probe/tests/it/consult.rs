//! Numbers from elsewhere, asked of servers that answer well, badly, too much or not at all.

use std::{
    io::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use orchestra_model::consult::{Answer, Question, ScrapeTarget};
use orchestra_model::secret::SecretSource;
use orchestra_probe::consult::ask;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

/// A server that answers every request with these bytes and closes; what it was sent is kept.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// `hangs` keeps the connection open after the answer.
    async fn new(answer: impl Into<Vec<u8>>, hangs: bool) -> Self {
        let (answer, listener) = (answer.into(), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = Arc::clone(&seen);
        let serve = async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                // A request of these tests ends with its body, which ends with the timeout, or has none.
                while !request.ends_with(b"\r\n\r\n") && !request.ends_with(b"ms") {
                    let mut part = [0; 4096];
                    match stream.read(&mut part).await {
                        Ok(0) | Err(_) => break,
                        Ok(n) => request.extend_from_slice(&part[..n]),
                    }
                }
                kept.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
                let _ = stream.write_all(&answer).await;
                if hangs {
                    open.push(stream);
                } else {
                    let _ = stream.shutdown().await;
                }
            }
        };
        #[expect(clippy::disallowed_methods, reason = "the server of a test")]
        let task = tokio::spawn(serve);
        Self { address, seen, task }
    }

    async fn with_body(body: &str) -> Self {
        Self::new(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()), false).await
    }
}

async fn scrape(servers: &[&Server], series: &[&str]) -> Vec<Result<Vec<Option<f64>>, String>> {
    let targets = servers.iter().zip(1..).map(|(server, number)| ScrapeTarget {
        instance: format!("api-r1-{number}").parse().unwrap(),
        attempt: 1,
        address: server.address,
    });
    let question = Question::Scrape {
        targets: targets.collect(),
        path: "/metrics?all=1".to_owned(),
        series: series.iter().map(|name| name.parse().unwrap()).collect(),
    };
    let Answer::Scraped(scraped) = ask(question, Duration::from_millis(500)).await else { panic!("not scraped") };
    assert_eq!(scraped.len(), servers.len());
    scraped.into_iter().map(|it| it.values).collect()
}

#[tokio::test]
async fn every_instance_is_asked_and_answers_for_itself() {
    let good = Server::with_body("a_total{x=\"1\"} 3\na_total{x=\"2\"} 4\n").await;
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\na_total 5\r\n0\r\n\r\n";
    let chunked = Server::new(chunked, true).await;
    let missing = Server::new("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", false).await;
    let silent = Server::new("", true).await;
    let early = Server::new("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\na_total 5\n", false).await;
    let began = Instant::now();
    let found = scrape(&[&good, &chunked, &missing, &silent, &early], &["a_total", "a_total{x=\"2\"}", "b"]).await;
    assert!(began.elapsed() < Duration::from_secs(5), "one that is silent holds up nobody for longer than its time");
    assert_eq!(found[0], Ok(vec![Some(7.0), Some(4.0), None]));
    assert_eq!(found[1], Ok(vec![Some(5.0), None, None]));
    assert_eq!(found[2], Err("/metrics?all=1: HTTP 404".to_owned()));
    assert!(found[3].as_ref().unwrap_err().contains("no answer within 500ms"), "{found:?}");
    assert!(found[4].as_ref().unwrap_err().contains("ended early"), "{found:?}");
    let seen = good.seen.lock().unwrap().join("");
    assert!(seen.starts_with("GET /metrics?all=1 HTTP/1.1\r\n") && seen.contains("version=0.0.4"), "{seen}");
}

#[tokio::test]
async fn an_answer_without_end_is_broken_off() {
    let endless = Server::new([b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), b"a 1\n".repeat(3 << 20)].concat(), true).await;
    let found = scrape(&[&endless], &["a"]).await;
    let why = found[0].as_ref().unwrap_err();
    assert!(why.contains("longer than 8192 KiB") || why.contains("no answer"), "{why}");
}

async fn query(server: &Server, path: &str, token: Option<SecretSource>) -> Answer {
    let address = format!("http://{}{path}", server.address);
    let question = Question::Query { address, query: "sum(a{b=\"c\"})".to_owned(), token, ca: None };
    ask(question, Duration::from_millis(500)).await
}

const VALUE: &str = r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"0.5"]}]}}"#;

#[tokio::test]
async fn a_prometheus_server_is_asked_with_its_token() {
    let server = Server::with_body(VALUE).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "s3cret\nanother line").unwrap();
    let token = SecretSource::File(file.path().display().to_string());
    assert_eq!(query(&server, "/prom/", Some(token)).await, Answer::Values(vec![0.5]));
    let seen = server.seen.lock().unwrap().join("");
    assert!(seen.starts_with("POST /prom/api/v1/query HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains("Authorization: Bearer s3cret\r\n"), "{seen}");
    assert!(seen.ends_with("\r\n\r\nquery=sum%28a%7Bb%3D%22c%22%7D%29&timeout=500ms"), "{seen}");
}

#[tokio::test]
async fn what_keeps_a_server_from_being_asked_is_an_error_without_the_token() {
    let server = Server::with_body(VALUE).await;
    for (text, problem) in [("", "is empty"), ("s3cret\u{7}", "no header field")] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let token = SecretSource::File(file.path().display().to_string());
        let Answer::Error(why) = query(&server, "", Some(token)).await else { panic!("{text:?} is taken") };
        assert!(why.contains(problem) && !why.contains("s3cret"), "{why}");
    }
    let gone = SecretSource::File("/no/such/token".to_owned());
    assert!(matches!(query(&server, "", Some(gone)).await, Answer::Error(why) if why.contains("/no/such/token")));
    let unset = SecretSource::Env("ORCHESTRA_TEST_NO_SUCH_VARIABLE".to_owned());
    assert!(matches!(query(&server, "", Some(unset)).await, Answer::Error(why) if why.contains("no variable")));
    assert!(server.seen.lock().unwrap().is_empty(), "nobody was asked");
}

#[tokio::test]
async fn servers_that_do_not_answer_are_errors() {
    for (answer, hangs, problem) in [
        ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", false, "HTTP 503"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", false, "not that of a Prometheus server"),
        ("garbage\r\n\r\n", false, "not an HTTP/1 answer"),
        ("", false, "connection closed"),
        ("", true, "no answer within 500ms"),
    ] {
        let server = Server::new(answer, hangs).await;
        let Answer::Error(why) = query(&server, "", None).await else { panic!("{answer}") };
        assert!(why.contains(problem), "{answer}: {why}");
    }
    let nobody = Server::new("", false).await.address;
    let question =
        Question::Query { address: format!("http://{nobody}"), query: "a".to_owned(), token: None, ca: None };
    assert!(matches!(ask(question, Duration::from_secs(5)).await, Answer::Error(_)));
}

/// A server that answers one request over TLS with a certificate for `localhost`; and the file with its authority.
async fn encrypted(body: &str) -> (SocketAddr, tempfile::NamedTempFile) {
    use tokio_rustls::rustls::{ServerConfig, crypto::aws_lc_rs};
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &rcgen::Issuer::new(authority, &authority_key)).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key.serialize_der().try_into().unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let serve = async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = Vec::new();
            while !request.ends_with(b"ms") && stream.read_buf(&mut request).await.is_ok_and(|read| read > 0) {}
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    };
    #[expect(clippy::disallowed_methods, reason = "the server of a test")]
    drop(tokio::spawn(serve));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(authority_pem.as_bytes()).unwrap();
    (address, file)
}

#[tokio::test]
async fn a_prometheus_server_behind_tls_is_asked_if_its_certificate_is_trusted() {
    let (address, file) = encrypted(VALUE).await;
    let ask_with = async |host: &str, ca: Option<String>| {
        let address = format!("https://{host}:{}", address.port());
        let question = Question::Query { address, query: "sum(a{b=\"c\"})".to_owned(), token: None, ca };
        ask(question, Duration::from_secs(5)).await
    };
    let trusted = Some(file.path().display().to_string());
    assert_eq!(ask_with("localhost", trusted.clone()).await, Answer::Values(vec![0.5]));
    // The certificate is not one for this name.
    let Answer::Error(why) = ask_with("127.0.0.1", trusted).await else { panic!("a wrong name is taken") };
    assert!(why.contains("TLS") && why.contains("not valid for name"), "{why}");
    // The machine's own list does not have it; a file without certificates trusts nobody.
    let Answer::Error(why) = ask_with("localhost", None).await else { panic!("an unknown authority is trusted") };
    assert!(why.contains("UnknownIssuer") || why.contains("no list of trusted certificates"), "{why}");
    let Answer::Error(why) = ask_with("localhost", Some("/dev/null".to_owned())).await else { panic!("/dev/null") };
    assert!(why.contains("/dev/null has no certificate"), "{why}");
    let Answer::Error(why) = ask_with("localhost", Some("/no/such/ca".to_owned())).await else { panic!("gone") };
    assert!(why.contains("/no/such/ca"), "{why}");
}
