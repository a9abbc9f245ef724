//! The tools that workers run for the agent. Pure: what comes out depends on what goes in.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Runs a tool. An error is a result too: the agent says so.
pub fn run(tool: &str, input: &Value) -> Value {
    let text = input["text"].as_str().unwrap_or_default();
    match tool {
        "calculate" => match calculate(text) {
            Ok(value) => json!({ "expression": text, "value": value }),
            Err(reason) => json!({ "expression": text, "error": reason }),
        },
        "keywords" => json!({ "keywords": keywords(text, 3) }),
        "recall" => {
            let lines: Vec<&str> = input["lines"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let words: usize = lines.iter().map(|line| line.split_whitespace().count()).sum();
            json!({ "messages": lines.len(), "words": words, "keywords": keywords(&lines.join(" "), 4) })
        }
        other => json!({ "error": format!("there is no tool {other}") }),
    }
}

/// The part of a message that is arithmetic, if there is any.
pub fn expression(message: &str) -> Option<&str> {
    let is_part = |c: char| c.is_ascii_digit() || "+-*/(). ".contains(c);
    message
        .split(|c| !is_part(c))
        .map(|part| part.trim_matches(|c| c == ' ' || c == '.'))
        .filter(|part| part.contains(['+', '-', '*', '/']) && part.chars().filter(char::is_ascii_digit).count() >= 2)
        .max_by_key(|part| part.len())
}

const COMMON: [&str; 44] = [
    "about", "after", "again", "also", "because", "been", "before", "could", "does", "from", "have", "hello", "help",
    "here", "into", "just", "know", "like", "make", "more", "need", "please", "should", "some", "tell", "than",
    "thank", "that", "their", "them", "then", "there", "they", "thing", "this", "what", "when", "where", "which",
    "will", "with", "would", "your", "you",
];

/// The words that matter most: long ones that come often; ties go to the one that came first.
pub fn keywords(text: &str, most: usize) -> Vec<String> {
    let mut seen = BTreeMap::<String, (usize, usize)>::new();
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| word.chars().count() >= 4);
    for (place, word) in words.enumerate() {
        let word = word.to_lowercase();
        if !COMMON.contains(&word.as_str()) {
            seen.entry(word).or_insert((0, place)).0 += 1;
        }
    }
    let mut words: Vec<_> = seen.into_iter().collect();
    words.sort_by_key(|(_, (count, place))| (std::cmp::Reverse(*count), *place));
    words.into_iter().take(most).map(|(word, _)| word).collect()
}

/// The value of an expression of numbers, `+ - * /` and parentheses.
pub fn calculate(text: &str) -> Result<f64, String> {
    let mut parser = Parser { rest: text, depth: 0 };
    let value = parser.sum()?;
    match parser.peek() {
        None if value.is_finite() => Ok(value),
        None => Err("the result is not a number".to_owned()),
        Some(c) => Err(format!("unexpected {c:?}")),
    }
}

struct Parser<'a> {
    rest: &'a str,
    depth: u32,
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.rest = &self.rest[wanted.len_utf8()..];
        }
        found
    }

    fn sum(&mut self) -> Result<f64, String> {
        let mut value = self.product()?;
        loop {
            if self.take('+') {
                value += self.product()?;
            } else if self.take('-') {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<f64, String> {
        let mut value = self.factor()?;
        loop {
            if self.take('*') {
                value *= self.factor()?;
            } else if self.take('/') {
                value /= self.factor()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn factor(&mut self) -> Result<f64, String> {
        self.depth += 1;
        if self.depth > 64 {
            return Err("nested too deeply".to_owned());
        }
        let value = if self.take('-') {
            -self.factor()?
        } else if self.take('(') {
            let value = self.sum()?;
            if !self.take(')') {
                return Err("a parenthesis is not closed".to_owned());
            }
            value
        } else {
            self.peek();
            let end = self.rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(self.rest.len());
            let (number, rest) = self.rest.split_at(end);
            self.rest = rest;
            number.parse().map_err(|_| "a number is missing".to_owned())?
        };
        self.depth -= 1;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic() {
        assert_eq!(expression("what is 12 * (7 + 1)?"), Some("12 * (7 + 1)"));
        assert_eq!(expression("call me at 5"), None);
        assert_eq!(calculate("12 * (7 + 1) - 6 / 4"), Ok(94.5));
        assert_eq!(calculate("--2-3"), Ok(-1.0));
        for wrong in ["1 +", "(1", "1 2", "1 / 0", "1..2 + 3", &"(".repeat(100), &"-".repeat(100_000)] {
            assert!(calculate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn words_that_matter() {
        let text = "The invoice arrived, but the invoice total is wrong. Please refund the shipping.";
        assert_eq!(keywords(text, 3), ["invoice", "arrived", "total"]);
        let recalled = run("recall", &json!({"lines": ["refund my order", "the order is late"]}));
        assert_eq!(recalled, json!({"messages": 2, "words": 7, "keywords": ["order", "refund", "late"]}));
        assert!(run("teleport", &json!({}))["error"].is_string());
    }
}
