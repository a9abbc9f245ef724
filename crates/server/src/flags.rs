//! Flags: how each stands, and switching them.

use axum::{Json, extract::State, http::StatusCode};
use orchestra_api::{FlagState, FlagStatus, Flags, SwitchFlag, SwitchTo};
use orchestra_engine::{FlagSwitch, FlagsStatus};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Name,
    flag::{FlagName, OverrideServe},
};

use crate::{
    answer::{Body, Failure, Path},
    backend::App,
};

/// Longest reason: it goes with every answer to a program.
const MAX_REASON: usize = 500;

type Answer<T> = Result<Json<T>, Failure>;

pub(crate) async fn flags(State(app): State<App>, Path((stack, environment)): Path<(Name, Name)>) -> Answer<Flags> {
    let status = app.live()?.flags(&EnvironmentId { stack, environment }).await?;
    let names = status.set.flags.keys().chain(status.set.overrides.keys());
    let names: std::collections::BTreeSet<&FlagName> = names.collect();
    Ok(Json(Flags {
        endpoint: status.endpoint.clone(),
        in_force: status.in_force,
        problem: status.problem.clone(),
        flags: names.into_iter().filter_map(|name| one(&status, name)).collect(),
    }))
}

pub(crate) async fn flag(
    State(app): State<App>,
    Path((stack, environment, flag)): Path<(Name, Name, FlagName)>,
) -> Answer<FlagStatus> {
    let id = EnvironmentId { stack, environment };
    let status = app.live()?.flags(&id).await?;
    one(&status, &flag).map(Json).ok_or_else(|| Failure::not_found(format!("flag {flag} of {id}")))
}

pub(crate) async fn switch_flag(
    State(app): State<App>,
    Path((stack, environment, flag)): Path<(Name, Name, FlagName)>,
    Body(request): Body<SwitchFlag>,
) -> Answer<FlagStatus> {
    let SwitchFlag { to, reason, by } = request;
    let reason = reason.unwrap_or_default().trim().to_owned();
    if reason.chars().count() > MAX_REASON {
        let message = format!("the reason is longer than {MAX_REASON} characters");
        let error =
            Diagnostic::error(Code::BAD_REQUEST, message).help("every answer about the flag carries it: shorten it");
        return Err(Failure::new(StatusCode::BAD_REQUEST, error));
    }
    let serve = match to {
        SwitchTo::Variant(variant) => Some(OverrideServe::Variant(variant)),
        SwitchTo::Off => Some(OverrideServe::Off),
        SwitchTo::Clear => None,
    };
    let by = by.filter(|by| !by.trim().is_empty()).unwrap_or_else(|| "a person".to_owned());
    let switch = FlagSwitch { flag: flag.clone(), serve, by, reason };
    let status = app.live()?.switch_flag(&EnvironmentId { stack, environment }, switch).await?;
    // Nothing is left of an override of a flag that is not defined once it is taken back.
    let gone = || FlagStatus {
        name: flag.clone(),
        state: FlagState::Undefined,
        variant: None,
        value: None,
        overridden: None,
        in_force: status.in_force,
        definition: None,
    };
    Ok(Json(one(&status, &flag).unwrap_or_else(gone)))
}

/// A flag, or an override of none.
fn one(status: &FlagsStatus, name: &FlagName) -> Option<FlagStatus> {
    let definition = status.set.flags.get(name);
    let overridden = status.set.overrides.get(name);
    if definition.is_none() && overridden.is_none() {
        return None;
    }
    let (state, variant) = match definition {
        None => (FlagState::Undefined, None),
        Some(flag) if !flag.problems().is_empty() => (FlagState::Broken, None),
        Some(flag) => match overridden.map(|over| &over.serve) {
            Some(OverrideServe::Off) => (FlagState::Overridden, Some(&flag.off)),
            Some(OverrideServe::Variant(variant)) if flag.variants.contains_key(variant) => {
                (FlagState::Overridden, Some(variant))
            }
            // An override of a variant that is not there has no effect.
            _ if !flag.enabled => (FlagState::Off, Some(&flag.off)),
            _ if flag.rules.is_empty() => (FlagState::Fixed, Some(&flag.default)),
            _ => (FlagState::Rules, Some(&flag.default)),
        },
    };
    let value = variant.and_then(|variant| definition?.variants.get(variant)).cloned();
    Some(FlagStatus {
        name: name.clone(),
        state,
        variant: variant.cloned(),
        value,
        overridden: overridden.cloned(),
        in_force: status.in_force,
        definition: definition.cloned(),
    })
}
