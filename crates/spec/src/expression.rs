//! `{{ … }}`: a path to a value of the stack, inside any text that says it allows one.
//!
//! The language is nothing but paths, such as `services.api.url`: no operators, no functions, no defaults. What can be
//! computed belongs into the program that reads the value. `{{{{` stands for a literal `{{`.

/// A piece of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece<'t> {
    Literal(&'t str),
    /// An expression: what stands between the braces, trimmed, and where its braces begin and end in the text.
    Path {
        path: &'t str,
        start: usize,
        end: usize,
    },
}

/// Why a text cannot be taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unclosed {
    /// Byte at which the `{{` stands.
    pub(crate) start: usize,
}

/// Takes a text apart, piece by piece. Adjacent literals are not joined; after an error nothing follows.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = Result<Piece<'_>, Unclosed>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
        let start = at;
        let literal = rest.find("{{").unwrap_or(rest.len());
        if literal > 0 {
            at += literal;
            return Some(Ok(Piece::Literal(&rest[..literal])));
        }
        if rest.starts_with("{{{{") {
            at += 4;
            return Some(Ok(Piece::Literal("{{")));
        }
        let Some(length) = rest[2..].find("}}") else {
            at = text.len();
            return Some(Err(Unclosed { start }));
        };
        at += length + 4;
        Some(Ok(Piece::Path { path: rest[2..length + 2].trim(), start, end: at }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Result<Vec<Piece<'_>>, Unclosed> {
        super::pieces(text).collect()
    }

    #[test]
    fn texts_come_apart_into_literals_and_paths() {
        assert_eq!(pieces("plain }} text").unwrap(), [Piece::Literal("plain }} text")]);
        assert_eq!(pieces("").unwrap(), []);
        assert_eq!(
            pieces("a{{ b.c }}d{{e}}").unwrap(),
            [
                Piece::Literal("a"),
                Piece::Path { path: "b.c", start: 1, end: 10 },
                Piece::Literal("d"),
                Piece::Path { path: "e", start: 11, end: 16 },
            ]
        );
        assert_eq!(
            pieces("{{{{ x }} é{{y}}").unwrap(),
            [Piece::Literal("{{"), Piece::Literal(" x }} é"), Piece::Path { path: "y", start: 12, end: 17 }]
        );
        assert_eq!(pieces("ab {{ c"), Err(Unclosed { start: 3 }));
        assert_eq!(pieces("{{{"), Err(Unclosed { start: 0 }));
    }
}
