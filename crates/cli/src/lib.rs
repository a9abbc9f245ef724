//! The command line: arguments, rendering and exit codes over the API, and nothing else.
//!
//! [`run`] takes the arguments and everything it may touch as [`Deps`]; it reads no environment variable, opens no
//! terminal and starts no process by itself. What it knows of an environment it knows from the API; only stack files,
//! saved plans and the machine that `doctor` looks at are read directly.

mod args;
mod commands;
mod deps;
mod diff;
mod exit;
mod failure;
mod follow;
mod machine;
mod output;
mod patience;
mod process;
mod progress;
mod reference;
mod run;
mod saved_plan;
mod screen;
mod session;
mod source;
mod table;
mod text;
mod trust;

pub use args::command;
pub use deps::{
    Deps, Ended, Random, ServerControl, ServerOptions, Serving, Spawned, System, Terminal, Variables, WallClock,
};
pub use exit::Exit;
pub use reference::{cli_reference, exit_code_reference};
pub use run::run;
pub use screen::Palette;
pub use text::{age, printable};
