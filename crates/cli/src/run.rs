//! The entry: arguments in, exit code out.

use std::{ffi::OsString, io::Write};

use orchestra_model::Diagnostic;

use crate::{
    args::{self, Cli, ColorChoice, Command},
    commands,
    deps::Deps,
    exit::Exit,
    failure::{Failure, Result},
    follow::Interrupts,
    output::Output,
    screen::Palette,
    session::{Session, World},
};

/// Runs one command. `arguments` begin with the program's name. Everything is written before it returns.
pub async fn run<I>(arguments: I, deps: Deps) -> Exit
where
    I: IntoIterator<Item = OsString>,
{
    let Deps { version, cwd, env, mut stdout, mut stderr, terminal, now, random, interrupts, server, system } = deps;
    let columns = (terminal.size)().map_or(100, |(columns, _)| usize::from(columns).clamp(40, 120));
    let no_color = env("NO_COLOR").is_some_and(|value| !value.is_empty());
    let (cli, file) = match args::parse(arguments, columns, version) {
        Ok(parsed) => parsed,
        Err(error) => {
            let on_terminal = if error.use_stderr() { terminal.stderr } else { terminal.stdout };
            let text = error.render();
            let text = if on_terminal && !no_color { text.ansi().to_string() } else { text.to_string() };
            let writer = if error.use_stderr() { &mut stderr } else { &mut stdout };
            let _ = writer.write_all(text.as_bytes()).and_then(|()| writer.flush());
            return if error.use_stderr() { Exit::Invalid } else { Exit::Success };
        }
    };
    let color = |is_terminal: bool| match cli.global.color {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => is_terminal && !no_color,
    };
    let mut output = Output {
        palette: Palette { color: color(terminal.stdout) },
        error_palette: Palette { color: color(terminal.stderr) },
        stdout,
        stderr,
        terminal,
        json: cli.global.json,
        quiet: cli.global.quiet,
        verbose: cli.global.verbose,
    };
    let mut interrupts = Interrupts(interrupts);
    let result = match Session::new(&cli.global, file, World { version, cwd, env, now, random, server, system }) {
        Ok(session) => dispatch(cli, &session, &mut output, &mut interrupts).await,
        Err(failure) => Err(failure),
    };
    let exit = match result {
        Ok(exit) | Err(Failure::Silent(exit)) => exit,
        Err(Failure::OutputClosed) => Exit::Success,
        Err(Failure::Told(diagnostics)) => {
            tell(&mut output, &diagnostics);
            Exit::of(&diagnostics)
        }
    };
    let _ = output.stdout.flush();
    let _ = output.stderr.flush();
    exit
}

fn tell(output: &mut Output, diagnostics: &[Diagnostic]) {
    if output.json {
        let _ = output.ndjson(&serde_json::json!({"errors": diagnostics}));
    } else {
        output.diagnostics(diagnostics);
    }
}

async fn dispatch(cli: Cli, session: &Session, output: &mut Output, interrupts: &mut Interrupts) -> Result<Exit> {
    // Runs take Ctrl-C as a wish to cancel; every other command simply ends.
    match cli.command {
        Command::Up(args) => commands::runs::up(&args, session, output, interrupts).await,
        Command::Down(args) => commands::runs::down(&args, session, output, interrupts).await,
        Command::Restart(args) => commands::runs::restart(&args, session, output, interrupts).await,
        Command::Scale(args) => commands::runs::scale(&args, session, output, interrupts).await,
        Command::Rollback(args) => commands::runs::rollback(&args, session, output, interrupts).await,
        // The server has its own way to stop.
        Command::Server(args) => commands::server::server(&args.command, session, output, interrupts).await,
        command => interrupts.guard(simple(command, session, output)).await,
    }
}

async fn simple(command: Command, session: &Session, output: &mut Output) -> Result<Exit> {
    match command {
        Command::Init(args) => commands::init::init(&args, session, output),
        Command::Validate(args) => commands::plan::validate(&args, session, output).await,
        Command::Plan(args) => commands::plan::plan(&args, session, output).await,
        Command::Environments(args) => commands::environments::environments(&args, session, output).await,
        Command::Status(args) => commands::status::status(&args, session, output).await,
        Command::Logs(args) => commands::logs::logs(&args, session, output).await,
        Command::Events(args) => commands::events::events(&args, session, output).await,
        Command::Promote(args) => commands::rollout::promote(&args, session, output).await,
        Command::Pause(args) => commands::rollout::pause(&args, session, output).await,
        Command::Abort(args) => commands::rollout::abort(&args, session, output).await,
        Command::Why(args) => commands::rollout::why(&args, session, output).await,
        Command::Traffic(args) => commands::traffic::traffic(&args, session, output).await,
        Command::Flags(args) => commands::flags::flags(&args, session, output).await,
        Command::History(args) => commands::history::history(&args, session, output).await,
        Command::Show(args) => commands::history::show(&args, session, output).await,
        Command::Explain(args) => commands::explain::explain(&args, output),
        Command::Tls(args) => commands::tls::tls(&args.command, session, output).await,
        Command::Doctor => commands::doctor::doctor(session, output).await,
        Command::Completions(args) => commands::completions::completions(&args, output),
        Command::Up(_)
        | Command::Down(_)
        | Command::Restart(_)
        | Command::Scale(_)
        | Command::Rollback(_)
        | Command::Server(_) => unreachable!("dispatched above"),
    }
}
