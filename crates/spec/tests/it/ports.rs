//! What is said of the requests at a published port.

use orchestra_model::{
    desired::Port,
    quantity::Timespan,
    traffic::{PortPolicy, RequestKey, Tls},
};

use crate::loaded;

fn port(keys: &str) -> Port {
    let services = format!(
        "version: 1\nname: demo\nservices:\n  a:\n    command: [./a]\n    ports: {{http: {keys}}}\n  b: {{command: [./b], ports: {{other: auto}}}}\n"
    );
    let loaded = loaded(&services);
    loaded.desired.service(&"a".parse().unwrap()).unwrap().ports[&"http".parse::<orchestra_model::Name>().unwrap()]
        .clone()
}

#[test]
fn a_port_that_says_nothing_has_the_defaults_of_the_data_plane() {
    for keys in ["8080", "auto", "{}", "{retry: {}, outlier: {}, limits: {}, timeouts: {}, breaker: {}, pin: false}"] {
        assert_eq!(port(keys).policy, PortPolicy::default(), "{keys}");
    }
}

#[test]
fn each_key_arrives() {
    let policy = port(
        "{tls: development, sticky: {header: X-Session}, pin: true, limits: {body: 1k, requests_per_second: 3}, buffer: 2k, \
         timeouts: {first_byte: 1s, response: 2s, idle: 3s}, retry: {attempts: 5, budget: 30%}, fallback: b, \
         outlier: {failures: 7, eject_for: 9s, max: 10%, panic: 0%}, breaker: {per_instance: 4, total: 6}, \
         trusted_proxies: [10.0.0.0/8, \"2001:db8::1\"]}",
    )
    .policy;
    assert_eq!(policy.tls, Some(Tls::Development { names: [].into() }));
    assert_eq!(policy.sticky, Some(RequestKey::Header("x-session".to_owned())));
    assert!(policy.pin);
    assert_eq!(policy.limits.body.map(orchestra_model::quantity::ByteSize::as_bytes), Some(1000));
    assert_eq!(policy.limits.requests_per_second, Some(3));
    assert_eq!(policy.buffer.map(orchestra_model::quantity::ByteSize::as_bytes), Some(2000));
    let spans = [policy.timeouts.first_byte, policy.timeouts.response, policy.timeouts.idle];
    assert_eq!(spans, [1, 2, 3].map(Timespan::seconds));
    assert_eq!((policy.retry.attempts, policy.retry.budget_percent), (5, 30));
    assert_eq!((policy.outlier.failures, policy.outlier.max_percent, policy.outlier.panic_percent), (7, 10, 0));
    assert_eq!(policy.outlier.eject_for, Timespan::seconds(9));
    assert_eq!((policy.breaker.per_instance, policy.breaker.total), (4, 6));
    let fallback = policy.fallback.unwrap();
    assert_eq!((fallback.service.as_str(), fallback.port.as_str()), ("b", "other"));
    assert_eq!(policy.trusted_proxies, ["10.0.0.0/8", "2001:db8::1"].map(|network| network.parse().unwrap()));
}

#[test]
fn what_is_off_is_off() {
    let policy = port("{retry: none, outlier: none, timeouts: {idle: 0}}").policy;
    assert_eq!((policy.retry.attempts, policy.outlier.failures), (0, 0));
    assert_eq!(policy.timeouts.idle, Timespan::default());
}

#[test]
fn certificates_are_found_beside_the_stack_file_and_names_are_lower_case() {
    let Some(Tls::Files { certificate, key, .. }) = port("{tls: {certificate: tls/a.crt, key: /etc/a.key}}").policy.tls
    else {
        panic!("files")
    };
    assert!(certificate.starts_with('/') && certificate.ends_with("/tls/a.crt"), "{certificate}");
    assert_eq!(key, "/etc/a.key");
    let tls = port("{tls: {names: [App.Localhost]}}").policy.tls;
    assert_eq!(tls, Some(Tls::Development { names: ["app.localhost".to_owned()].into() }));
}

#[test]
fn urls_say_that_tls_is_spoken() {
    let text = "version: 1\nname: demo\nservices:\n  a: {command: [./a], ports: {http: {port: 8443, tls: development}}}\n  \
                b: {command: [./b, \"{{ services.a.url }}\"]}\n";
    let loaded = loaded(text);
    let b = loaded.desired.service(&"b".parse().unwrap()).unwrap();
    assert!(format!("{:?}", b.program.command).contains("https://127.0.0.1:8443"), "{:?}", b.program.command);
}
