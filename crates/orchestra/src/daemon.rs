//! The control plane as a process: opens the store, the provider and the data plane, recovers, and serves.
//!
//! The order matters. The store's lock comes first: whoever has it is the one server of this state directory. The proxy
//! comes before the recovery, because its sockets and table are part of what is found. The socket comes last: a client
//! that gets an answer gets it from a server that has recovered.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use orchestra_authority::CertifiedDataPlane;
use orchestra_cli::{ServerOptions, Serving};
use orchestra_engine::{Clock, ControlPlane};
use orchestra_machine::Settings;
use orchestra_model::{Code, Diagnostic, quantity::Timespan};
use orchestra_provider_process::ProcessProvider;
use orchestra_proxy::ProxyHandle;
use orchestra_server::{Backend, Facts};
use orchestra_store::Store;
use orchestra_task::TaskTree;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, oneshot},
};

use crate::client::start_failure;

/// Time that tasks get to end after a stop was asked for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Ports for instances: below the kernel's usual range for outgoing connections (32768 to 60999), above most services.
const INSTANCE_PORTS: (u16, u16) = (20_000, 32_767);

/// The path by which this program can be started again, also after it was replaced on disk.
pub(crate) fn this_program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    // Linux marks a replaced file; its successor has the old name.
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(text) => Ok(PathBuf::from(text)),
        None => Ok(path),
    }
}

/// Facts for the handlers.
pub(crate) fn facts(home: String) -> Facts {
    Facts {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        volumes: format!("{home}/volumes"),
        home,
        listen: None,
        started_at: Clock::wall(),
    }
}

/// A state directory that cannot be named in JSON.
pub(crate) fn not_text(home: &Path) -> Diagnostic {
    Diagnostic::error(Code::INVALID_VALUE, format!("the state directory {} is not UTF-8", home.display()))
        .help("choose another one with `--home`")
}

/// Serves until a signal or a client asks it to stop. Instances and proxy go on without it.
pub(crate) async fn run(options: ServerOptions, serving: oneshot::Sender<Serving>) -> Result<(), Vec<Diagnostic>> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("ORCHESTRA_LOG").unwrap_or_else(|_| "info".into()))
        .with_ansi(false)
        .with_writer(io::stderr)
        // On a full disk the log cannot be written, and complaining about that on the same file would panic.
        .log_internal_errors(false)
        .init();
    let token = options.token.clone().or_else(|| std::env::var(crate::client::TOKEN).ok());
    let home = options.home.to_str().ok_or_else(|| vec![not_text(&options.home)])?.to_owned();
    let program = this_program().map_err(|error| start_failure("its own program cannot be found", &error))?;
    let tree = TaskTree::new();
    let stop = Arc::new(Notify::new());

    let store = Store::open(&options.home, Clock::wall).map_err(|error| vec![error.diagnostic()])?;
    let provider = orchestra_provider_process::Options::below(&options.home, &program);
    let secrets = Arc::clone(&provider.secrets);
    let provider = ProcessProvider::open(provider, tree.clone())
        .map_err(|error| start_failure("its launch folders cannot be used", &error))?;
    let mut proxy = orchestra_proxy::Options::new(&options.home, &program);
    proxy.proxy_args = vec!["proxy".into()];
    let proxy = Box::pin(ProxyHandle::open(proxy, &tree)).await.map_err(|error| start_failure("no proxy", &error))?;
    let proxy = CertifiedDataPlane::new(Arc::new(proxy), options.home.clone(), &tree);
    let facts = facts(home);
    let control = ControlPlane::open(orchestra_engine::Options {
        store,
        provider: Arc::new(provider),
        data_plane: Arc::new(proxy),
        tree: tree.clone(),
        settings: settings(&options.home),
        volumes: facts.volumes.clone(),
        secrets,
    })
    .await
    .map_err(|error| error.diagnostics())?;

    let tcp = match options.listen {
        None => None,
        Some(address) => {
            let token = token.ok_or_else(|| {
                vec![
                    Diagnostic::error(Code::UNAUTHORIZED, "a server that listens on TCP needs a token")
                        .help("give one with `--token-file`"),
                ]
            })?;
            let failed = |error: io::Error| start_failure(&format!("it cannot listen on {address}"), &error);
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            Some((listener.local_addr().map_err(failed)?, listener, token))
        }
    };
    let listen = tcp.as_ref().map(|(address, ..)| *address);
    let facts = Facts { listen, ..facts };
    let router = orchestra_server::router(Backend::Live(control), facts, tree.clone(), stop.clone());
    if let Some((address, listener, token)) = tcp {
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "the API is not encrypted: whoever can read the traffic reads the token");
        }
        orchestra_server::serve_tcp(&tree, listener, router.clone(), token.into());
    }
    let socket = orchestra_api::socket_path(&options.home);
    let listener = orchestra_server::listen_unix(&socket).map_err(|error| start_failure("no socket", &error))?;
    orchestra_server::serve_unix(&tree, socket.clone(), listener, router);
    tracing::info!(socket = %socket.display(), ?listen, pid = std::process::id(), "serving");
    // Whoever asked may have gone.
    let _ = serving.send(Serving { listen });

    let outcome = wait(&tree, &stop).await;
    // First nobody can ask any more, then what was begun is finished.
    let _ = std::fs::remove_file(&socket);
    if !tree.shutdown(PATIENCE).await {
        tracing::warn!("some tasks did not end in time");
    }
    outcome
}

async fn wait(tree: &TaskTree, stop: &Notify) -> Result<(), Vec<Diagnostic>> {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = signals else {
        return Err(start_failure("signals cannot be received", &io::Error::last_os_error()));
    };
    // Every arm only waits; none has an effect to lose.
    let reason = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = hangup.recv() => "SIGHUP",
        () = stop.notified() => "a client",
        () = tree.cancelled() => {
            let defect = Diagnostic::error(Code::INTERNAL, "a part of the server ended by itself; its log says why")
                .help("start it again (`orchestra server start`); it continues where it was");
            return Err(vec![defect]);
        }
    };
    tracing::info!(reason, "stopping; instances and proxy go on");
    Ok(())
}

fn settings(home: &Path) -> Settings {
    let mut base_env = BTreeMap::from([
        ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ]);
    if let Ok(home) = std::env::var("HOME") {
        base_env.insert("HOME".to_owned(), home);
    }
    // What programs must trust to call a port with `tls: development`.
    let authority = orchestra_certificate::authority_path(home);
    base_env.insert("ORCHESTRA_CA_FILE".to_owned(), authority.to_string_lossy().into_owned());
    Settings {
        // Different servers should not choose the same ports; nothing else depends on it.
        seed: u64::from(std::process::id()) ^ Clock::wall(),
        ports: INSTANCE_PORTS,
        base_env,
        hold: Timespan::seconds(30),
        hold_limit: 1024,
        log_max_bytes: 64 << 20,
        log_keep: 4,
        epoch: 0,
    }
}
