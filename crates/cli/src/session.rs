//! One command's way to a server and to the environment that is meant.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use orchestra_api::{Client, ClientError, Endpoint, ErrorBody, PreviewRequest, Source, TransportError, Version};
use orchestra_model::{Code, Diagnostic, EnvironmentId, Name};
use tokio::time::Instant;

use crate::{
    args::{EnvironmentArg, Global, PreviewArgs},
    deps::{Ended, Random, ServerControl, ServerOptions, System, Variables, WallClock},
    failure::Result,
    machine,
    output::Output,
    source::StackFile,
};

/// How long a server may take from its start to its first answer. It replays its journal in that time.
const START: Duration = Duration::from_secs(30);
/// How long after a server that found the state locked another one is started, if none answers; doubles each time.
const AGAIN: Duration = Duration::from_millis(200);

/// How often a server that was killed before it answered is started again.
const KILLS: u32 = 2;

/// How long a server that hangs up may take until it is gone.
const ENDING: Duration = Duration::from_secs(5);

/// What a command knows before it asks anybody.
pub(crate) struct Session {
    pub(crate) version: &'static str,
    pub(crate) cwd: PathBuf,
    pub(crate) home: PathBuf,
    pub(crate) now: WallClock,
    pub(crate) random: Random,
    pub(crate) control: Arc<dyn ServerControl>,
    pub(crate) system: Arc<dyn System>,
    pub(crate) token: Option<String>,
    /// `--token-file`, absolute.
    pub(crate) token_file: Option<PathBuf>,
    /// Home folder of the user.
    pub(crate) user_home: Option<PathBuf>,
    /// Where the user keeps configuration.
    pub(crate) config: Option<PathBuf>,
    /// Who asks, for the events: the name of the user.
    pub(crate) user: Option<String>,
    /// `--server`
    remote: Option<Endpoint>,
    file: Option<PathBuf>,
    environment: Option<EnvironmentArg>,
}

impl Session {
    /// From options and environment variables.
    pub(crate) fn new(global: &Global, file: Option<PathBuf>, deps: World) -> Result<Self> {
        let env = &deps.env;
        let invalid = |message: String| Diagnostic::error(Code::INVALID_VALUE, message);
        let home = match global.home.clone().or_else(|| env("ORCHESTRA_HOME").filter(|v| !v.is_empty()).map(Into::into))
        {
            Some(home) => deps.cwd.join(home),
            None => default_home(env.as_ref()).ok_or_else(|| {
                invalid("there is no home folder to keep state in".into())
                    .note("none of ORCHESTRA_HOME, XDG_STATE_HOME and HOME is set to an absolute path")
                    .help("name a state directory with `--home`")
            })?,
        };
        let token = match &global.token_file {
            Some(path) => {
                let text = std::fs::read_to_string(deps.cwd.join(path)).map_err(|error| {
                    invalid(format!("the token file {} cannot be read", path.display())).caused_by(&error)
                })?;
                Some(text.trim().to_owned())
            }
            // The second is how a server that was started in the background gets the token of the command that did it.
            None => ["ORCHESTRA_TOKEN", "ORCHESTRA_SERVER_TOKEN"]
                .into_iter()
                .find_map(|name| env(name).filter(|token| !token.is_empty())),
        };
        let server = global.server.clone().or_else(|| env("ORCHESTRA_SERVER").filter(|v| !v.is_empty()));
        let remote = match server {
            Some(url) => {
                let endpoint: Endpoint = url.parse().map_err(|error| invalid(format!("{error}")))?;
                Some(endpoint.with_token(token.clone()))
            }
            None => None,
        };
        let absolute = |name: &str| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let user_home = absolute("HOME");
        let config = absolute("XDG_CONFIG_HOME").or_else(|| user_home.as_ref().map(|home| home.join(".config")));
        let token_file = global.token_file.as_ref().map(|path| deps.cwd.join(path));
        Ok(Self {
            token_file,
            user_home,
            config,
            version: deps.version,
            cwd: deps.cwd,
            home,
            now: deps.now,
            random: deps.random,
            control: deps.server,
            system: deps.system,
            token,
            user: env("USER").filter(|user| !user.trim().is_empty()),
            remote,
            file,
            environment: global.env.clone(),
        })
    }

    /// Where the server is, or would be.
    pub(crate) fn endpoint(&self) -> Endpoint {
        self.remote.clone().unwrap_or_else(|| Endpoint::of_home(&self.home))
    }

    /// Whether another server than that of the state directory was named.
    pub(crate) fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Whether there is a socket of a server.
    pub(crate) fn has_socket(&self) -> bool {
        orchestra_api::socket_path(&self.home).exists()
    }

    /// The server, if one answers. `None` if nobody listens.
    pub(crate) async fn running(&self) -> Result<Option<(Client, Version)>, ClientError> {
        let deadline = Instant::now() + ENDING;
        loop {
            match Client::connect(self.endpoint()).await {
                Ok((client, version)) if self.is_remote() => return Ok(Some((client, version))),
                // A server of this host does not come back by itself: the command has to start it, so the client does
                // not wait.
                Ok((client, version)) => return Ok(Some((client.patience(Duration::ZERO), version))),
                Err(error) if error.is_unreachable() => return Ok(None),
                // It hung up: it was killed or ends in this moment, and soon either nobody listens or another one does.
                Err(ClientError::Transport(TransportError::Lost { .. })) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The server; starts it if there is none, and says so.
    pub(crate) async fn server(&self, output: &mut Output) -> Result<Client> {
        if let Some((client, version)) = self.running().await? {
            if version.version != self.version {
                let (server, client) = (&version.version, self.version);
                output.note(&format!(
                    "the server is version {server}, this is {client}: `orchestra server stop` lets the next command start this one"
                ));
            }
            return Ok(client);
        }
        if self.is_remote() {
            let client = Client::new(Arc::new(orchestra_api::SocketTransport::new(self.endpoint())));
            return match client.version().await {
                Ok(_) => Ok(client),
                Err(error) => Err(error.into()),
            };
        }
        let options = ServerOptions { home: self.home.clone(), listen: None, token: None };
        let (client, version) = self.start(&options).await?;
        output.note(&format!("started the server (pid {}, state in {})", version.pid, self.home.display()));
        Ok(client)
    }

    /// The server, once one answers again. A command that only looks starts none: it may have been stopped on purpose,
    /// and whoever stopped it does not want it back because somebody still looks.
    pub(crate) async fn server_again(&self, output: &mut Output) -> Result<Client> {
        let mut pause = Duration::from_millis(20);
        let mut said = false;
        loop {
            match self.running().await {
                Ok(Some((client, _))) => return Ok(client),
                Err(error) if !error.is_lost() => return Err(error.into()),
                Ok(None) | Err(_) => {}
            }
            if !said {
                said = true;
                output.note("no server answers; waiting for the next one, which other commands start (Ctrl-C ends)");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// The server of a state directory that exists; `None` if there is none, so that looking creates nothing.
    pub(crate) async fn server_if_state(&self, output: &mut Output) -> Result<Option<Client>> {
        if !self.is_remote() && self.running().await?.is_none() && !has_state(&self.home) {
            return Ok(None);
        }
        self.server(output).await.map(Some)
    }

    /// A server and the environment that is meant. Where nothing was ever up no server is started only to say so.
    pub(crate) async fn known(&self, output: &mut Output) -> Result<(Client, EnvironmentId)> {
        let Some(client) = self.server_if_state(output).await? else {
            return Err(Diagnostic::error(Code::NOT_FOUND, "nothing is up")
                .help("`orchestra up` starts the stack of this folder")
                .into());
        };
        let environment = self.environment(&client).await?;
        Ok((client, environment))
    }

    /// Something that answers `validate` and `plan`: the server, or if none runs this process.
    pub(crate) async fn reader(&self, output: &mut Output) -> Result<Client> {
        if self.is_remote() {
            return self.server(output).await;
        }
        if let Some((client, _)) = self.running().await? {
            return Ok(client);
        }
        Ok(Client::new(self.control.in_process(&self.home).await?))
    }

    /// Starts a server and waits until it answers.
    pub(crate) async fn start(&self, options: &ServerOptions) -> Result<(Client, Version)> {
        let failed = |message: &str| {
            Diagnostic::error(Code::SERVER_UNREACHABLE, message.to_owned())
                .help("look for the reason with `orchestra doctor`")
        };
        let spawn = || {
            let spawned = self.control.spawn(options);
            // Nearly always it is the state directory, of which more is known than the system's word for it.
            spawned.map_err(|error| {
                machine::unusable(&self.home)
                    .unwrap_or_else(|| failed("the server cannot be started").caused_by(&error))
            })
        };
        let mut spawned = spawn()?;
        let deadline = Instant::now() + START;
        let (mut again, mut kills) = (AGAIN, 0);
        let mut pause = Duration::from_millis(2);
        let mut ended = None;
        loop {
            match self.running().await {
                Ok(Some(answered)) => return Ok(answered),
                // It listens and is not ready to answer.
                Err(error) if !error.is_lost() => return Err(error.into()),
                Ok(None) | Err(_) => {}
            }
            if let Some((last, since)) = &ended {
                let last: &Ended = last;
                // Another command may have started one at the same moment: then ours found the state locked, and the
                // other one answers once it has replayed its journal.
                let errors = errors_of(last);
                let is_locked = errors.iter().any(|error| error.code == Code::STATE_LOCKED);
                if !(is_locked || last.killed && kills < KILLS) || Instant::now() > deadline {
                    return Err(could_not_start(last, errors, &spawned.log).into());
                }
                // Or the owner was killed and was still leaving, and nobody else comes.
                if Instant::now() > *since + again {
                    again *= 2;
                    kills += u32::from(last.killed);
                    spawned = spawn()?;
                    ended = None;
                }
            } else if Instant::now() > deadline {
                let message = format!("the server (pid {}) did not answer within {} s", spawned.pid, START.as_secs());
                return Err(with_notes(failed(&message), last_lines(&spawned.log)).into());
            }
            // There is no event for "a socket appeared" that is worth its code: connecting costs microseconds.
            if ended.is_none() {
                tokio::select! {
                    last = &mut spawned.exited => ended = Some((last, Instant::now())),
                    () = tokio::time::sleep(pause) => {}
                }
            } else {
                tokio::time::sleep(pause).await;
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// The stack file's text for the environment that is meant, with what is asked of a preview.
    pub(crate) fn source(&self, args: &PreviewArgs) -> Result<Source> {
        let file = self.stack_file()?;
        let mut source = file.read(self.environment_name())?;
        self.is_of(&file.shown, &source)?;
        let asked = args.from.is_some() || args.ttl.is_some() || args.owner.is_some();
        source.preview = asked.then(|| PreviewRequest {
            from: args.from.clone(),
            ttl: args.ttl,
            owner: args.owner.clone().or_else(|| self.user.clone().filter(|_| args.from.is_some())),
        });
        Ok(source)
    }

    /// Refuses the file of another stack than the one that `--env STACK/NAME` names: its environment of the same name is
    /// not what is meant.
    fn is_of(&self, shown: &str, source: &Source) -> Result<(), Diagnostic> {
        let Some(EnvironmentArg::Full(id)) = &self.environment else { return Ok(()) };
        let bytes = source.source_text.as_bytes();
        let stack = orchestra_spec::outline(orchestra_spec::Source { path: shown, bytes }).stack;
        match stack {
            Some(stack) if stack != id.stack => {
                let message = format!("{shown} is the stack `{stack}`, and `{id}` is an environment of `{}`", id.stack);
                let help =
                    format!("name the stack file of `{}` with `--file`, or write `--env {}`", id.stack, id.environment);
                Err(Diagnostic::error(Code::UNKNOWN_ENVIRONMENT, message).help(help))
            }
            _ => Ok(()),
        }
    }

    /// The stack file.
    pub(crate) fn stack_file(&self) -> Result<StackFile, Diagnostic> {
        StackFile::find(self.file.as_deref(), &self.cwd)
    }

    /// The name that `--env` gives, for a command that reads the stack file.
    pub(crate) fn environment_name(&self) -> Option<Name> {
        match &self.environment {
            None => None,
            Some(EnvironmentArg::Name(name)) => Some(name.clone()),
            Some(EnvironmentArg::Full(id)) => Some(id.environment.clone()),
        }
    }

    /// Whether neither a file nor an environment was named, and no stack file is near.
    pub(crate) fn is_nowhere(&self) -> bool {
        self.environment.is_none() && self.file.is_none() && self.stack_file().is_err()
    }

    /// The environment that is meant: by its full name, by what the stack file says, or, if that file cannot be used
    /// any more, by what was applied from it before.
    pub(crate) async fn environment(&self, client: &Client) -> Result<EnvironmentId> {
        if let Some(EnvironmentArg::Full(id)) = &self.environment {
            return Ok(id.clone());
        }
        let file = match self.stack_file() {
            Ok(file) => file,
            Err(diagnostic) => return self.only_environment(client, None, vec![diagnostic]).await,
        };
        let problems = match file.read(self.environment_name()) {
            Ok(source) => match client.validate(&source).await {
                Ok(valid) => return Ok(valid.environment),
                Err(ClientError::Answer { errors, .. }) => errors,
                Err(error) => return Err(error.into()),
            },
            Err(diagnostics) => diagnostics,
        };
        self.only_environment(client, Some(&file.path), problems).await
    }

    /// The one environment that `--env` and the path of the stack file leave; else the problems that led here.
    async fn only_environment(
        &self,
        client: &Client,
        path: Option<&Path>,
        problems: Vec<Diagnostic>,
    ) -> Result<EnvironmentId> {
        let name = self.environment_name();
        if path.is_none() && name.is_none() {
            return Err(problems.into());
        }
        let known = client.all_environments().await?;
        let mut fitting = known.into_iter().filter(|known| {
            path.is_none_or(|path| Path::new(&known.source) == path)
                && name.as_ref().is_none_or(|name| known.id.environment == *name)
        });
        match (fitting.next(), fitting.next()) {
            (Some(only), None) => Ok(only.id),
            _ => Err(problems.into()),
        }
    }
}

/// The parts of [`Deps`](crate::Deps) that a session takes.
pub(crate) struct World {
    pub(crate) version: &'static str,
    pub(crate) cwd: PathBuf,
    pub(crate) env: Variables,
    pub(crate) now: WallClock,
    pub(crate) random: Random,
    pub(crate) server: Arc<dyn ServerControl>,
    pub(crate) system: Arc<dyn System>,
}

fn default_home(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let absolute = |name: &str| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
    // https://specifications.freedesktop.org/basedir-spec/latest/: state that should survive restarts.
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("orchestra"))
}

/// Whether a state directory has anything in it.
pub(crate) fn has_state(home: &Path) -> bool {
    match std::fs::read_dir(home) {
        Ok(mut entries) => entries.next().is_some(),
        // What may not be looked at is not as good as empty.
        Err(error) => error.kind() == std::io::ErrorKind::PermissionDenied,
    }
}

/// The last lines of a log; none if it cannot be read.
fn last_lines(log: &Path) -> Vec<String> {
    const BYTES: u64 = 4096;
    const LINES: usize = 8;
    let mut tail = Vec::new();
    let read = File::open(log).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        file.take(BYTES).read_to_end(&mut tail)
    });
    if read.is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&tail);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].iter().map(|line| (*line).to_owned()).collect()
}

/// Why a server that was started in the background ended, if it could say so: the last line of JSON with errors in it.
fn errors_of(ended: &Ended) -> Vec<Diagnostic> {
    ended
        .last_words
        .lines()
        .rev()
        .find_map(|line| Some(serde_json::from_str::<ErrorBody>(line).ok()?.errors))
        .unwrap_or_default()
}

/// A server ended before it answered: its own errors, or if it had none to say the end of its log.
fn could_not_start(ended: &Ended, errors: Vec<Diagnostic>, log: &Path) -> Vec<Diagnostic> {
    let log_note = format!("the log of the server: {}", log.display());
    if errors.is_empty() {
        let diagnostic =
            Diagnostic::error(Code::SERVER_UNREACHABLE, format!("the server ended at once ({})", ended.status))
                .note(log_note)
                .help(if ended.killed {
                    "somebody killed it, or the system did for want of memory; repeat the command"
                } else {
                    "look for the reason with `orchestra doctor`"
                });
        return vec![with_notes(diagnostic, last_lines(log))];
    }
    errors.into_iter().map(|error| error.note(log_note.clone())).collect()
}

fn with_notes(mut diagnostic: Diagnostic, notes: Vec<String>) -> Diagnostic {
    diagnostic.notes.extend(notes);
    diagnostic
}
