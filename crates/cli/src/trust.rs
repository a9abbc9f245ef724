//! Making the system trust the authority: which commands do that here, and whether they were given.
//!
//! What is decided here is a value ([`Trusting`]); the command line carries it out or shows it. Programs with trust stores
//! of their own (Firefox, Java, Node.js, Python's certifi) do not look into the system's.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The trust store of a system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrustStore {
    kind: Kind,
    /// In front of every path: `/`, or a folder in tests.
    root: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A folder of files and a program that makes a bundle of them.
    Folder { anchors: &'static str, update: &'static [&'static str] },
    /// p11-kit's own program.
    P11Kit,
    /// The system keychain of macOS.
    Keychain,
}

/// Debian, Ubuntu, Alpine; then Fedora, RHEL; then SUSE.
const FOLDERS: [(&str, &[&str]); 3] = [
    ("usr/local/share/ca-certificates", &["update-ca-certificates"]),
    ("etc/pki/ca-trust/source/anchors", &["update-ca-trust", "extract"]),
    ("etc/pki/trust/anchors", &["update-ca-certificates"]),
];

/// Where systems keep all certificates that they trust in one file.
const BUNDLES: [&str; 4] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "etc/pki/tls/certs/ca-bundle.crt",
    "var/lib/ca-certificates/ca-bundle.pem",
];

/// What makes a system trust an authority, or stop doing so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trusting {
    /// Commands with their arguments, in their order.
    pub(crate) commands: Vec<Vec<String>>,
}

impl Trusting {
    /// As they are typed, to be given by somebody who is not root.
    pub(crate) fn shell(&self) -> String {
        let line = |command: &Vec<String>| {
            let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
            format!("sudo {}", words.join(" "))
        };
        self.commands.iter().map(line).collect::<Vec<_>>().join(" && ")
    }
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

impl TrustStore {
    /// The trust store of the system below `root`, usually `/`; `has` says whether there is a program of this name.
    pub(crate) fn detect(root: &Path, macos: bool, has: impl Fn(&str) -> bool) -> Option<Self> {
        let found = |kind| Some(Self { kind, root: root.to_owned() });
        if macos {
            return found(Kind::Keychain);
        }
        for (anchors, update) in FOLDERS {
            if has(update[0]) && root.join(anchors).is_dir() {
                return found(Kind::Folder { anchors, update });
            }
        }
        if has("trust") { found(Kind::P11Kit) } else { None }
    }

    /// What makes the system trust the certificate in this file.
    pub(crate) fn trust(&self, certificate: &Path, fingerprint: &str) -> Trusting {
        let file = certificate.display().to_string();
        let commands = match self.kind {
            Kind::Folder { update, .. } => {
                vec![words(&["install", "-m", "0644", &file, &self.anchor(fingerprint)]), words(update)]
            }
            Kind::P11Kit => vec![words(&["trust", "anchor", "--store", &file])],
            Kind::Keychain => vec![words(&[
                "security",
                "add-trusted-cert",
                "-d",
                "-r",
                "trustRoot",
                "-k",
                "/Library/Keychains/System.keychain",
                &file,
            ])],
        };
        Trusting { commands }
    }

    /// What makes it stop doing so.
    pub(crate) fn untrust(&self, certificate: &Path, fingerprint: &str) -> Trusting {
        let file = certificate.display().to_string();
        let commands = match self.kind {
            // What was in the bundle may stay there unless everything is made anew.
            Kind::Folder { update: update @ ["update-ca-certificates"], .. } => {
                vec![words(&["rm", "-f", &self.anchor(fingerprint)]), words(&[update[0], "--fresh"])]
            }
            Kind::Folder { update, .. } => vec![words(&["rm", "-f", &self.anchor(fingerprint)]), words(update)],
            Kind::P11Kit => vec![words(&["trust", "anchor", "--remove", &file])],
            Kind::Keychain => vec![words(&["security", "remove-trusted-cert", "-d", &file])],
        };
        Trusting { commands }
    }

    /// Where the authority's certificate lies among the anchors.
    fn anchor(&self, fingerprint: &str) -> String {
        let Kind::Folder { anchors, .. } = self.kind else { return String::new() };
        let name = format!("orchestra-{}.crt", fingerprint.get(..12).unwrap_or(fingerprint));
        self.root.join(anchors).join(name).display().to_string()
    }
}

/// Whether the system below `root` trusts this certificate; `None` where that cannot be seen: macOS keeps no such file.
pub(crate) fn trusts(root: &Path, pem: &str) -> Option<bool> {
    let wanted = bodies(pem).next()?;
    let mut seen = None;
    for bundle in BUNDLES.iter().map(|bundle| root.join(bundle)) {
        let Ok(bundle) = fs::read(bundle) else { continue };
        seen = Some(false);
        // Comments between certificates may be in any encoding.
        if bodies(&String::from_utf8_lossy(&bundle)).any(|body| body == wanted) {
            return Some(true);
        }
    }
    seen
}

/// The Base64 of each certificate of a PEM text, without line breaks: the same for the same certificate (RFC 7468).
fn bodies(pem: &str) -> impl Iterator<Item = String> {
    pem.split("-----BEGIN CERTIFICATE-----").skip(1).map(|rest| {
        let body = rest.split("-----END").next().unwrap_or_default();
        body.chars().filter(|c| !c.is_ascii_whitespace()).collect()
    })
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINGERPRINT: &str = "0123456789abcdef";

    #[test]
    fn each_system_has_its_way() {
        let root = tempfile::tempdir().unwrap();
        let detect = |programs: &'static [&'static str], macos| {
            TrustStore::detect(root.path(), macos, |program| programs.contains(&program))
        };
        let shell = |store: Option<TrustStore>| {
            let store = store.unwrap();
            let certificate = Path::new("/home/me/it's/certificate.pem");
            let text = format!(
                "{}\n{}",
                store.trust(certificate, FINGERPRINT).shell(),
                store.untrust(certificate, FINGERPRINT).shell()
            );
            text.replace(&*root.path().to_string_lossy(), "")
        };
        assert_eq!(detect(&[], false), None);
        assert_eq!(detect(&["update-ca-certificates"], false), None, "the program without its folder");
        assert_eq!(
            shell(detect(&["trust"], false)),
            "sudo trust anchor --store '/home/me/it'\\''s/certificate.pem'\n\
             sudo trust anchor --remove '/home/me/it'\\''s/certificate.pem'"
        );
        assert!(shell(detect(&[], true)).starts_with("sudo security add-trusted-cert -d -r trustRoot -k /Library/"));
        fs::create_dir_all(root.path().join("etc/pki/ca-trust/source/anchors")).unwrap();
        assert_eq!(
            shell(detect(&["trust", "update-ca-trust"], false)),
            "sudo install -m 0644 '/home/me/it'\\''s/certificate.pem' \
             /etc/pki/ca-trust/source/anchors/orchestra-0123456789ab.crt && sudo update-ca-trust extract\n\
             sudo rm -f /etc/pki/ca-trust/source/anchors/orchestra-0123456789ab.crt && sudo update-ca-trust extract"
        );
        fs::create_dir_all(root.path().join("usr/local/share/ca-certificates")).unwrap();
        assert_eq!(
            shell(detect(&["trust", "update-ca-certificates"], false)),
            "sudo install -m 0644 '/home/me/it'\\''s/certificate.pem' \
             /usr/local/share/ca-certificates/orchestra-0123456789ab.crt && sudo update-ca-certificates\n\
             sudo rm -f /usr/local/share/ca-certificates/orchestra-0123456789ab.crt && sudo update-ca-certificates --fresh"
        );
    }

    #[test]
    fn looks_into_the_bundle() {
        let root = tempfile::tempdir().unwrap();
        let ours = "-----BEGIN CERTIFICATE-----\nAAAA\nBBBB\n-----END CERTIFICATE-----\n";
        let other = "-----BEGIN CERTIFICATE-----\nAAAA\nBBBC\n-----END CERTIFICATE-----\n";
        assert_eq!(trusts(root.path(), ours), None);
        fs::create_dir_all(root.path().join("etc/ssl/certs")).unwrap();
        let bundle = root.path().join("etc/ssl/certs/ca-certificates.crt");
        fs::write(&bundle, other).unwrap();
        assert_eq!(trusts(root.path(), ours), Some(false));
        fs::write(&bundle, format!("{other}# a comment\n{}", ours.replace("BBBB", "\nBBBB"))).unwrap();
        assert_eq!(trusts(root.path(), ours), Some(true));
    }
}
