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
            let value = filled.map_err(|hole| match error {
                Some(error) => io::Error::other(format!("the variable `{variable}` has no value: {hole}: {error}")),
                None => io::Error::other(format!("the variable `{variable}` has no value: {hole} has no version")),
            })?;
            variables.insert(variable, value);
        }
        let json = serde_json::to_vec(&variables)?;
        if json.len() > LONGEST {
            return Err(io::Error::other("the secrets of a program are longer than 1 MiB together"));
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
        let sent = send(connection, &self.0, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        if sent < self.0.len() {
            return Err(io::Error::other(
                "the secrets of a program are longer than this machine passes on at a time (net.core.wmem_max)",
            ));
        }
        Ok(())
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
