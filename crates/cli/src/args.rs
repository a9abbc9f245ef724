//! The command line's grammar. Every command says by example how it is used.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf};

use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use orchestra_model::{
    EnvironmentId, InstanceId, Name, ReleaseNumber, ResourceId,
    flag::{FlagName, VariantName},
    id::ParseIdError,
    quantity::{ParseQuantityError, Timespan},
};

/// Turn one stack file into a running AI platform.
#[derive(Debug, Parser)]
#[command(
    name = "orchestra",
    bin_name = "orchestra",
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 invalid command line or stack file, 3 no server, 4 refused,\n\
                  5 cancelled, 10 changes (plan --exit-code), 130 interrupted.\n\
                  Start with: orchestra init && orchestra up"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[expect(clippy::doc_markdown, reason = "these are help texts, which nobody renders as Markdown")]
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// Environment, as NAME or STACK/NAME [default: what the stack file says]
    #[arg(short, long, global = true, value_name = "ENVIRONMENT")]
    pub(crate) env: Option<EnvironmentArg>,
    /// State directory [env: ORCHESTRA_HOME] [default: ~/.local/state/orchestra]
    #[arg(long, global = true, value_name = "FOLDER")]
    pub(crate) home: Option<PathBuf>,
    /// Server to talk to, `unix:/path` or `http://host:port`, instead of the one of the state directory [env: ORCHESTRA_SERVER]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) server: Option<String>,
    /// File with the token for a server over TCP [env: ORCHESTRA_TOKEN has the token itself]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) token_file: Option<PathBuf>,
    /// Print JSON: one value, or one per line for what goes on. Errors as {"errors": […]}
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Colours; `auto` means on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", hide_default_value = true)]
    pub(crate) color: ColorChoice,
    /// Say nothing but what was asked for
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Say more
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
}

/// When to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    Auto,
    Always,
    Never,
}

/// `NAME` or `STACK/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EnvironmentArg {
    Name(Name),
    Full(EnvironmentId),
}

impl std::str::FromStr for EnvironmentArg {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if text.contains('/') { text.parse().map(Self::Full) } else { text.parse().map(Self::Name) }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a commented stack file to start from
    #[command(
        after_help = "Examples:\n  orchestra init               # orchestra.yaml here\n  orchestra init my-platform   # in a new folder"
    )]
    Init(InitArgs),
    /// Check the stack file, in every environment that it defines or in the one that `--env` names
    #[command(
        after_help = "Examples:\n  orchestra validate\n  orchestra validate -e production\n  orchestra validate -e preview-42 --from production\n  orchestra validate -f other.yaml --json"
    )]
    Validate(ValidateArgs),
    /// Show what `up` would do; changes nothing
    #[command(
        after_help = "Examples:\n  orchestra plan\n  orchestra plan --out next.plan && orchestra up --plan next.plan\n  orchestra plan --exit-code > /dev/null   # 10 if there are changes\n  orchestra plan --down --volumes"
    )]
    Plan(PlanArgs),
    /// Make the environment what the stack file says, and wait until everything is ready
    #[command(
        after_help = "If it fails or is cancelled (Ctrl-C), what it changed is put back.\n\nExamples:\n  orchestra up\n  orchestra up -e production\n  orchestra up -e preview-42 --from production --ttl 24h\n  orchestra up --plan next.plan\n  orchestra up --json | jq ."
    )]
    Up(UpArgs),
    /// Show what runs, what is ready, and what the rest waits for
    #[command(
        after_help = "Examples:\n  orchestra status\n  orchestra status --watch      # goes on when the server is replaced; does not start it\n  orchestra status --all\n  orchestra status --json | jq '.services[].addresses'"
    )]
    Status(StatusArgs),
    /// List environments, with the age and cost of previews
    #[command(
        visible_alias = "ls",
        after_help = "A preview is made with: orchestra up --env NAME --from ENVIRONMENT\n\nExamples:\n  orchestra environments\n  orchestra environments --all   # also what is down\n  orchestra environments --json | jq '.[] | select(.preview) | .id'"
    )]
    Environments(EnvironmentsArgs),
    /// Show what services and jobs wrote
    #[command(
        after_help = "Examples:\n  orchestra logs\n  orchestra logs -f api worker   # goes on when the server is replaced; does not start it\n  orchestra logs --since 5m --tail 100 api\n  orchestra logs --raw --instance api-r3-1 > api.log"
    )]
    Logs(LogsArgs),
    /// Show what happened and why
    #[command(
        after_help = "Examples:\n  orchestra events\n  orchestra events --follow      # goes on when the server is replaced; does not start it\n  orchestra events --resource service.api --tail 20"
    )]
    Events(EventsArgs),
    /// Replace the instances of services by new ones, without a failed request
    #[command(after_help = "Examples:\n  orchestra restart api\n  orchestra restart          # all services")]
    Restart(RestartArgs),
    /// Change how many instances services have
    #[command(after_help = "Examples:\n  orchestra scale api=3\n  orchestra scale api=3 worker=2")]
    Scale(ScaleArgs),
    /// Go back to an earlier release
    #[command(after_help = "Examples:\n  orchestra rollback         # to the one before\n  orchestra rollback --to 4")]
    Rollback(RollbackArgs),
    /// Go on with a rollout that waits, or with its next step
    #[command(
        after_help = "Examples:\n  orchestra promote            # every rollout of the run\n  orchestra promote api\n  orchestra promote api --full # no further step"
    )]
    Promote(PromoteArgs),
    /// Let a rollout take no further step until it is promoted
    #[command(after_help = "Examples:\n  orchestra pause\n  orchestra pause api")]
    Pause(PauseArgs),
    /// Turn a run back: every service returns to the release in force before
    #[command(after_help = "Examples:\n  orchestra abort")]
    Abort(AbortArgs),
    /// Say what a service waits for, and why it is as it is
    #[command(after_help = "Examples:\n  orchestra why api\n  orchestra why --json")]
    Why(WhyArgs),
    /// Let new requests to a service wait, and let them go on
    #[command(
        after_help = "What is in flight goes on. New requests wait at the stable address and go on when the pause ends.\n\nExamples:\n  orchestra traffic pause api --for 2m\n  orchestra traffic resume api"
    )]
    Traffic(TrafficArgs),
    /// Show feature flags and what everybody gets, or switch one
    #[command(
        after_help = "Examples:\n  orchestra flags\n  orchestra flags set new-editor on --reason \"for the demo\"\n  orchestra flags off new-editor --reason \"it loses drafts\"\n  orchestra flags clear new-editor     # its own rules apply again\n  orchestra flags --json | jq '.flags[] | {name, value}'"
    )]
    Flags(FlagsArgs),
    /// List releases, the newest first
    #[command(after_help = "Examples:\n  orchestra history\n  orchestra history --limit 5 --json")]
    History(HistoryArgs),
    /// Show a release, and what it changed
    #[command(
        after_help = "Examples:\n  orchestra show 4\n  orchestra show 4 --against 2\n  orchestra show 4 --json | jq .desired"
    )]
    Show(ShowArgs),
    /// Take the environment down
    #[command(after_help = "Examples:\n  orchestra down\n  orchestra down --volumes    # and delete its data")]
    Down(DownArgs),
    /// Explain an error code or a key of the stack file
    #[command(
        after_help = "Examples:\n  orchestra explain ORC0208\n  orchestra explain services.health.ready\n  orchestra explain            # all codes"
    )]
    Explain(ExplainArgs),
    /// Trust the development authority, or look at certificates
    #[command(
        after_help = "Ports with `tls: development` show certificates of an authority that belongs to the state directory.\nIt vouches for localhost, *.localhost, *.test, *.internal, *.local and private addresses, and for nothing else.\n\nExamples:\n  orchestra tls status\n  orchestra tls trust                   # as root; otherwise says what to do as root\n  orchestra tls trust --print > ca.pem  # for a browser, or another machine\n  orchestra tls untrust"
    )]
    Tls(TlsArgs),
    /// Look for what may stand in the way
    #[command(
        after_help = "Examples:\n  orchestra doctor\n  orchestra doctor --json | jq '.checks[] | select(.outcome != \"ok\")'"
    )]
    Doctor,
    /// Start, stop or look at the server; other commands start it by themselves
    #[command(
        after_help = "Examples:\n  orchestra server status\n  orchestra server stop          # instances and proxy go on\n  orchestra server run           # in the foreground\n  orchestra server install       # a systemd unit: all is there again after a reboot\n  orchestra server start --listen 127.0.0.1:7070 --token-file token"
    )]
    Server(ServerArgs),
    /// Print completions for a shell
    #[command(
        after_help = "Examples:\n  orchestra completions bash > /etc/bash_completion.d/orchestra\n  orchestra completions zsh > \"${fpath[1]}/_orchestra\"\n  orchestra completions fish > ~/.config/fish/completions/orchestra.fish"
    )]
    Completions(CompletionsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Folder to write into; made if it is not there
    #[arg(default_value = ".")]
    pub(crate) folder: PathBuf,
    /// Name of the stack [default: the folder's name]
    #[arg(long)]
    pub(crate) name: Option<Name>,
}

#[derive(Debug, Args)]
pub(crate) struct ValidateArgs {
    #[command(flatten)]
    pub(crate) preview: PreviewArgs,
}

/// Options of previews.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of previews")]
pub(crate) struct PreviewArgs {
    /// Make the environment of `--env` a preview of this one
    #[arg(long, value_name = "ENVIRONMENT")]
    pub(crate) from: Option<Name>,
    /// How long the preview stays from now on: `90m`, `24h`, `7d`, or `never` until it is taken down [default: as before, or what the stack file says]
    #[arg(long, value_name = "DURATION", value_parser = ttl)]
    pub(crate) ttl: Option<Timespan>,
    /// Whose the preview is, in words [default: the name of the user]
    #[arg(long, value_name = "TEXT")]
    pub(crate) owner: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EnvironmentsArgs {
    /// Also those that are down, and previews that were removed
    #[arg(short, long)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) preview: PreviewArgs,
    /// Save the plan for `up --plan`
    #[arg(long, value_name = "PATH")]
    pub(crate) out: Option<PathBuf>,
    /// Exit with 10 if there are changes
    #[arg(long)]
    pub(crate) exit_code: bool,
    /// Show what `down` would do
    #[arg(long)]
    pub(crate) down: bool,
    /// With --down: also delete managed volumes
    #[arg(long, requires = "down")]
    pub(crate) volumes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Detach {
    /// Return once the run was accepted
    #[arg(short, long)]
    pub(crate) detach: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Apply this plan of `plan --out`; refused if what it changes has changed since
    #[arg(long, value_name = "PATH", conflicts_with_all = ["file", "env", "from", "ttl", "owner"])]
    pub(crate) plan: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) preview: PreviewArgs,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Go on showing, whenever something changes
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// List all environments
    #[arg(short, long, conflicts_with = "watch")]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Only of these services and jobs
    pub(crate) workloads: Vec<Name>,
    /// Go on with what is being written
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last so many lines of each instance
    #[arg(short = 'n', long, value_name = "LINES")]
    pub(crate) tail: Option<u32>,
    /// Only what was written in this time before now: `90s`, `5m`, `2h`
    #[arg(long, value_name = "DURATION", value_parser = timespan)]
    pub(crate) since: Option<Timespan>,
    /// Only of this instance
    #[arg(long)]
    pub(crate) instance: Option<InstanceId>,
    /// Only of instances that were made for this release
    #[arg(long, value_parser = release)]
    pub(crate) release: Option<ReleaseNumber>,
    /// Only this stream
    #[arg(long)]
    pub(crate) stream: Option<Stream>,
    /// The bytes as they were written: no prefix, nothing made harmless
    #[arg(long, conflicts_with = "json")]
    pub(crate) raw: bool,
    /// With the time of each line
    #[arg(short = 't', long, conflicts_with = "raw")]
    pub(crate) timestamps: bool,
}

/// Output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last so many
    #[arg(short = 'n', long, value_name = "EVENTS")]
    pub(crate) tail: Option<u32>,
    /// Only after this sequence number
    #[arg(long, value_name = "SEQUENCE")]
    pub(crate) after: Option<u64>,
    /// Only about this resource and its instances, such as `service.api`
    #[arg(long)]
    pub(crate) resource: Option<ResourceId>,
}

#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    /// Services [default: all]
    pub(crate) services: Vec<Name>,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    /// SERVICE=REPLICAS, one or more
    #[arg(required = true, value_name = "SERVICE=REPLICAS", value_parser = replicas)]
    pub(crate) replicas: Vec<(Name, u32)>,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// Release to go back to [default: the last one that was in force before]
    #[arg(long, value_name = "RELEASE", value_parser = release)]
    pub(crate) to: Option<ReleaseNumber>,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Debug, Args)]
pub(crate) struct PromoteArgs {
    /// Service [default: all that are being rolled out]
    pub(crate) service: Option<Name>,
    /// Take no further step: give the new release everything
    #[arg(long)]
    pub(crate) full: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PauseArgs {
    /// Service [default: all that are being rolled out]
    pub(crate) service: Option<Name>,
}

#[derive(Debug, Args)]
pub(crate) struct AbortArgs {}

#[derive(Debug, Args)]
pub(crate) struct WhyArgs {
    /// Service [default: all]
    pub(crate) service: Option<Name>,
}

#[derive(Debug, Args)]
pub(crate) struct TrafficArgs {
    #[command(subcommand)]
    pub(crate) command: TrafficSubcommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrafficSubcommand {
    /// Let new requests wait; what is in flight goes on
    Pause {
        /// Service
        service: Name,
        /// When they go on by themselves; at most 1h
        #[arg(long = "for", value_name = "TIME", default_value = "5m", value_parser = timespan)]
        duration: Timespan,
    },
    /// Let them go on
    Resume {
        /// Service
        service: Name,
    },
}

#[derive(Debug, Args)]
pub(crate) struct TlsArgs {
    #[command(subcommand)]
    pub(crate) command: TlsCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TlsCommand {
    /// Let this machine trust certificates of the development authority
    Trust {
        /// Print the authority's certificate (PEM) and change nothing
        #[arg(long)]
        print: bool,
    },
    /// Let this machine trust them no longer
    Untrust,
    /// Show the authority, whether this machine trusts it, and the certificate of every port with TLS
    Status,
}

#[derive(Debug, Args)]
pub(crate) struct FlagsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<FlagsCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FlagsCommand {
    /// Give everybody one variant, whatever the flag's own rules say
    Set {
        /// Flag
        #[arg(value_name = "NAME")]
        flag: FlagName,
        /// Variant
        variant: VariantName,
        /// Why, for the people who will see it
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Turn a flag off: everybody gets its `off` variant
    Off {
        /// Flag
        #[arg(value_name = "NAME")]
        flag: FlagName,
        /// Why, for the people who will see it
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Take back what was laid over a flag: its own rules apply again
    Clear {
        /// Flag
        #[arg(value_name = "NAME")]
        flag: FlagName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// At most so many
    #[arg(short = 'n', long, value_name = "RELEASES")]
    pub(crate) limit: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Number of the release
    #[arg(value_parser = release)]
    pub(crate) release: ReleaseNumber,
    /// Compare with this release [default: the one before]
    #[arg(long, value_name = "RELEASE", value_parser = release)]
    pub(crate) against: Option<ReleaseNumber>,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Also delete managed volumes, with what is in them
    #[arg(long)]
    pub(crate) volumes: bool,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// A code such as ORC0208, or a key such as `services.health.ready`
    pub(crate) subject: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    #[command(subcommand)]
    pub(crate) command: ServerCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Start it in the background
    Start(ListenArgs),
    /// Say whether it runs
    Status(ServerStatusArgs),
    /// Stop it; instances and proxy go on
    Stop,
    /// Run it in the foreground until it is stopped
    Run(ListenArgs),
    /// Write a systemd unit, so that it and all environments are there again after a reboot
    #[command(
        after_help = "On its start the server recovers every environment and starts what should run.\n\nExamples:\n  orchestra server install           # of the machine for root, of the user for others\n  orchestra server install --print   # only look"
    )]
    Install(InstallArgs),
}

#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// Print the unit instead of writing it
    #[arg(long)]
    pub(crate) print: bool,
    /// For the systemd of the machine [default: for root]
    #[arg(long, conflicts_with = "user")]
    pub(crate) system: bool,
    /// For the systemd of the user [default: for everybody else]
    #[arg(long)]
    pub(crate) user: bool,
    /// Name of the unit; another one for each further state directory
    #[arg(long, default_value = "orchestra")]
    pub(crate) unit: Name,
    #[command(flatten)]
    pub(crate) listen: ListenArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ServerStatusArgs {
    /// Print its process id and nothing else, for scripts
    #[arg(long, conflicts_with = "json")]
    pub(crate) pid: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ListenArgs {
    /// Also listen on this TCP address; needs a token
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Shell
    pub(crate) shell: clap_complete::Shell,
}

fn ttl(text: &str) -> Result<Timespan, ParseQuantityError> {
    if text == "never" { Ok(Timespan::default()) } else { text.parse() }
}

fn timespan(text: &str) -> Result<Timespan, ParseQuantityError> {
    text.parse()
}

fn release(text: &str) -> Result<ReleaseNumber, String> {
    match text.parse::<u64>() {
        Ok(number) if number > 0 => Ok(ReleaseNumber(number)),
        _ => Err("releases are numbered from 1; `orchestra history` lists them".to_owned()),
    }
}

fn replicas(text: &str) -> Result<(Name, u32), String> {
    let (name, count) = text.split_once('=').ok_or("expected SERVICE=REPLICAS, such as `api=3`")?;
    let name = name.parse::<Name>().map_err(|error| error.to_string())?;
    let count = count.parse().map_err(|_| format!("`{count}` is not a number of replicas"))?;
    Ok((name, count))
}

/// Commands that read the stack file, or look for the environment that it names.
const WITH_FILE: [&str; 12] =
    ["validate", "plan", "up", "status", "logs", "events", "restart", "scale", "rollback", "history", "show", "down"];

/// The whole grammar, for completions and the reference.
///
/// `--file` is no global option of the parser, because `-f` is short for `--follow` where there is something to follow,
/// as people are used to.
pub fn command() -> clap::Command {
    let file = Arg::new("file")
        .long("file")
        .value_name("PATH")
        .value_parser(clap::value_parser!(PathBuf))
        .help_heading("Options of every command")
        .help("Stack file [default: orchestra.yaml here or in the nearest folder above]");
    let mut command = Cli::command().arg(file.clone().short('f'));
    for name in WITH_FILE {
        command = command.mut_subcommand(name, |command| {
            let follows = command.get_arguments().any(|arg| arg.get_short() == Some('f'));
            command.arg(if follows { file.clone() } else { file.clone().short('f') })
        });
    }
    command
}

/// Parses arguments, the program's name first. Also gives the value of `--file`.
pub(crate) fn parse<I>(arguments: I, width: usize, version: &'static str) -> Result<(Cli, Option<PathBuf>), clap::Error>
where
    I: IntoIterator<Item = OsString>,
{
    let mut command = command().version(version).term_width(width);
    let matches = command.try_get_matches_from_mut(arguments)?;
    let within = matches.subcommand().and_then(|(_, matches)| matches.try_get_one("file").ok().flatten());
    let file = within.or_else(|| matches.get_one::<PathBuf>("file")).cloned();
    Ok((Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?, file))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    fn parsed(line: &str) -> Result<(Cli, Option<PathBuf>), String> {
        parse(line.split(' ').map(OsString::from), 100, "0.0.0").map_err(|error| error.to_string())
    }

    #[test]
    fn the_grammar_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn f_is_file_or_follow() {
        let (cli, file) = parsed("orchestra -f a.yaml logs -f api").unwrap();
        assert_eq!(file, Some("a.yaml".into()));
        assert!(matches!(cli.command, Command::Logs(LogsArgs { follow: true, .. })));
        let (_, file) = parsed("orchestra logs --file b.yaml").unwrap();
        assert_eq!(file, Some("b.yaml".into()));
        for command in ["up", "plan", "status", "down --volumes", "scale a=1", "show 3"] {
            let (_, file) = parsed(&format!("orchestra {command} -f c.yaml")).unwrap();
            assert_eq!(file, Some("c.yaml".into()), "{command}");
        }
    }

    #[test]
    fn command_lines_that_are_valid() {
        for line in [
            "orchestra up",
            "orchestra up --json -e dev",
            "orchestra --home /tmp/x up -q",
            "orchestra up --plan p.json --detach",
            "orchestra plan --down --volumes --exit-code",
            "orchestra logs api worker --tail 10 --since 5m --release 3 --stream stderr -t",
            "orchestra logs --raw --instance api-r3-1",
            "orchestra events -f -n 3 --resource service.api",
            "orchestra scale api=3 worker=0",
            "orchestra rollback --to 2",
            "orchestra server start --listen 127.0.0.1:0 --token-file t",
            "orchestra completions zsh",
            "orchestra explain",
            "orchestra flags --json",
            "orchestra flags set new.Editor on --reason why",
            "orchestra flags off new-editor",
            "orchestra flags clear new-editor",
            "orchestra status --watch -e shop/production",
            "orchestra up -e preview-42 --from production --ttl 24h --owner ada",
            "orchestra plan -e preview-42 --from production --ttl never",
            "orchestra ls --all",
        ] {
            if let Err(error) = parsed(line) {
                panic!("{line}\n{error}");
            }
        }
    }

    #[test]
    fn command_lines_that_are_not() {
        let lines = [
            "orchestra",
            "orchestra upp",
            "orchestra up --plan p -f a.yaml",
            "orchestra plan --volumes",
            "orchestra scale",
            "orchestra scale api",
            "orchestra scale api=many",
            "orchestra scale API=1",
            "orchestra rollback --to 0",
            "orchestra logs --since 5",
            "orchestra logs --raw --json",
            "orchestra up -q -v",
            "orchestra up -e p --from production --ttl soon",
            "orchestra events --resource api",
            "orchestra status -e Dev",
        ];
        let mut table = String::new();
        for line in lines {
            let error = parsed(line).err().unwrap_or_else(|| panic!("{line} was accepted"));
            let first = error.lines().next().unwrap_or_default();
            let _ = writeln!(table, "{line}\n    {first}");
        }
        insta::assert_snapshot!(table);
    }
}
