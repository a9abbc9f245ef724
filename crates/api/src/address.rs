//! Where a server is reached.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

/// The socket of the server that owns a state directory.
pub fn socket_path(home: &Path) -> PathBuf {
    home.join("server.sock")
}

/// Where a server is reached. Written `unix:/path/to/socket` or `http://host:port`.
#[derive(Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket; whoever may open it is trusted.
    Unix(PathBuf),
    /// TCP.
    Tcp {
        /// Host and port.
        authority: String,
        /// Bearer token.
        token: Option<String>,
    },
}

/// Why a text is no valid endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a server address: expected `unix:/path` or `http://host:port`")]
pub struct ParseEndpointError {
    text: String,
}

impl Endpoint {
    /// The socket of the server that owns the state directory `home`.
    pub fn of_home(home: &Path) -> Self {
        Self::Unix(socket_path(home))
    }

    /// Sets the bearer token, where one is of use.
    #[must_use]
    pub fn with_token(self, token: Option<String>) -> Self {
        match self {
            Self::Unix(_) => self,
            Self::Tcp { authority, .. } => Self::Tcp { authority, token },
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;
    fn from_str(text: &str) -> Result<Self, ParseEndpointError> {
        let error = || ParseEndpointError { text: text.chars().take(200).collect() };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = Path::new(path.strip_prefix("//").unwrap_or(path));
            return if path.is_absolute() { Ok(Self::Unix(path.to_owned())) } else { Err(error()) };
        }
        let authority = text.strip_prefix("http://").ok_or_else(error)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let parsed: http::uri::Authority = authority.parse().map_err(|_| error())?;
        if parsed.port_u16().is_none_or(|port| port == 0) || parsed.host().is_empty() || authority.contains('@') {
            return Err(error());
        }
        Ok(Self::Tcp { authority: authority.to_owned(), token: None })
    }
}

/// Without the token.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { authority, .. } => write!(f, "http://{authority}"),
        }
    }
}

/// Without the token.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Longest path of a Unix socket address on Linux: `sun_path` has 108 bytes, one of them for the final NUL (`unix(7)`).
const SUN_PATH: usize = 107;

/// A path to the same file that is short enough for a Unix socket address. A state directory may lie deep; the kernel
/// follows `/proc/self/fd/N/name` just as well. The path is good as long as this value lives.
#[derive(Debug)]
pub struct ShortPath {
    path: PathBuf,
    _folder: Option<File>,
}

impl ShortPath {
    /// For the socket at `path`, whose folder must exist if the path is long.
    pub fn of(path: &Path) -> io::Result<Self> {
        /// `open(2)`: only names the directory, which needs no permission to read it.
        const O_PATH: i32 = 0o10_000_000;
        if path.as_os_str().len() <= SUN_PATH {
            return Ok(Self { path: path.to_owned(), _folder: None });
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let folder = OpenOptions::new().read(true).custom_flags(O_PATH).open(folder)?;
        let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _folder: Some(folder) })
    }
}

impl AsRef<Path> for ShortPath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn endpoints_round_trip() {
        for text in ["unix:/run/o.sock", "http://localhost:7070", "http://[::1]:7070"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "unix:o.sock",
            "localhost:80",
            "https://a:1",
            "http://a",
            "http://a:0",
            "http://u:p@a:1",
            "http://a:1/x",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        let endpoint = "http://a:1".parse::<Endpoint>().unwrap().with_token(Some("hunter2".into()));
        assert!(!format!("{endpoint} {endpoint:?}").contains("hunter2"));
    }

    #[test]
    fn sockets_may_lie_deep() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("server.sock");
        let _listener = UnixListener::bind(ShortPath::of(&path).unwrap()).unwrap();
        assert!(path.exists());
        UnixStream::connect(ShortPath::of(&path).unwrap()).unwrap();
    }
}
