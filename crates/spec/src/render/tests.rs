use orchestra_model::diagnostic::{Code, Diagnostic, Location};

use super::*;

fn place(line: u32, column: u32, length: u32, source: &str) -> Location {
    Location { file: "orchestra.yaml".into(), line, column, length, source: source.into() }
}

#[test]
fn draws_code_place_line_underline_labels_notes_and_help() {
    let diagnostic = Diagnostic::error(Code::DUPLICATE_KEY, "the key `api` appears twice")
        .at(place(12, 3, 3, "  api:"), "again here")
        .at(place(5, 3, 3, "  api:"), "first here")
        .note("first note\nsecond line of it")
        .help("delete one");
    let drawn = render_text(&[diagnostic.clone(), Diagnostic::warning(Code::INTERNAL, "no place")], false);
    assert_eq!(
        drawn,
        "error[ORC0104]: the key `api` appears twice\n  --> orchestra.yaml:12:3\n   |\n 5 |   api:\n   |   --- first here\n\
         ...\n12 |   api:\n   |   ^^^ again here\n   |\n   = note: first note\n           second line of it\n   = help: delete one\n\
         \nwarning[ORC0899]: no place\n"
    );
    let colored = render_text(&[diagnostic], true);
    assert!(colored.contains("\x1b[1;31merror[ORC0104]\x1b[0m"), "{colored:?}");
}

#[test]
fn underlines_stay_under_their_text_with_tabs_and_wide_characters() {
    let drawn = render_text(&[Diagnostic::error(Code::UNKNOWN_KEY, "x").at(place(1, 5, 2, "\t日本 ab"), "")], false);
    let lines: Vec<&str> = drawn.lines().collect();
    assert_eq!(lines[3], "1 |     日本 ab");
    // Four columns of tab, four of two wide characters, one space.
    assert_eq!(lines[4], "  |          ^^");
}

#[test]
fn nothing_from_outside_reaches_the_terminal_unescaped() {
    let hostile = "a\x1b[2J\u{202E}b\r\u{9b}c";
    let diagnostic =
        Diagnostic::error(Code::UNKNOWN_KEY, hostile).at(place(1, 2, 1, hostile), hostile).note(hostile).help(hostile);
    let drawn = render_text(&[diagnostic], false);
    assert!(drawn.chars().all(|c| c == '\n' || !hidden(c)), "{drawn:?}");
    assert!(drawn.contains("a<U+001B>[2J<U+202E>b<U+000D><U+009B>c"), "{drawn}");
}

#[test]
fn long_lines_are_drawn_as_a_window_around_the_label() {
    let source = format!("{}KEY{}", "a".repeat(200), "b".repeat(197));
    let drawn = render_text(&[Diagnostic::error(Code::UNKNOWN_KEY, "x").at(place(1, 201, 3, &source), "")], false);
    let lines: Vec<&str> = drawn.lines().collect();
    assert!(lines[3].chars().count() < 130, "{drawn}");
    let column = lines[4].find('^').unwrap();
    let shown: String = lines[3].chars().skip(column).take(3).collect();
    assert_eq!(shown, "KEY");
    // Beyond the part of the line that a location keeps.
    let drawn = render_text(&[Diagnostic::error(Code::UNKNOWN_KEY, "x").at(place(1, 9000, 3, &source), "")], false);
    assert!(drawn.contains("orchestra.yaml:1:9000") && drawn.lines().nth(3).unwrap().ends_with('…'), "{drawn}");
}
