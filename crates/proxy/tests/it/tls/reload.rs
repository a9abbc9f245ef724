//! Certificates that change, that are no good, and that come late.

use super::*;

/// Waits until connections are made with a certificate for this name.
async fn shows(address: SocketAddr, certificates: &Certificates, name: &str) {
    soon("the certificate is shown", async {
        loop {
            if let Ok(tls) = connect_as(address, &certificates.client(&[]), name).await {
                assert!(shown(&tls).contains(&name.to_owned()));
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_new_pair_is_shown_to_new_connections_and_old_ones_live_on() {
    let certificates = Certificates::new();
    certificates.write(&["localhost", "one.test"]);
    let mut world = World::new().await;
    let (instance, sender) = Instance::busy().await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let config = certificates.client(&["http/1.1"]);
    let mut streaming = client(address, &config).await.unwrap();
    let response = streaming.send(Request::get("/").body(empty()).unwrap()).await.unwrap();
    let mut idle = client(address, &config).await.unwrap();
    assert_eq!(idle.get("/").await.unwrap().text(), "short");
    let mut handshaken = connect(address, &config).await.unwrap();
    let first = report(&mut world, |report| report.not_after.is_some()).await;

    certificates.write(&["localhost", "two.test"]);
    shows(address, &certificates, "two.test").await;
    let second = report(&mut world, |report| report.fingerprint != first.fingerprint).await;
    assert_eq!((second.problem, second.names), (None, vec!["localhost".to_owned(), "two.test".to_owned()]));
    // What resumes would otherwise be a session with the certificate before.
    let again = connect(address, &config).await.unwrap();
    assert!(shown(&again).contains(&"two.test".to_owned()));
    assert_ne!(again.get_ref().1.handshake_kind(), Some(HandshakeKind::Resumed));

    assert_eq!(idle.get("/").await.unwrap().text(), "short");
    handshaken.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    soon("an answer", handshaken.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    sender.send(Frame::data("still here".into())).await.unwrap();
    drop(sender);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "still here");

    // A pair that is moved into its place, as certbot and Kubernetes do: other files behind the same names.
    let (certificate, key) = certificates.issue(&["localhost", "three.test"]);
    for (name, text) in [("cert", certificate), ("key", key)] {
        std::fs::write(certificates.path("draft"), text).unwrap();
        std::fs::rename(certificates.path("draft"), certificates.path(&format!("{name}.pem"))).unwrap();
    }
    shows(address, &certificates, "three.test").await;
    assert_eq!(sample(&world, "orchestra_proxy_tls_certificate_problem", "").await, 0.0);
}

#[tokio::test]
async fn clients_that_ask_for_a_name_and_those_that_ask_for_none_are_shown_one_each() {
    let certificates = Certificates::new();
    let path = |name: &str| certificates.path(name).display().to_string();
    let issue = |file: &str, names: &[&str]| {
        let (certificate, key) = certificates.issue(names);
        std::fs::write(certificates.path(file), format!("{certificate}{key}")).unwrap();
    };
    issue("named.pem", &["localhost"]);
    issue("addressed.pem", &["localhost", "127.0.0.1"]);
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let pair = path("addressed.pem");
    let tls = Tls::Files { certificate: pair.clone(), key: pair, named: Some(path("named.pem")) };
    let address = world.serve(secured(plain, tls)).await;
    let config = certificates.client(&[]);
    let names = async |name: &str| shown(&connect_as(address, &config, name).await.unwrap());
    assert_eq!(names("localhost").await, ["localhost"]);
    assert_eq!(names("127.0.0.1").await, ["localhost", "127.0.0.1"]);
    // Again, now with what both sides remember of the first time.
    assert_eq!(names("localhost").await, ["localhost"]);
    let first = report(&mut world, |report| report.not_after.is_some()).await;
    assert_eq!(first.names, ["localhost", "127.0.0.1"], "what is reported is the one with everything");

    // Each is taken over when it changes, and a damaged one leaves both as they are.
    issue("named.pem", &["localhost", "new.test"]);
    shows(address, &certificates, "new.test").await;
    std::fs::write(certificates.path("named.pem"), "").unwrap();
    let told = report(&mut world, |report| report.problem.is_some()).await;
    assert!(told.problem.unwrap().contains("named.pem: there is no certificate"));
    assert_eq!(names("new.test").await, ["localhost", "new.test"]);
    assert_eq!(names("127.0.0.1").await, ["localhost", "127.0.0.1"]);
}

#[tokio::test]
async fn a_pair_that_is_no_good_replaces_none_that_is() {
    let certificates = Certificates::new();
    certificates.write(&["localhost", "good.test"]);
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    shows(address, &certificates, "good.test").await;
    let (certificate, key) = certificates.issue(&["localhost", "next.test"]);
    let (cert_path, key_path) = (certificates.path("cert.pem"), certificates.path("key.pem"));
    let bad: [(&str, &dyn Fn()); 5] = [
        ("the key in", &|| std::fs::write(&cert_path, &certificate).unwrap()),
        ("damaged", &|| std::fs::write(&cert_path, &certificate[..certificate.len() / 2]).unwrap()),
        ("there is no certificate", &|| std::fs::write(&cert_path, "").unwrap()),
        ("cannot read", &|| std::fs::remove_file(&cert_path).unwrap()),
        ("is no file", &|| std::fs::create_dir(&cert_path).unwrap()),
    ];
    for (says, spoil) in bad {
        spoil();
        let told = report(&mut world, |report| report.problem.as_ref().is_some_and(|p| p.contains(says))).await;
        assert!(told.names.contains(&"good.test".to_owned()), "{told:?}");
        assert_eq!(sample(&world, "orchestra_proxy_tls_certificate_problem", "").await, 1.0);
        let tls = connect(address, &certificates.client(&[])).await.unwrap();
        assert!(shown(&tls).contains(&"good.test".to_owned()), "after {says}");
    }
    std::fs::remove_dir(&cert_path).unwrap();
    std::fs::write(&key_path, key).unwrap();
    std::fs::write(&cert_path, certificate).unwrap();
    shows(address, &certificates, "next.test").await;
    report(&mut world, |report| report.problem.is_none() && report.names.contains(&"next.test".to_owned())).await;
}

#[tokio::test]
async fn a_route_without_a_certificate_keeps_no_other_from_serving_and_comes_when_it_can() {
    let certificates = Certificates::new();
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let web = secured(route("api", Protocol::Http, vec![endpoint(1, instance.address)]), certificates.files());
    let other = route("other", Protocol::Http, vec![endpoint(1, instance.address)]);
    let nobodys = secured(
        route("nobodys", Protocol::Http, vec![endpoint(1, instance.address)]),
        Tls::Development { names: std::collections::BTreeSet::new() },
    );
    let applied = world.apply(vec![web, other, nobodys]).await;
    let at = |name: &str| applied.addresses[&format!("demo/dev/{name}:main")];
    assert_eq!(get(at("other"), "/").await.unwrap().text(), "x");
    for name in ["api", "nobodys"] {
        let refused = connect(at(name), &certificates.client(&[])).await.unwrap_err();
        assert!(refused.contains("InternalError"), "{refused}");
    }
    let told = report(&mut world, |report| report.route.service.as_str() == "api").await;
    assert!(told.problem.unwrap().contains("cert.pem: No such file") && told.not_after.is_none());
    assert_eq!(sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"no_certificate\"").await, 1.0);
    certificates.write(&["localhost"]);
    shows(at("api"), &certificates, "localhost").await;
}

#[tokio::test]
async fn tls_may_come_and_go_without_touching_what_is_open() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let plain = || route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(plain()).await;
    let mut before = Client::h1(address).await.unwrap();
    assert_eq!(before.get("/").await.unwrap().text(), "x");
    assert_eq!(world.serve(secured(plain(), certificates.files())).await, address);
    let mut secure = client(address, &certificates.client(&["h2"])).await.unwrap();
    assert_eq!(secure.get("/").await.unwrap().text(), "x");
    assert_eq!(before.get("/").await.unwrap().text(), "x");
    assert!(raw(address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    // Other files for the same route, and they are no good.
    let nowhere = Tls::Files { certificate: "/nowhere/cert.pem".into(), key: "/nowhere/key.pem".into(), named: None };
    world.serve(secured(plain(), nowhere)).await;
    assert!(connect(address, &certificates.client(&[])).await.is_ok(), "the pair before is kept");
    assert_eq!(world.serve(plain()).await, address);
    assert_eq!(get(address, "/").await.unwrap().text(), "x");
    assert_eq!(secure.get("/").await.unwrap().text(), "x");
}
