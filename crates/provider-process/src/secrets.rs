//! How secrets get from the provider to a shim: as the first that is said on its connection.
//!
//! They are in no file: a launch folder says which versions a program gets, not which values. The message waits in the
//! socket until the shim is there, so that it need not be asked for. It is a length (4 bytes, little-endian) and a JSON
//! object of variables; there is none where the launch has no secrets.

use std::{collections::BTreeMap, io, os::fd::BorrowedFd};

use orchestra_model::{launch::Launch, text::Reference};
use orchestra_secrets::Vault;
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};

/// Longest message, in bytes.
const LONGEST: usize = 1 << 20;

/// Why a program cannot have its secrets.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Unavailable(String);

impl From<Unavailable> for io::Error {
    fn from(error: Unavailable) -> Self {
        Self::other(error)
    }
}

/// The variables of a launch that secrets are a part of. Nothing if there are none.
#[derive(Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    pub(crate) fn new(launch: &Launch, vault: &Vault) -> io::Result<Self> {
        if launch.secrets.is_empty() {
            return Ok(Self::default());
        }
        let mut variables = BTreeMap::new();
        for (variable, text) in &launch.secrets {
            let mut error = None;
            let filled = text.fill(|reference| {
                let Reference::Secret { version: Some(version), .. } = reference else { return None };
                vault.open(version).map(|secret| secret.reveal().to_owned()).map_err(|failed| error = Some(failed)).ok()
            });
            let value = filled.map_err(|hole| {
                let why = error.map_or_else(|| "it has no version".to_owned(), |error| error.to_string());
                Unavailable(format!("the variable `{variable}` has no value: {hole}: {why}"))
            })?;
            variables.insert(variable, value);
        }
        let json = serde_json::to_vec(&variables)?;
        if json.len() > LONGEST {
            return Err(Unavailable("its secrets are longer than 1 MiB together".to_owned()).into());
        }
        let mut message = u32::try_from(json.len()).unwrap_or(u32::MAX).to_le_bytes().to_vec();
        message.extend(json);
        Ok(Self(message))
    }

    /// Says it on a fresh connection, whose other end nobody reads yet.
    pub(crate) fn say(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        // The kernel counts twice what it is told, and its own structures to what it holds (socket(7), unix(7)).
        if self.0.len() > 64 << 10 {
            sockopt::set_socket_send_buffer_size(connection, 2 * LONGEST)?;
        }
        match send(connection, &self.0, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) if sent == self.0.len() => Ok(()),
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {
                let message = "its secrets are longer than this machine passes on at a time (net.core.wmem_max)";
                Err(Unavailable(message.to_owned()).into())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What a provider said to a shim of this launch.
pub(crate) fn hear(launch: &Launch, connection: Option<BorrowedFd<'_>>) -> io::Result<BTreeMap<String, String>> {
    if launch.secrets.is_empty() {
        return Ok(BTreeMap::new());
    }
    let connection = connection.ok_or_else(|| io::Error::other("nobody is there who would say the secrets"))?;
    let exact = |bytes: &mut [u8]| -> io::Result<()> {
        // It was said before the connection was handed over.
        let wanted = bytes.len();
        let (_, count) = recv(connection, bytes, RecvFlags::WAITALL | RecvFlags::DONTWAIT)?;
        if count < wanted { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    };
    let mut length = [0; 4];
    exact(&mut length)?;
    let mut json = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap_or(LONGEST).min(LONGEST)];
    exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use orchestra_model::{
        Text,
        secret::{Secret, SecretVersion},
        text::Segment,
    };
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn example(secrets: impl IntoIterator<Item = (&'static str, Vec<Segment>)>) -> Launch {
        let mut launch: Launch = serde_json::from_str(include_str!("shim/launch/example.json")).unwrap();
        launch.secrets = secrets.into_iter().map(|(name, text)| (name.to_owned(), Text(text))).collect();
        launch
    }

    fn hole(version: Option<SecretVersion>) -> Segment {
        Segment::Reference(Reference::Secret { secret: "db".parse().unwrap(), version })
    }

    /// Says and hears what a launch has.
    fn pass(launch: &Launch, vault: &Vault) -> io::Result<BTreeMap<String, String>> {
        let message = Message::new(launch, vault)?;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        message.say(ours.as_fd())?;
        send(&ours, b"what is said next", SendFlags::NOSIGNAL)?;
        let heard = hear(launch, Some(theirs.as_fd()))?;
        let mut next = [0; 17];
        recv(&theirs, &mut next, RecvFlags::DONTWAIT)?;
        assert_eq!(&next, b"what is said next");
        Ok(heard)
    }

    #[test]
    fn a_shim_hears_the_values_and_a_launch_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(folder.path());
        let long = "x".repeat(100 << 10);
        let seal = |value: &str| Some(vault.seal(&"db".parse().unwrap(), &Secret::new(value.to_owned())).unwrap());
        let (short, line, long_version) = (seal("hush"), seal("two\nlines \"\u{1F511}\""), seal(&long));
        let text = |text: &str| Segment::Literal(text.to_owned());
        let launch = example([
            ("URL", vec![text("db://u:"), hole(short.clone()), text("@h/"), hole(short.clone())]),
            ("KEY", vec![hole(line)]),
            ("LONG", vec![hole(long_version)]),
        ]);
        assert!(!serde_json::to_string(&launch).unwrap().contains("hush"));
        let heard = pass(&launch, &vault).unwrap();
        let heard: Vec<_> = heard.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(heard, [("KEY", "two\nlines \"\u{1F511}\""), ("LONG", &long), ("URL", "db://u:hush@h/hush")]);
        assert!(pass(&example([]), &vault).unwrap().is_empty());
    }

    #[test]
    fn what_is_missing_or_too_much_is_said_without_a_value() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(folder.path());
        let error = |launch: &Launch| pass(launch, &vault).unwrap_err().to_string();
        let unknown = SecretVersion("0123456789abcdef0123456789abcdef".to_owned());
        let gone = error(&example([("URL", vec![hole(Some(unknown))])]));
        assert!(gone.contains("`URL`") && gone.contains("secrets.db") && gone.contains("not kept any more"), "{gone}");
        let never = error(&example([("URL", vec![hole(None)])]));
        assert!(never.contains("it has no version"), "{never}");
        let version = vault.seal(&"db".parse().unwrap(), &Secret::new("x".repeat(120 << 10))).unwrap();
        let names = ["A", "B", "C", "D", "E", "F", "G", "H", "I"];
        let much = error(&example(names.map(|name| (name, vec![hole(Some(version.clone()))]))));
        assert!(much.contains("longer than 1 MiB"), "{much}");
        assert!(hear(&example([("URL", vec![hole(None)])]), None).is_err());
    }
}
