//! Brings the schema of the agents' database up to date, says what it did, and ends.
//!
//! Environment: `DATA_DIR`.

use std::process::ExitCode;

use orchestra_quickstart::{
    serve::{log, run},
    settings,
    store::{MIGRATIONS, Store},
};

fn main() -> ExitCode {
    run(async {
        let path = settings::database()?;
        log(format_args!("database {}", path.display()));
        let mut steps = 0;
        let version = Store::open(&path)?.migrate(|step, name| {
            steps += 1;
            log(format_args!("step {step} of {}: {name}", MIGRATIONS.len()));
        })?;
        if steps == 0 {
            log(format_args!("the schema has version {version} already; nothing to do"));
        } else {
            log(format_args!("the schema has version {version} now"));
        }
        Ok(())
    })
}
