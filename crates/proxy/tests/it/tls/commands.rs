//! The programs that people have: curl and `openssl s_client`.

use tokio::process::Command;

use super::*;

async fn run(command: &mut Command) -> (bool, String) {
    let output = soon("the program's end", command.kill_on_drop(true).stdin(std::process::Stdio::null()).output());
    let output = output.await.unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

#[tokio::test]
async fn curl_trusts_the_authority_and_nobody_else() {
    let Some(curl) = program("curl") else { return };
    let certificates = Certificates::new();
    certificates.write(&["localhost", "127.0.0.1"]);
    let world = World::new().await;
    let instance = Instance::http(echo).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let curl = |options: &[&str], url: &str| {
        let mut command = Command::new(&curl);
        command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "20"]).args(options).arg(url);
        command
    };
    let (root, url) = (certificates.path("root.pem"), format!("https://{address}/"));
    let root = root.to_str().unwrap();
    for (version, says) in [("--http1.1", "1.1"), ("--http2", "2")] {
        for tls in ["--tlsv1.3", "--tls-max=1.2"] {
            let tls: Vec<&str> = tls.split('=').collect();
            let options = [&["--cacert", root, version, "--write-out", "\nversion %{http_version}"], &tls[..]].concat();
            let (success, text) = run(&mut curl(&options, &url)).await;
            assert!(success && text.contains("x-forwarded-proto: https"), "{options:?}: {text}");
            assert!(text.ends_with(&format!("version {says}")), "{options:?}: {text}");
        }
    }
    let (success, text) = run(&mut curl(&[], &url)).await;
    assert!(!success && text.contains("certificate"), "{text}");
    assert_eq!(sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"untrusted\"").await, 1.0);
    let (success, text) = run(&mut curl(&["--include"], &format!("http://{address}/"))).await;
    assert!(success && text.starts_with("HTTP/1.1 400") && text.contains("https://"), "{text}");
}

#[tokio::test]
async fn openssl_finds_nothing_to_complain_about() {
    let Some(openssl) = program("openssl") else { return };
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::http(echo).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    for (version, protocol) in [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")] {
        let mut command = Command::new(&openssl);
        command.args(["s_client", "-connect", &address.to_string(), "-servername", "localhost"]);
        command.args(["-verify_hostname", "localhost", "-verify_return_error", "-alpn", "h2,http/1.1", "-CAfile"]);
        let (success, text) = run(command.arg(certificates.path("root.pem")).arg(version)).await;
        assert!(success && text.contains("Verify return code: 0 (ok)"), "{text}");
        assert!(text.contains(protocol) && text.contains("ALPN protocol: h2"), "{text}");
    }
    for old in ["-tls1_1", "-tls1"] {
        let mut command = Command::new(&openssl);
        command.args(["s_client", "-connect", &address.to_string(), old, "-cipher", "DEFAULT@SECLEVEL=0"]);
        let (success, text) = run(&mut command).await;
        assert!(!success, "{old} is too old to be spoken: {text}");
    }
}
