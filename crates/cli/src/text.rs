//! Text that is safe to show, and the short forms of times.
//!
//! Names, messages and log lines come from programs that may be hostile: a control character could move the cursor, set
//! the window title or answer for the user, and a bidirectional override could make a line read differently from what
//! it says. Nothing of the kind reaches a terminal except where the user asked for raw bytes.

use std::{fmt::Write as _, time::Duration};

use orchestra_model::time::UnixMillis;
use unicode_width::UnicodeWidthChar;

/// Whether a character could do anything but occupy its cells.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{061C}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}'
            | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}')
}

fn escape(c: char, text: &mut String) {
    match c {
        '\t' => text.push_str("    "),
        '\n' => text.push_str("\\n"),
        '\r' => text.push_str("\\r"),
        '\u{1b}' => text.push_str("\\e"),
        c if (c as u32) < 0x100 => {
            let _ = write!(text, "\\x{:02x}", c as u32);
        }
        c => {
            let _ = write!(text, "\\u{{{:x}}}", c as u32);
        }
    }
}

/// One line that does nothing but show: control characters, bidirectional overrides and invisible characters are
/// written as escapes, a tab as four spaces.
pub fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_dangerous(c) {
            escape(c, &mut safe);
        } else {
            safe.push(c);
        }
    }
    safe
}

/// A line of output of a program: like [`printable`], but colours (SGR sequences) stay if `color`, and are dropped
/// otherwise. A line that sets colours ends with a reset.
pub(crate) fn log_line(bytes: &[u8], color: bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut rest: &str = text.strip_suffix('\n').map_or(&text, |text| text.strip_suffix('\r').unwrap_or(text));
    let mut safe = String::with_capacity(rest.len());
    let mut colored = false;
    while let Some(c) = rest.chars().next() {
        if let Some(length) = sgr(rest) {
            if color {
                safe.push_str(&rest[..length]);
                colored = true;
            }
            rest = &rest[length..];
            continue;
        }
        if is_dangerous(c) {
            escape(c, &mut safe);
        } else {
            safe.push(c);
        }
        rest = &rest[c.len_utf8()..];
    }
    if colored {
        safe.push_str("\x1b[0m");
    }
    safe
}

/// Length of the SGR sequence at the start of `text`: `ESC [ digits and ; m`, without the codes that hide text.
fn sgr(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\x1b[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    let conceals = parameters[..end].split(';').any(|code| code == "8");
    (end <= 32 && !conceals && parameters[end..].starts_with('m')).then_some(end + 3)
}

/// Cells that a text takes, counted character by character as [`cut`] does.
pub(crate) fn width(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// The text if it takes at most `cells`, else its beginning with `…` at the end.
pub(crate) fn cut(text: &str, cells: usize) -> String {
    if width(text) <= cells {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut used = 0;
    for c in text.chars() {
        let next = c.width().unwrap_or(0);
        if used + next + 1 > cells {
            break;
        }
        used += next;
        kept.push(c);
    }
    if cells > 0 {
        kept.push('…');
    }
    kept
}

/// The text on lines of at most `cells`, broken between words; all but the first are set in by two.
pub(crate) fn wrap(text: &str, cells: usize) -> Vec<String> {
    const INDENT: &str = "  ";
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.trim().is_empty() && width(&line) + 1 + width(word) > cells {
            lines.push(std::mem::replace(&mut line, INDENT.to_owned()));
        } else if !line.trim().is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    // A word that is longer than a line is the one thing that is cut.
    lines.iter().map(|line| cut(line, cells)).collect()
}

/// A length of time for people: `340ms`, `1.3s`, `42s`, `3m05s`, `2h10m`, `4d3h`.
pub fn age(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match milliseconds {
        0..1_000 => format!("{milliseconds}ms"),
        1_000..10_000 => format!("{seconds}.{}s", milliseconds % 1000 / 100),
        10_000..60_000 => format!("{seconds}s"),
        60_000..3_600_000 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600_000..86_400_000 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The time until `at`.
pub(crate) fn left(at: UnixMillis, now: UnixMillis) -> String {
    rest(Duration::from_millis(at.saturating_sub(now)))
}

/// A time that is left, rounded to what is shown of it: one that has just begun has all of it left.
pub(crate) fn rest(left: Duration) -> String {
    let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    age(match left {
        0..60_000 => left,
        60_000..3_600_000 => left + 500,
        _ => left.saturating_add(30_000),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_text_is_shown_and_not_obeyed() {
        assert_eq!(printable("a\x1b]0;owned\x07b\rc\u{202e}d\u{9b}31m"), "a\\e]0;owned\\x07b\\rc\\u{202e}d\\x9b31m");
        assert_eq!(printable("tab\there, ümläut 漢字"), "tab    here, ümläut 漢字");
    }

    #[test]
    fn logs_keep_colours_and_nothing_else() {
        assert_eq!(log_line(b"\x1b[1;31mred\x1b[0m\x1b[2J\n", true), "\x1b[1;31mred\x1b[0m\\e[2J\x1b[0m");
        assert_eq!(log_line(b"\x1b[1;31mred\x1b[0m \xff\r\n", false), "red \u{fffd}");
        assert_eq!(log_line(b"\x1b[8mhidden", true), "\\e[8mhidden");
        assert_eq!(log_line(b"\x1b[", true), "\\e[");
    }

    #[test]
    fn cutting_counts_cells() {
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("漢字漢字", 4), "漢…");
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abc", 0), "");
    }

    #[test]
    fn sentences_are_broken_between_words() {
        assert_eq!(wrap("a verdict is waited for", 11), ["a verdict", "  is waited", "  for"]);
        assert_eq!(wrap("short", 80), ["short"]);
        assert_eq!(wrap("", 10), [""]);
        assert_eq!(wrap("one incomprehensibility", 12), ["one", "  incompreh…"]);
    }

    #[test]
    fn times_are_short() {
        let ages = [0, 340, 1_340, 42_900, 185_000, 7_800_000, 356_400_000];
        assert_eq!(ages.map(age), ["0ms", "340ms", "1.3s", "42s", "3m05s", "2h10m", "4d03h"]);
    }

    proptest! {
        #[test]
        fn nothing_printable_has_control_characters(text in any::<String>()) {
            prop_assert!(!printable(&text).chars().any(is_dangerous));
            prop_assert!(!log_line(text.as_bytes(), false).chars().any(is_dangerous));
        }

        #[test]
        fn wrapped_text_fits_and_is_whole(words in prop::collection::vec("[a-zäß漢]{1,8}", 0..20), cells in 20usize..60) {
            let lines = wrap(&words.join(" "), cells);
            prop_assert!(lines.iter().all(|line| width(line) <= cells), "{lines:?}");
            let again: Vec<&str> = lines.iter().flat_map(|line| line.split_whitespace()).collect();
            prop_assert_eq!(again, words);
        }

        #[test]
        fn cut_text_fits(text in "\\PC{0,40}", cells in 0usize..50) {
            prop_assert!(width(&cut(&text, cells)) <= cells);
        }
    }
}
