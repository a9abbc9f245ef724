//! One binary: fixtures and their golden output, the JSON Schema against both, hostile input, laws.

mod consult;
mod fixtures;
mod flags;
mod hostile;
mod interpolation;
mod laws;
mod ports;
mod previews;
mod reference;
mod scaling;
mod secrets;
mod values;

use std::path::PathBuf;

use orchestra_model::Diagnostic;
use orchestra_spec::{Context, Loaded, Source, load, render_text};

/// The context of all tests.
pub(crate) fn context(environment: Option<&str>) -> Context {
    Context {
        directory: "/srv/demo".to_owned(),
        volumes: "/state/volumes".to_owned(),
        environment: environment.map(|name| name.parse().unwrap()),
        preview: None,
    }
}

pub(crate) fn load_bytes(bytes: &[u8]) -> Result<Loaded, Vec<Diagnostic>> {
    load(Source { path: "orchestra.yaml", bytes }, &context(None))
}

/// Loads what must be right.
pub(crate) fn loaded(text: &str) -> Loaded {
    load_bytes(text.as_bytes()).unwrap_or_else(|errors| panic!("{}\n{text}", render_text(&errors, false)))
}

/// Loads what must be wrong.
pub(crate) fn errors(bytes: &[u8]) -> Vec<Diagnostic> {
    let errors = load_bytes(bytes).expect_err("the file must be refused");
    assert!(!errors.is_empty());
    errors
}

/// Fixtures of one folder: name without extension, and text.
pub(crate) fn fixtures(folder: &str) -> Vec<(String, String)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures").join(folder);
    let mut fixtures: Vec<(String, String)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    fixtures.sort();
    fixtures
}
