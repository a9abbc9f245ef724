//! Shares of traffic as people read and write them: `"12.5%"` in what a stack asks for and in what the API says of it.
//!
//! What server and proxy tell each other many times a second keeps plain thousandths, the form of [`Permille`] itself. They
//! are read here as well, because releases of before were written down with them.

use serde::{Deserialize, Deserializer, Serializer};

use crate::{quantity::Percent, traffic::Permille};

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Thousandths(Permille),
    Text(Percent),
}

impl From<Written> for Permille {
    fn from(written: Written) -> Self {
        match written {
            Written::Thousandths(share) => share,
            // Percent is at most 100,000 thousandths of a point.
            Written::Text(percent) => Self::new(u16::try_from(percent.as_thousandths() / 100).unwrap_or(u16::MAX)),
        }
    }
}

fn text(share: Permille) -> Percent {
    Percent::thousandths(u32::from(share.get()) * 100)
}

/// Writes it in percent.
///
/// # Errors
///
/// Those of the serializer.
pub fn serialize<S: Serializer>(share: &Permille, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&text(*share))
}

/// Reads it in percent, or in thousandths.
///
/// # Errors
///
/// It is neither.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Permille, D::Error> {
    Written::deserialize(deserializer).map(Into::into)
}

/// The same for one that may be missing.
pub mod option {
    use super::{Deserialize, Deserializer, Permille, Serializer, Written, text};

    /// Writes it in percent, if it is there.
    ///
    /// # Errors
    ///
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(share: &Option<Permille>, serializer: S) -> Result<S::Ok, S::Error> {
        match share {
            Some(share) => serializer.collect_str(&text(*share)),
            None => serializer.serialize_none(),
        }
    }

    /// Reads it in percent, or in thousandths, if it is there.
    ///
    /// # Errors
    ///
    /// It is neither.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Permille>, D::Error> {
        Ok(Option::<Written>::deserialize(deserializer)?.map(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{
        rollout::{Guard, RolloutStep},
        traffic::Permille,
    };

    #[test]
    fn shares_are_written_as_in_the_stack_file_and_read_as_they_were_written_before() {
        let steps = [
            (RolloutStep::Weight(Permille::new(125)), json!({"weight": "12.5%"}), json!({"weight": 125})),
            (
                RolloutStep::Mirror { share: Permille::new(1), unsafe_methods: false },
                json!({"mirror": {"share": "0.1%", "unsafe_methods": false}}),
                json!({"mirror": {"share": 1, "unsafe_methods": false}}),
            ),
        ];
        for (step, written, before) in steps {
            assert_eq!(serde_json::to_value(&step).unwrap(), written);
            for form in [written, before] {
                assert_eq!(serde_json::from_value::<RolloutStep>(form).unwrap(), step);
            }
        }
        for wrong in [json!({"weight": "101%"}), json!({"weight": "5"}), json!({"weight": -1})] {
            assert!(serde_json::from_value::<RolloutStep>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn guards_are_written_and_read_likewise() {
        let guard = json!({
            "alpha": "1%", "errors": true, "max_errors": "2.5%", "raise_to": "50%", "per_client": 2, "clients": 2,
            "warm_up": "10s", "inconclusive": "hold",
        });
        let read: Guard = serde_json::from_value(guard.clone()).unwrap();
        let shares = (read.alpha, read.max_errors, read.raise_to);
        assert_eq!(shares, (Permille::new(10), Some(Permille::new(25)), Some(Permille::new(500))));
        assert_eq!(serde_json::to_value(&read).unwrap(), guard);
        let mut before = guard;
        before["alpha"] = 10.into();
        before["max_errors"] = 25.into();
        before.as_object_mut().unwrap().remove("raise_to");
        let read: Guard = serde_json::from_value(before).unwrap();
        assert_eq!((read.alpha, read.max_errors, read.raise_to), (Permille::new(10), Some(Permille::new(25)), None));
    }
}
