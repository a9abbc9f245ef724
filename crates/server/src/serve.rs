//! Listening: a Unix socket with permissions 0600, and TCP with a token when asked.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::Router;
use orchestra_task::{TaskKind, TaskTree};
use tokio::net::{TcpListener, UnixListener};

use crate::auth;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}", path.display())]
pub struct ServeError {
    /// The socket.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Listens on a Unix socket. A file that a killed server left is replaced: the caller holds the lock of the state
/// directory, so nobody else can be listening there.
pub fn listen_unix(path: &Path) -> Result<UnixListener, ServeError> {
    let error = |source| ServeError { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
        _ => {}
    }
    let short = orchestra_api::ShortPath::of(path).map_err(error)?;
    let listener = UnixListener::bind(&short).map_err(error)?;
    // The directory is 0700 already, so nobody could connect in between.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
    Ok(listener)
}

/// Serves on a Unix socket until the tree is cancelled.
pub fn serve_unix(tree: &TaskTree, listener: UnixListener, router: Router) {
    let stop = tree.clone();
    tree.start(TaskKind::Loop, "api (unix)", async move {
        let serve = axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await });
        if let Err(error) = serve.await {
            tracing::error!(%error, "the API socket failed");
        }
    });
}

/// Serves on TCP, with a token, until the tree is cancelled.
pub fn serve_tcp(tree: &TaskTree, listener: TcpListener, router: Router, token: Arc<str>) {
    let router = router.layer(axum::middleware::from_fn_with_state(token, auth::require_token));
    let stop = tree.clone();
    tree.start(TaskKind::Loop, "api (tcp)", async move {
        let serve = axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await });
        if let Err(error) = serve.await {
            tracing::error!(%error, "the API socket failed");
        }
    });
}
