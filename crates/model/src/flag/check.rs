//! What can be wrong with a flag whose parts are each fine.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Flag, FlagKind, Serve, Split, VariantName};
use crate::quantity::Percent;

/// Something wrong with a flag, with its place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {error}", path.join("."))]
pub struct Problem {
    /// Keys and indices that lead to it inside the flag, as the stack file writes them: `rules`, `0`, `split`, `blue`.
    pub path: Vec<String>,
    /// What.
    pub error: FlagError,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// There is nothing to serve.
    #[error("a flag needs at least one variant")]
    NoVariants,
    /// All variants are `null`.
    #[error("every variant is `null`: the program would always use its own default")]
    OnlyNull,
    /// A list.
    #[error("the value of a variant cannot be a list")]
    List,
    /// Values of several kinds.
    #[error("the variant `{variant}` is of kind {found}, others are of kind {expected}")]
    MixedKinds {
        /// The one that differs.
        variant: VariantName,
        /// Its kind.
        found: FlagKind,
        /// The kind of the flag.
        expected: FlagKind,
    },
    /// A variant that the flag does not have.
    #[error("there is no variant `{variant}`")]
    UnknownVariant {
        /// Which.
        variant: VariantName,
    },
    /// A split without parts.
    #[error("the split is empty")]
    EmptySplit,
    /// A variant has two shares.
    #[error("the variant `{variant}` has two shares")]
    TwoShares {
        /// Which.
        variant: VariantName,
    },
    /// Shares that are not a whole.
    #[error("the shares add up to {}%, not to 100%", thousandths(*sum))]
    Sum {
        /// In thousandths of a percent point.
        sum: u64,
    },
}

/// Thousandths in the notation of [`Percent`], which ends at 100.
fn thousandths(sum: u64) -> String {
    let (whole, rest) = (sum / 1000, sum % 1000);
    let text = format!("{whole}.{rest:03}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// 100 %, in thousandths of a percent point.
const WHOLE: u64 = 100_000;

impl Flag {
    /// Works out the kind of a flag from its values, and brings these into their one form: keys in order, and whole
    /// numbers with a fraction where another value has one.
    ///
    /// # Errors
    /// The first value that does not fit, or what is missing.
    pub fn infer_kind(variants: &mut BTreeMap<VariantName, Value>) -> Result<FlagKind, Problem> {
        let problem =
            |path: &[&str], error| Problem { path: path.iter().map(|&part| part.to_owned()).collect(), error };
        if variants.is_empty() {
            return Err(problem(&["variants"], FlagError::NoVariants));
        }
        let mut kind = None;
        for (name, value) in &*variants {
            if value.is_array() {
                return Err(problem(&["variants", name.as_str()], FlagError::List));
            }
            kind = match (kind, FlagKind::of(value)) {
                (None, other) | (other, None) => other,
                (Some(known), Some(found)) if known == found => kind,
                (Some(FlagKind::Integer | FlagKind::Float), Some(FlagKind::Integer | FlagKind::Float)) => {
                    Some(FlagKind::Float)
                }
                (Some(expected), Some(found)) => {
                    let error = FlagError::MixedKinds { variant: name.clone(), found, expected };
                    return Err(problem(&["variants", name.as_str()], error));
                }
            };
        }
        let kind = kind.ok_or_else(|| problem(&["variants"], FlagError::OnlyNull))?;
        for value in variants.values_mut() {
            // Equal values are equal bytes.
            value.sort_all_objects();
            if let Some(number) = value.as_f64().filter(|_| kind == FlagKind::Float) {
                *value = number.into();
            }
        }
        Ok(kind)
    }

    /// Everything that is wrong with it.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Problems(Vec::new());
        if self.variants.is_empty() {
            problems.add(&["variants"], FlagError::NoVariants);
        } else if self.variants.values().all(Value::is_null) {
            problems.add(&["variants"], FlagError::OnlyNull);
        }
        for (name, value) in &self.variants {
            let path = ["variants", name.as_str()];
            match FlagKind::of(value) {
                Some(found) if found != self.kind => {
                    problems.add(&path, FlagError::MixedKinds { variant: name.clone(), found, expected: self.kind });
                }
                None if value.is_array() => problems.add(&path, FlagError::List),
                _ => {}
            }
        }
        if !self.variants.is_empty() {
            self.named(&mut problems, &["default"], &self.default);
            // Without a word about it, `off` is `default`: one mistake, one message.
            if self.off != self.default {
                self.named(&mut problems, &["off"], &self.off);
            }
        }
        for (index, rule) in self.rules.iter().enumerate() {
            let index = index.to_string();
            match &rule.serve {
                Serve::Variant(variant) => self.named(&mut problems, &["rules", &index, "serve"], variant),
                Serve::Split(split) => self.split(&mut problems, &["rules", &index, "split"], split),
            }
        }
        problems.0
    }

    fn named(&self, problems: &mut Problems, path: &[&str], variant: &VariantName) {
        if !self.variants.contains_key(variant) {
            problems.add(path, FlagError::UnknownVariant { variant: variant.clone() });
        }
    }

    fn split(&self, problems: &mut Problems, path: &[&str], split: &Split) {
        if split.shares.is_empty() {
            return problems.add(path, FlagError::EmptySplit);
        }
        let mut seen = BTreeSet::new();
        for share in &split.shares {
            let path = [path, &[share.variant.as_str()]].concat();
            self.named(problems, &path, &share.variant);
            if !seen.insert(&share.variant) {
                problems.add(&path, FlagError::TwoShares { variant: share.variant.clone() });
            }
        }
        let sum = split.shares.iter().map(|share| u64::from(share.share.as_thousandths())).sum();
        if sum != WHOLE {
            problems.add(path, FlagError::Sum { sum });
        }
    }
}

impl Split {
    /// What is left of 100 % after `taken`; `None` if that is more.
    pub fn rest(taken: impl IntoIterator<Item = Percent>) -> Option<Percent> {
        let taken: u64 = taken.into_iter().map(|share| u64::from(share.as_thousandths())).sum();
        let rest = WHOLE.checked_sub(taken)?;
        u32::try_from(rest).ok().map(Percent::thousandths)
    }
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, path: &[&str], error: FlagError) {
        self.0.push(Problem { path: path.iter().map(|&part| part.to_owned()).collect(), error });
    }
}
