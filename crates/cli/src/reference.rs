//! The reference pages that are made from code: every command, and every exit code.

use std::fmt::Write as _;

use orchestra_model::{Code, Diagnostic};

use crate::{args::command, exit::Exit};

/// Columns of the help texts in the reference.
const WIDTH: usize = 100;

/// `docs/reference/cli.md`
pub fn cli_reference() -> String {
    let mut text = String::from(
        "# Command line\n\nMade from the program by `cargo xtask cli-reference`. What the exit codes mean: [exit codes](exit-codes.md).\n",
    );
    let mut root = command().version("…").term_width(WIDTH);
    root.build();
    section(&root, 2, &mut text);
    text
}

fn section(command: &clap::Command, level: usize, text: &mut String) {
    if command.is_hide_set() {
        return;
    }
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let help = command.clone().term_width(WIDTH).render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = write!(text, "\n{} {name}\n\n```text\n{}\n```\n", "#".repeat(level), help.join("\n").trim_end());
    for subcommand in command.get_subcommands() {
        section(subcommand, if level == 2 { 3 } else { 4 }, text);
    }
}

/// `docs/reference/exit-codes.md`
pub fn exit_code_reference() -> String {
    let mut text = String::from(
        "# Exit codes\n\nMade from the program by `cargo xtask cli-reference`.\n\n| code | meaning |\n|---|---|\n",
    );
    for exit in Exit::ALL {
        let _ = writeln!(text, "| {} | {} |", exit.code(), exit.meaning());
    }
    text.push_str(
        "\nWhere a command ends with a diagnostic, its code decides. `orchestra explain CODE` prints the page of a code.\n\n| error | meaning | exit code |\n|---|---|---|\n",
    );
    for code in Code::ALL {
        let exit = Exit::of(&[Diagnostic::error(*code, "")]).code();
        let _ = writeln!(text, "| [{code}](../errors/{code}.md) | {} | {exit} |", code.title());
    }
    text.push_str(
        "\nA run that failed exits with 1 and one that was cancelled with 5, whatever its diagnostics are.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_the_reference_with_an_example() {
        let text = cli_reference();
        for subcommand in command().get_subcommands() {
            let heading = format!("\n### orchestra {}\n", subcommand.get_name());
            let (_, section) = text.split_once(&heading).unwrap_or_else(|| panic!("{heading} is missing"));
            let section = section.split("\n### ").next().unwrap();
            assert!(section.contains("Examples:"), "{heading} has no example");
        }
    }

    #[test]
    fn the_checked_in_references_are_current() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/");
        for (file, text) in [("cli.md", cli_reference()), ("exit-codes.md", exit_code_reference())] {
            let checked_in = std::fs::read_to_string(format!("{root}{file}")).unwrap();
            assert!(checked_in == text, "docs/reference/{file} is stale: run `cargo xtask cli-reference`");
        }
    }
}
