//! `orchestra completions`

use crate::{
    args::{CompletionsArgs, command},
    exit::Exit,
    failure::Result,
    output::Output,
};

pub(crate) fn completions(args: &CompletionsArgs, output: &mut Output) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "orchestra", &mut script);
    output.bytes(&script)?;
    Ok(Exit::Success)
}
