//! `orchestra tls`: what is asked, what is run, and what is said to whom.

use orchestra_api::scripted::Exchange;
use orchestra_cli::Exit;
use serde_json::{Value, json};

use crate::environment::TestEnvironment;

const PEM: &str = "-----BEGIN CERTIFICATE-----\nAAAA\nBBBB\n-----END CERTIFICATE-----\n";

fn tls() -> Value {
    json!({
        "authority": {
            "name": "Orchestra development authority 6f1d0a9c",
            "fingerprint": "6f1d0a9c55e2aa0000000000000000000000000000000000000000000000beef",
            "expires_at": 2_110_592_980_123_u64,
            "path": "/home/me/.local/state/orchestra/tls/authority/certificate.pem",
            "certificate": PEM
        },
        "certificates": [
            {"environment": "shop/dev", "service": "api", "port": "web", "development": true,
             "names": ["localhost", "app.localhost", "127.0.0.1", "::1"], "fingerprint": "aa", "expires_at": 1_803_008_980_123_u64},
            {"environment": "shop/dev", "service": "old", "port": "web", "development": false, "file": "/etc/tls/old.pem",
             "names": ["old.example"], "fingerprint": "bb", "expires_at": 1_795_832_980_123_u64},
            {"environment": "shop/dev", "service": "pay", "port": "web", "development": false, "file": "/etc/tls/pay.pem",
             "names": [], "problem": "cannot read /etc/tls/pay.pem: No such file or directory (os error 2)"}
        ]
    })
}

fn environment() -> TestEnvironment {
    let test = TestEnvironment::new();
    test.server(vec![Exchange::json("GET /v1/tls", &tls())]);
    test
}

#[tokio::test]
async fn status_shows_the_authority_and_every_certificate() {
    let mut test = environment();
    test.system.bundle("-----BEGIN CERTIFICATE-----\nAAAABBBB\n-----END CERTIFICATE-----\n");
    let outcome = test.run("tls status").await;
    insta::assert_snapshot!(outcome.page());
    let mut test = environment();
    let outcome = test.run("tls status --json").await;
    assert_eq!(outcome.json()["trusted"], Value::Null, "there is no bundle to look into");
    assert_eq!(outcome.json()["certificates"], tls()["certificates"]);
    test.finish();
}

#[tokio::test]
async fn print_prints_the_certificate_and_nothing_else() {
    let mut test = environment();
    let outcome = test.run("tls trust --print").await;
    assert_eq!((outcome.exit, outcome.stdout.as_str(), outcome.stderr.as_str()), (Exit::Success, PEM, ""));
    assert_eq!(test.system.ran(), Vec::<String>::new());
    test.finish();
}

#[tokio::test]
async fn root_changes_the_system_and_everybody_else_is_told_how() {
    let mut test = environment();
    test.system.debian();
    let outcome = test.run("tls trust").await;
    let root = test.system.root.path().display().to_string();
    insta::assert_snapshot!(outcome.page().replace(&root, ""));
    assert_eq!(test.system.ran(), Vec::<String>::new());

    for (line, says, commands) in [
        (
            "tls trust",
            "this machine trusts the Orchestra development authority 6f1d0a9c\n",
            [
                "install -m 0644 /home/me/.local/state/orchestra/tls/authority/certificate.pem \
                 /usr/local/share/ca-certificates/orchestra-6f1d0a9c55e2.crt",
                "update-ca-certificates",
            ],
        ),
        (
            "tls untrust",
            "this machine does not trust the Orchestra development authority 6f1d0a9c\n",
            ["rm -f /usr/local/share/ca-certificates/orchestra-6f1d0a9c55e2.crt", "update-ca-certificates --fresh"],
        ),
    ] {
        let mut test = environment();
        test.system.debian();
        test.system.become_root();
        let outcome = test.run(line).await;
        assert_eq!((outcome.exit, outcome.stdout.as_str()), (Exit::Success, says), "{}", outcome.stderr);
        let root = test.system.root.path().display().to_string();
        let ran: Vec<String> = test.system.ran().iter().map(|command| command.replace(&root, "")).collect();
        assert_eq!(ran, commands);
        test.finish();
    }
}

#[tokio::test]
async fn what_is_so_already_is_not_done_again_and_what_fails_is_said() {
    let mut test = environment();
    test.system.debian();
    test.system.bundle(PEM);
    let outcome = test.run("tls trust --json").await;
    assert_eq!((outcome.exit, &outcome.json()["trusted"]), (Exit::Success, &json!(true)));
    assert_eq!(test.system.ran(), Vec::<String>::new());

    let mut test = environment();
    test.system.debian();
    test.system.become_root();
    test.system.fail("the disk is full");
    let outcome = test.run("tls trust").await;
    assert_eq!(outcome.exit, Exit::Failed);
    assert!(outcome.stderr.contains("ORC0603") && outcome.stderr.contains("the disk is full"), "{}", outcome.stderr);

    // A program that says that it did, and did not.
    let mut test = environment();
    test.system.debian();
    test.system.become_root();
    test.system.bundle("");
    let outcome = test.run("tls trust").await;
    assert!(outcome.exit == Exit::Failed && outcome.stderr.contains("as it was before"), "{}", outcome.stderr);

    let mut test = environment();
    let outcome = test.run("tls trust").await;
    assert!(outcome.exit == Exit::Failed && outcome.stderr.contains("not known"), "{}", outcome.stderr);
}
