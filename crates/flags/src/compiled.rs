//! A flag set with its names resolved, and the evaluation of it.
//!
//! ```text
//! override ──> its variant (STATIC), or the off variant (DISABLED)
//! off ───────> the off variant (DISABLED)
//! rules ─────> the first that applies: its variant (TARGETING_MATCH), or the one that its split gives (SPLIT)
//! otherwise ─> the default variant (DEFAULT; STATIC if there are no rules)
//! ```

use std::{borrow::Cow, collections::BTreeMap};

use orchestra_model::{
    Digest,
    flag::{Flag, FlagKind, FlagName, FlagSet, Override, OverrideServe, Problem, Scalar, Serve, VariantName},
};
use serde_json::Value;

use crate::{
    bucket,
    condition::Ready,
    context::{Context, Path},
    evaluation::{ErrorCode, Evaluation, Failure, Reason},
};

/// A version of the flags of one environment, ready to be asked.
#[derive(Clone, Debug)]
pub struct Compiled {
    digest: Digest,
    flags: BTreeMap<FlagName, Result<CompiledFlag, Problem>>,
    idle: Vec<FlagName>,
}

#[derive(Clone, Debug)]
struct CompiledFlag {
    kind: FlagKind,
    variants: Vec<(VariantName, Value)>,
    metadata: BTreeMap<String, Scalar>,
    /// The same for everybody, whatever the rules say.
    fixed: Option<(usize, Reason, Option<Override>)>,
    rules: Vec<CompiledRule>,
    default: usize,
}

#[derive(Clone, Debug)]
struct CompiledRule {
    name: String,
    when: Ready,
    serve: CompiledServe,
}

#[derive(Clone, Debug)]
enum CompiledServe {
    Variant(usize),
    Split {
        by: Path,
        /// Variants with their shares in thousandths of a percent point.
        shares: Vec<(usize, u32)>,
    },
}

impl Compiled {
    /// Prepares a set. A flag with a problem is answered with [`ErrorCode::ParseError`], so that it takes no other with it.
    pub fn new(set: &FlagSet) -> Self {
        let mut idle: Vec<FlagName> =
            set.overrides.keys().filter(|name| !set.flags.contains_key(*name)).cloned().collect();
        let flags = set.flags.iter().map(|(name, flag)| {
            let over = set.overrides.get(name);
            let compiled = CompiledFlag::new(flag, over);
            if over.is_some() && !compiled.as_ref().is_ok_and(CompiledFlag::is_overridden) {
                idle.push(name.clone());
            }
            (name.clone(), compiled)
        });
        Self { digest: set.digest(), flags: flags.collect(), idle }
    }

    /// Names the version: the digest of the set that it was made of.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Flags that cannot be served, with the reason.
    pub fn problems(&self) -> impl Iterator<Item = (&FlagName, &Problem)> {
        self.flags.iter().filter_map(|(name, flag)| Some((name, flag.as_ref().err()?)))
    }

    /// Flags with an override that has no effect, because the flag or the variant that it names does not exist.
    pub fn idle_overrides(&self) -> &[FlagName] {
        &self.idle
    }

    /// Names of all flags, in order.
    pub fn names(&self) -> impl Iterator<Item = &FlagName> {
        self.flags.keys()
    }

    /// The value of one flag.
    ///
    /// # Errors
    /// The flag does not exist, or splits by an attribute that the context lacks.
    pub fn evaluate(&self, flag: &str, context: &Context) -> Result<Evaluation<'_>, Failure> {
        let Some((name, compiled)) = self.flags.get_key_value(flag) else {
            let shown: String = flag.chars().take(100).collect();
            return Err(Failure { code: ErrorCode::FlagNotFound, details: format!("there is no flag `{shown}`") });
        };
        answer(name, compiled, context)
    }

    /// The value of one flag, which must be of a kind.
    ///
    /// # Errors
    /// As [`Compiled::evaluate`], or the flag is of another kind. Whole numbers fit [`FlagKind::Float`] too.
    pub fn evaluate_as(&self, flag: &str, kind: FlagKind, context: &Context) -> Result<Evaluation<'_>, Failure> {
        let evaluation = self.evaluate(flag, context)?;
        let found = evaluation.kind;
        if found == kind || (found, kind) == (FlagKind::Integer, FlagKind::Float) {
            return Ok(evaluation);
        }
        let details = format!("the flag `{flag}` is of kind {found}, not {kind}");
        Err(Failure { code: ErrorCode::TypeMismatch, details })
    }

    /// The values of all flags, in the order of their names.
    pub fn evaluate_all<'c>(
        &'c self,
        context: &'c Context,
    ) -> impl Iterator<Item = (&'c FlagName, Result<Evaluation<'c>, Failure>)> {
        self.flags.iter().map(move |(name, flag)| (name, answer(name, flag, context)))
    }
}

fn answer<'c>(
    name: &FlagName,
    flag: &'c Result<CompiledFlag, Problem>,
    context: &Context,
) -> Result<Evaluation<'c>, Failure> {
    match flag {
        Ok(flag) => flag.evaluate(name, context),
        Err(problem) => {
            Err(Failure { code: ErrorCode::ParseError, details: format!("the flag `{name}` is broken: {problem}") })
        }
    }
}

impl CompiledFlag {
    fn new(flag: &Flag, over: Option<&Override>) -> Result<Self, Problem> {
        if let Some(problem) = flag.problems().into_iter().next() {
            return Err(problem);
        }
        let variants: Vec<(VariantName, Value)> =
            flag.variants.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        let position = |name: &VariantName| variants.iter().position(|(other, _)| other == name);
        let found = |name| position(name).expect("`problems` looks at every name of a variant");
        let fixed = over.and_then(|over| match &over.serve {
            OverrideServe::Off => Some((found(&flag.off), Reason::Disabled, Some(over.clone()))),
            OverrideServe::Variant(name) => Some((position(name)?, Reason::Static, Some(over.clone()))),
        });
        let rules = flag.rules.iter().map(|rule| CompiledRule {
            name: rule.name.clone(),
            when: Ready::new(&rule.when),
            serve: match &rule.serve {
                Serve::Variant(name) => CompiledServe::Variant(found(name)),
                Serve::Split(split) => {
                    let shares = split.shares.iter().map(|s| (found(&s.variant), s.share.as_thousandths()));
                    let mut shares: Vec<(usize, u32)> = shares.collect();
                    // Whoever only writes them in another order changes nobody's variant.
                    shares.sort_by(|(a, _), (b, _)| variants[*a].0.cmp(&variants[*b].0));
                    CompiledServe::Split { by: Path::new(&split.by), shares }
                }
            },
        });
        Ok(Self {
            kind: flag.kind,
            metadata: flag.metadata.clone(),
            fixed: fixed.or_else(|| (!flag.enabled).then(|| (found(&flag.off), Reason::Disabled, None))),
            rules: rules.collect(),
            default: found(&flag.default),
            variants,
        })
    }

    fn is_overridden(&self) -> bool {
        self.fixed.as_ref().is_some_and(|(_, _, over)| over.is_some())
    }

    fn evaluate(&self, name: &FlagName, context: &Context) -> Result<Evaluation<'_>, Failure> {
        if let Some((variant, reason, over)) = &self.fixed {
            return Ok(Evaluation { overridden: over.as_ref(), ..self.evaluation(*variant, *reason, None) });
        }
        let Some(rule) = self.rules.iter().find(|rule| rule.when.holds(context)) else {
            let reason = if self.rules.is_empty() { Reason::Static } else { Reason::Default };
            return Ok(self.evaluation(self.default, reason, None));
        };
        let (variant, reason) = match &rule.serve {
            CompiledServe::Variant(variant) => (*variant, Reason::TargetingMatch),
            CompiledServe::Split { by, shares } => {
                let key = key(name, by, context)?;
                let named = shares.iter().map(|(variant, share)| (self.variants[*variant].0.as_str(), *share));
                let chosen = bucket::choose(name.as_str(), named, &key).expect("shares add up to 100 %");
                (shares[chosen].0, Reason::Split)
            }
        };
        Ok(self.evaluation(variant, reason, Some(&rule.name)))
    }

    fn evaluation<'c>(&'c self, variant: usize, reason: Reason, rule: Option<&'c str>) -> Evaluation<'c> {
        let (variant, value) = &self.variants[variant];
        Evaluation {
            kind: self.kind,
            variant,
            value: Some(value).filter(|value| !value.is_null()),
            reason,
            rule,
            overridden: None,
            metadata: &self.metadata,
        }
    }
}

/// What a split hashes: a text as it is, a number or boolean as JSON writes it. An empty text is nobody.
fn key<'x>(flag: &FlagName, by: &Path, context: &'x Context) -> Result<Cow<'x, str>, Failure> {
    match context.get(by) {
        Some(Value::String(text)) if !text.is_empty() => return Ok(Cow::Borrowed(text)),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => return Ok(Cow::Owned(value.to_string())),
        _ => {}
    }
    if by.is_targeting_key() {
        let details = format!("the flag `{flag}` splits by `targetingKey`, and the context has none");
        return Err(Failure { code: ErrorCode::TargetingKeyMissing, details });
    }
    let details = format!("the flag `{flag}` splits by `{}`, and the context has no text or number there", by.as_str());
    Err(Failure { code: ErrorCode::InvalidContext, details })
}
