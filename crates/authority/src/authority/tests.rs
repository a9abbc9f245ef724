use std::{os::unix::fs::PermissionsExt as _, sync::Barrier};

use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::*;

/// What a client that trusts `root` alone says of a certificate for `name`.
fn verify(root: &str, leaf: &str, name: &str, at: SystemTime) -> Result<(), webpki::Error> {
    let root = CertificateDer::from_pem_slice(root.as_bytes()).unwrap();
    let leaf = CertificateDer::from_pem_slice(leaf.as_bytes()).unwrap();
    let anchors = [anchor_from_trusted_cert(&root).unwrap()];
    let leaf = EndEntityCert::try_from(&leaf).unwrap();
    let at = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap());
    leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, &[], at, KeyUsage::server_auth(), None, None)?;
    leaf.verify_is_valid_for_subject_name(&ServerName::try_from(name).unwrap())
}

#[test]
fn what_it_issues_is_valid_for_its_names_and_addresses() {
    let home = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let authority = Authority::open(home.path(), now).unwrap();
    let names = ["app.localhost", "*.preview.test", "example.com", "localhost"];
    let addresses = wanted_addresses("192.168.7.7".parse().unwrap());
    let leaf = authority.issue("a service", names, &addresses, now).unwrap();
    let facts = Pair::read(leaf.as_bytes(), leaf.as_bytes()).unwrap().facts;
    let listed = ["localhost", "app.localhost", "*.preview.test", "127.0.0.1", "::1", "192.168.7.7"];
    assert_eq!(facts.names, listed);
    for name in ["localhost", "app.localhost", "a.preview.test", "127.0.0.1", "::1", "192.168.7.7"] {
        verify(authority.pem(), &leaf, name, now).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert!(verify(authority.pem(), &leaf, "example.com", now).is_err());
    let lasts = Duration::from_secs(facts.not_after - facts.not_before);
    assert!(lasts <= Duration::from_secs(825 * 86_400), "{lasts:?}");
    assert!(verify(authority.pem(), &leaf, "localhost", now + lasts).is_err());
}

#[test]
fn a_stolen_key_vouches_for_no_public_name() {
    let home = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let authority = Authority::open(home.path(), now).unwrap();
    let key = KeyPair::from_pem(&fs::read_to_string(folder_of(home.path()).join(KEY)).unwrap()).unwrap();
    let forge = |names: Vec<SanType>, ca: bool| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        if ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let issuer = Issuer::new(own_params(&key, now), &key);
        params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().pem()
    };
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    assert_eq!(
        verify(authority.pem(), &forge(vec![dns("www.example.com")], false), "www.example.com", now),
        Err(webpki::Error::NameConstraintViolation)
    );
    let public = SanType::IpAddress("8.8.8.8".parse().unwrap());
    assert_eq!(
        verify(authority.pem(), &forge(vec![public], false), "8.8.8.8", now),
        Err(webpki::Error::NameConstraintViolation)
    );
    assert!(verify(authority.pem(), &forge(vec![dns("localhost")], true), "localhost", now).is_err(), "no authority");
    assert_eq!(verify(authority.pem(), &forge(vec![dns("a.localhost")], false), "a.localhost", now), Ok(()));
}

#[test]
fn whoever_makes_it_at_the_same_time_gets_the_same_one() {
    for _ in 0..20 {
        let home = tempfile::tempdir().unwrap();
        let barrier = Barrier::new(8);
        let all: Vec<String> = std::thread::scope(|scope| {
            let open = || {
                barrier.wait();
                Authority::open(home.path(), SystemTime::now()).unwrap().facts().fingerprint.clone()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(all.iter().all(|fingerprint| *fingerprint == all[0]), "{all:?}");
        let left: Vec<_> = fs::read_dir(home.path().join("tls")).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["authority"], "nothing is left of those who came second");
    }
}

#[test]
fn its_key_is_for_its_owner_alone_and_it_is_the_same_ever_after() {
    let home = tempfile::tempdir().unwrap();
    assert!(Authority::find(home.path()).unwrap().is_none());
    let first = Authority::open(home.path(), SystemTime::now()).unwrap();
    let mode = |path: &str| fs::metadata(home.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("tls"), mode("tls/authority"), mode("tls/authority/key.pem")), (0o700, 0o700, 0o600));
    let later = SystemTime::now() + Duration::from_secs(86_400);
    let second = Authority::open(home.path(), later).unwrap();
    assert_eq!(first.facts(), second.facts());
    let leaf = second.issue("x", [], &[], later).unwrap();
    verify(first.pem(), &leaf, "localhost", later).unwrap();
}

#[test]
fn a_damaged_authority_is_said_to_be_and_not_replaced() {
    let home = tempfile::tempdir().unwrap();
    Authority::open(home.path(), SystemTime::now()).unwrap();
    let other = tempfile::tempdir().unwrap();
    Authority::open(other.path(), SystemTime::now()).unwrap();
    let key = folder_of(home.path()).join(KEY);
    fs::copy(folder_of(other.path()).join(KEY), &key).unwrap();
    let error = Authority::open(home.path(), SystemTime::now()).unwrap_err();
    assert!(matches!(error, AuthorityError::Damaged { .. }), "{error}");
    fs::remove_file(key).unwrap();
    let error = Authority::open(home.path(), SystemTime::now()).unwrap_err();
    assert!(matches!(error, AuthorityError::Files { .. }), "{error}");
}

#[test]
fn openssl_agrees() {
    let home = tempfile::tempdir().unwrap();
    let authority = Authority::open(home.path(), SystemTime::now()).unwrap();
    let leaf = authority.issue("x", ["app.localhost"], &[[127, 0, 0, 1].into()], SystemTime::now()).unwrap();
    let (root, path) = (home.path().join("root.pem"), home.path().join("leaf.pem"));
    fs::write(&root, authority.pem()).unwrap();
    fs::write(&path, leaf).unwrap();
    let verify = std::process::Command::new("openssl")
        .args(["verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "app.localhost", "-CAfile"])
        .args([&root, &path])
        .output();
    match verify {
        Err(error) => eprintln!("SKIPPED: openssl cannot be run: {error}"),
        Ok(output) => assert!(output.status.success(), "{output:?}"),
    }
}
