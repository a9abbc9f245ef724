//! Chores of the repository: `cargo xtask layers`, `openapi`, `schema`, `cli-reference`, and `check` for all of them.
//!
//! Documents that are made from code are checked in, so that a change of them is reviewed; `--check` compares and writes
//! nothing.

mod documents;
mod layers;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

const USAGE: &str = "\
usage: cargo xtask COMMAND [--check]

  layers         check the layer table and the length of files
  openapi        write api/openapi.json
  schema         write schema/orchestra.schema.json
  cli-reference  write docs/reference/cli.md and docs/reference/exit-codes.md
  check          layers, and every document with --check
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let root = root();
    let problems = match arguments[..] {
        ["layers"] => layers::check(&root),
        ["openapi"] => documents::openapi().write(&root),
        ["openapi", "--check"] => documents::openapi().check(&root),
        ["schema"] => documents::schema().write(&root),
        ["schema", "--check"] => documents::schema().check(&root),
        ["cli-reference"] => documents::each(&documents::cli_reference(), |document| document.write(&root)),
        ["cli-reference", "--check"] => documents::each(&documents::cli_reference(), |document| document.check(&root)),
        ["check"] => {
            [layers::check(&root), documents::each(&documents::all(), |document| document.check(&root))].concat()
        }
        _ => {
            let _ = std::io::stderr().write_all(USAGE.as_bytes());
            return ExitCode::from(2);
        }
    };
    for problem in &problems {
        let _ = writeln!(std::io::stderr(), "error: {problem}");
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The folder of the workspace: this package lies in it.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}
