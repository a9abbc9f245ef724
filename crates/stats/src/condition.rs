//! Conditions on measured numbers: `result >= 0.95`, `result > 0.5 && result[1] < 200`.
//!
//! ```text
//!   or         = and { "||" and }
//!   and        = not { "&&" not }
//!   not        = "!" not | "(" or ")" | comparison
//!   comparison = operand ( "<" | "<=" | ">" | ">=" | "==" | "!=" ) operand
//!   operand    = "result" [ "[" digits "]" ] | [ "-" ] number [ "%" ]
//! ```
//!
//! `result` is the first number that the source returned. The syntax is the part of Argo Rollouts' conditions that
//! scalar metrics use, so that such conditions can be taken over as they are.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The longest condition, in bytes.
pub const MAX_LENGTH: usize = 512;

/// The deepest nesting of `(` and `!`.
const MAX_DEPTH: u32 = 32;

/// A parsed condition; serialised as its text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Condition {
    text: String,
    root: Node,
}

/// What is wrong with a condition, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}, at character {}", at + 1)]
pub struct ConditionError {
    /// Offset in bytes.
    pub at: usize,
    /// What is wrong.
    pub problem: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Or(Vec<Node>),
    And(Vec<Node>),
    Not(Box<Node>),
    Compare(Operand, Operator, Operand),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operand {
    Number(f64),
    Result(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    Equal,
    NotEqual,
}

impl Condition {
    /// The text it was parsed from.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it holds for `results`. `None`: a number that it asks for is missing or NaN, so nothing is known.
    pub fn holds(&self, results: &[f64]) -> Option<bool> {
        self.root.holds(results)
    }
}

impl Node {
    fn holds(&self, results: &[f64]) -> Option<bool> {
        match self {
            // Every part is asked: whether there is data must not depend on the order of the parts.
            Self::Or(parts) => all(parts, results).map(|held| held.contains(&true)),
            Self::And(parts) => all(parts, results).map(|held| !held.contains(&false)),
            Self::Not(part) => part.holds(results).map(|held| !held),
            Self::Compare(left, operator, right) => {
                let (left, right) = (left.value(results)?, right.value(results)?);
                #[expect(clippy::float_cmp, reason = "the user wrote ==")]
                Some(match operator {
                    Operator::Less => left < right,
                    Operator::LessEqual => left <= right,
                    Operator::Greater => left > right,
                    Operator::GreaterEqual => left >= right,
                    Operator::Equal => left == right,
                    Operator::NotEqual => left != right,
                })
            }
        }
    }
}

fn all(parts: &[Node], results: &[f64]) -> Option<Vec<bool>> {
    parts.iter().map(|part| part.holds(results)).collect()
}

impl Operand {
    fn value(self, results: &[f64]) -> Option<f64> {
        match self {
            Self::Number(number) => Some(number),
            Self::Result(at) => results.get(at).copied().filter(|it| !it.is_nan()),
        }
    }
}

// === impl parsing ===

impl FromStr for Condition {
    type Err = ConditionError;

    fn from_str(text: &str) -> Result<Self, ConditionError> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        if text.len() > MAX_LENGTH {
            return Err(ConditionError { at: MAX_LENGTH, problem: format!("longer than {MAX_LENGTH} bytes") });
        }
        let root = parser.or()?;
        parser.space();
        if parser.at < text.len() {
            return Err(parser.error("expected `&&`, `||` or the end"));
        }
        Ok(Self { text: text.to_owned(), root })
    }
}

impl TryFrom<String> for Condition {
    type Error = ConditionError;
    fn try_from(text: String) -> Result<Self, ConditionError> {
        text.parse()
    }
}

impl From<Condition> for String {
    fn from(condition: Condition) -> Self {
        condition.text
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    /// Whether `token` comes next; if so it is taken.
    fn take(&mut self, token: &str) -> bool {
        self.space();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn error(&self, problem: &str) -> ConditionError {
        let found = match self.rest().chars().next() {
            Some(found) => format!(", found `{found}`"),
            None => ", found the end".to_owned(),
        };
        ConditionError { at: self.at, problem: format!("{problem}{found}") }
    }

    fn or(&mut self) -> Result<Node, ConditionError> {
        let mut parts = vec![self.and()?];
        while self.take("||") {
            parts.push(self.and()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::Or(parts) })
    }

    fn and(&mut self) -> Result<Node, ConditionError> {
        let mut parts = vec![self.not()?];
        while self.take("&&") {
            parts.push(self.not()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::And(parts) })
    }

    fn not(&mut self) -> Result<Node, ConditionError> {
        if self.depth >= MAX_DEPTH {
            return Err(ConditionError { at: self.at, problem: format!("nested deeper than {MAX_DEPTH}") });
        }
        self.depth += 1;
        let node = if self.take("!") {
            Node::Not(Box::new(self.not()?))
        } else if self.take("(") {
            let inner = self.or()?;
            if !self.take(")") {
                return Err(self.error("expected `)`"));
            }
            inner
        } else {
            self.comparison()?
        };
        self.depth -= 1;
        Ok(node)
    }

    fn comparison(&mut self) -> Result<Node, ConditionError> {
        let left = self.operand()?;
        let Some(operator) = self.operator() else {
            return Err(self.error("expected `<`, `<=`, `>`, `>=`, `==` or `!=`"));
        };
        let right = self.operand()?;
        let chained = self.at;
        if self.operator().is_some() {
            let problem = "comparisons do not chain: write `a < b && b < c`".to_owned();
            return Err(ConditionError { at: chained, problem });
        }
        Ok(Node::Compare(left, operator, right))
    }

    fn operator(&mut self) -> Option<Operator> {
        const OPERATORS: [(&str, Operator); 6] = [
            ("<=", Operator::LessEqual),
            (">=", Operator::GreaterEqual),
            ("==", Operator::Equal),
            ("!=", Operator::NotEqual),
            ("<", Operator::Less),
            (">", Operator::Greater),
        ];
        OPERATORS.iter().find(|(token, _)| self.take(token)).map(|(_, operator)| *operator)
    }

    fn operand(&mut self) -> Result<Operand, ConditionError> {
        self.space();
        let word: usize = self.rest().chars().take_while(|it| it.is_ascii_alphanumeric() || *it == '_').count();
        if &self.rest()[..word] == "result" {
            self.at += word;
            return self.index().map(Operand::Result);
        }
        self.number().map(Operand::Number)
    }

    fn index(&mut self) -> Result<usize, ConditionError> {
        if !self.take("[") {
            return Ok(0);
        }
        self.space();
        let digits = self.rest().chars().take_while(char::is_ascii_digit).count();
        let Ok(index) = self.rest()[..digits].parse() else {
            return Err(self.error("expected the index of a result"));
        };
        self.at += digits;
        if self.take("]") { Ok(index) } else { Err(self.error("expected `]`")) }
    }

    fn number(&mut self) -> Result<f64, ConditionError> {
        let mut digits = 0;
        let bytes = self.rest().as_bytes();
        while digits < bytes.len() {
            let sign =
                matches!(bytes[digits], b'-' | b'+') && (digits == 0 || matches!(bytes[digits - 1], b'e' | b'E'));
            if !(bytes[digits].is_ascii_digit() || matches!(bytes[digits], b'.' | b'e' | b'E') || sign) {
                break;
            }
            digits += 1;
        }
        match self.rest()[..digits].parse::<f64>() {
            Ok(number) if number.is_finite() => {
                self.at += digits;
                Ok(if self.take("%") { number / 100.0 } else { number })
            }
            _ => Err(self.error("expected `result` or a number")),
        }
    }
}
