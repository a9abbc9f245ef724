//! Every fixture in `fixtures/bad` has its drawn diagnostics as a snapshot, every one in `good` its desired state.

use orchestra_spec::render_text;

use crate::{errors, fixtures, load_bytes};

#[test]
fn bad_files_are_explained() {
    let fixtures = fixtures("bad");
    assert!(fixtures.len() >= 40, "only {} fixtures", fixtures.len());
    for (name, text) in fixtures {
        let Err(errors) = load_bytes(text.as_bytes()) else { panic!("{name} was accepted") };
        for error in &errors {
            assert!(!error.labels.is_empty(), "{name}: {error} has no place");
            assert!(error.help.is_some() || !error.notes.is_empty() || error.message.len() > 20, "{name}: {error}");
        }
        insta::assert_snapshot!(format!("bad__{name}"), render_text(&errors, false));
    }
}

#[test]
fn good_files_are_understood() {
    for (name, text) in fixtures("good") {
        let loaded = match load_bytes(text.as_bytes()) {
            Ok(loaded) => loaded,
            Err(errors) => panic!("{name}:\n{}", render_text(&errors, false)),
        };
        assert_eq!(loaded.warnings, [], "{name}");
        insta::assert_json_snapshot!(format!("good__{name}"), loaded.desired);
    }
}

#[test]
fn errors_come_in_the_order_of_their_lines_with_codes_that_have_pages() {
    for (name, text) in fixtures("bad") {
        let errors = errors(text.as_bytes());
        let lines: Vec<u32> = errors.iter().map(|error| error.labels[0].location.line).collect();
        assert!(lines.is_sorted(), "{name}: {lines:?}");
    }
}
