//! Colours by meaning, so that no screen names an escape sequence.

/// Colours, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Palette {
    /// Whether to colour at all.
    pub color: bool,
}

impl Palette {
    /// No colours.
    pub const PLAIN: Self = Self { color: false };

    fn paint(self, code: &str, text: &str) -> String {
        if self.color && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// As it should be.
    pub(crate) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// On its way, or worth a look.
    pub(crate) fn busy(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Wrong.
    pub(crate) fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// Of less importance.
    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// A heading.
    pub(crate) fn strong(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// One of several colours that tell things apart.
    pub(crate) fn distinct(self, index: usize, text: &str) -> String {
        const CODES: [&str; 6] = ["36", "35", "34", "32", "33", "31"];
        self.paint(CODES[index % CODES.len()], text)
    }
}
