//! The agent: what it does with a message and what it says. Small and deterministic, so that a change of its style or
//! release is visible and a stream can be checked word by word.

use serde_json::{Value, json};

use crate::{store::Message, tools};

/// How the agent talks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// In whole sentences.
    #[default]
    Calm,
    /// In few words.
    Brisk,
}

impl std::str::FromStr for Style {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "calm" => Ok(Self::Calm),
            "brisk" => Ok(Self::Brisk),
            _ => Err("the styles are calm and brisk".to_owned()),
        }
    }
}

impl std::fmt::Display for Style {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Calm => "calm",
            Self::Brisk => "brisk",
        })
    }
}

/// Highest number that it counts to.
const COUNT: u32 = 100_000;

/// What to do with a message before it is answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Call a tool.
    Call {
        /// Which.
        tool: &'static str,
        /// With what.
        input: Value,
    },
    /// Count to a number: a stream of known length.
    Count(u32),
}

/// Decides what to do with a message.
pub fn decide(history: &[Message], message: &str) -> Step {
    let lower = message.to_lowercase();
    if let Some(number) = lower.split("count to ").nth(1) {
        let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
        if let Ok(number) = digits.parse::<u32>() {
            return Step::Count(number.min(COUNT));
        }
    }
    if let Some(expression) = tools::expression(message) {
        return Step::Call { tool: "calculate", input: json!({ "text": expression }) };
    }
    if ["so far", "recall", "remember", "summar"].iter().any(|word| lower.contains(word)) {
        let lines: Vec<&str> = history.iter().filter(|m| m.role == "user").map(|m| m.text.as_str()).collect();
        return Step::Call { tool: "recall", input: json!({ "lines": lines }) };
    }
    Step::Call { tool: "keywords", input: json!({ "text": message }) }
}

/// The answer to a message, token by token; joined they are the text. `result` is what the tool said, `None` if it did
/// not answer in time.
pub fn answer(style: Style, history: &[Message], step: &Step, result: Option<&Value>) -> Vec<String> {
    let turn = history.iter().filter(|m| m.role == "user").count() + 1;
    let text = match step {
        Step::Count(number) => {
            return (1..=*number).map(|n| if n == 1 { "1".into() } else { format!(" {n}") }).collect();
        }
        Step::Call { tool, .. } => {
            let said = result.map_or_else(|| no_answer(style, tool), |result| said(style, tool, result));
            match style {
                Style::Calm if turn == 1 => {
                    format!(
                        "Thank you for writing. {said} Ask me to count, to calculate, or what we spoke about so far."
                    )
                }
                Style::Calm => format!("{said} This is turn {turn} of our conversation, and I have kept all of it."),
                Style::Brisk => format!("{said} Turn {turn}. Next?"),
            }
        }
    };
    text.split_inclusive(' ').map(str::to_owned).collect()
}

fn no_answer(style: Style, tool: &str) -> String {
    match style {
        Style::Calm => format!("I asked the {tool} tool, but no worker answered in time."),
        Style::Brisk => format!("{tool}: no worker."),
    }
}

fn said(style: Style, tool: &str, result: &Value) -> String {
    let list = |value: &Value| {
        let words: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if words.is_empty() { "nothing in particular".to_owned() } else { words.join(", ") }
    };
    if let Some(error) = result["error"].as_str() {
        return match style {
            Style::Calm => format!("The {tool} tool could not help: {error}."),
            Style::Brisk => format!("{tool}: {error}."),
        };
    }
    // As people write numbers: 42 and not 42.0.
    let value = result["value"].as_f64().unwrap_or_default();
    match (tool, style) {
        ("calculate", Style::Calm) => {
            format!("The calculate tool says that {} is {value}.", result["expression"].as_str().unwrap_or("it"))
        }
        ("calculate", Style::Brisk) => format!("= {value}."),
        ("recall", Style::Calm) => format!(
            "So far you have sent {} of {}, mostly about {}.",
            count(&result["messages"], "message"),
            count(&result["words"], "word"),
            list(&result["keywords"])
        ),
        ("recall", Style::Brisk) => {
            format!("{}. Topics: {}.", count(&result["messages"], "message"), list(&result["keywords"]))
        }
        (_, Style::Calm) => format!("I understand that this is about {}.", list(&result["keywords"])),
        (_, Style::Brisk) => format!("Topic: {}.", list(&result["keywords"])),
    }
}

fn count(number: &Value, noun: &str) -> String {
    let number = number.as_u64().unwrap_or_default();
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(style: Style, history: &[Message], message: &str) -> String {
        let step = decide(history, message);
        let result = match &step {
            Step::Call { tool, input } => Some(tools::run(tool, input)),
            Step::Count(_) => None,
        };
        answer(style, history, &step, result.as_ref()).concat()
    }

    #[test]
    fn it_answers_in_its_style() {
        let history = ["refund order 17", "where is the order"].map(|text| Message {
            role: "user".to_owned(),
            text: text.to_owned(),
            release: String::new(),
            created_at: 0,
        });
        assert!(talk(Style::Calm, &[], "What is 6*7?").contains("6*7 is 42."));
        assert_eq!(talk(Style::Brisk, &history, "What is 6*7?"), "= 42. Turn 3. Next?");
        assert!(
            talk(Style::Calm, &history, "What did we say so far?")
                .contains("2 messages of 7 words, mostly about order")
        );
        assert_eq!(talk(Style::Brisk, &[], "count to 3"), "1 2 3");
        assert_eq!(answer(Style::Brisk, &[], &decide(&[], "hi"), None).concat(), "keywords: no worker. Turn 1. Next?");
    }
}
