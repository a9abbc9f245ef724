//! Listening: a Unix socket with permissions 0600, and TCP with a token when asked.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use orchestra_task::{TaskKind, TaskTree};
use tokio::net::{TcpListener, UnixListener};

use crate::auth;

/// How often the server looks whether its socket is still there.
const LOOK: Duration = Duration::from_secs(1);

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

/// Serves on a Unix socket until the tree is cancelled. If its file is deleted it is made again: without it nobody could
/// reach the server, and its lock would keep every other one from starting.
pub fn serve_unix(tree: &TaskTree, path: PathBuf, listener: UnixListener, router: Router) {
    serve(tree, listener, router.clone());
    let stop = tree.clone();
    tree.start(TaskKind::Loop, "api socket", async move {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            // A file that somebody else put there is left alone.
            let missing =
                matches!(std::fs::symlink_metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound);
            let folder = path.parent().is_some_and(Path::exists);
            if missing && folder {
                match listen_unix(&path) {
                    Ok(listener) => {
                        tracing::warn!(socket = %path.display(), "the socket was deleted; it was made again");
                        serve(&stop, listener, router.clone());
                    }
                    Err(error) => tracing::error!(%error, "the socket was deleted and cannot be made again"),
                }
            }
        }
    });
}

fn serve(tree: &TaskTree, listener: UnixListener, router: Router) {
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
