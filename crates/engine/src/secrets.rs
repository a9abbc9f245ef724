//! The values of secrets that a release will have.
//!
//! What a stack file says of a secret is where its value is read. That is done once, when a release is planned: the value is
//! sealed, and its version takes the place of the question. Whatever is done with the release from then on (its instances
//! started anew, its plan applied later, a way back to it) has that value, whatever the source says by then.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use orchestra_model::{
    Code, Desired, Diagnostic, Name, Resource,
    secret::{SecretSource, SecretVersion},
    text::Reference,
};
use orchestra_secrets::{Vault, VaultError};
use orchestra_store::Reader;

use crate::{
    control_plane::{RunRequest, What},
    error::EngineError,
    planning::LoadedStack,
};

/// Gives every secret of a request its version.
///
/// # Errors
/// A value cannot be read, or one that a saved plan or an earlier release has is not kept any more.
pub(crate) async fn settle(vault: &Arc<Vault>, mut request: RunRequest) -> Result<RunRequest, EngineError> {
    let has_secrets = match &request.what {
        What::Up(stack) => !stack.desired.secrets.is_empty(),
        What::Apply { plan, .. } => plan.desired.as_ref().is_some_and(|desired| !desired.secrets.is_empty()),
        What::Rollback { release } => !release.desired.secrets.is_empty(),
        What::Down { .. } | What::Restart { .. } | What::Scale { .. } => false,
    };
    if !has_secrets {
        return Ok(request);
    }
    let vault = Arc::clone(vault);
    // Files may be on something slow.
    let settled = tokio::task::spawn_blocking(move || {
        match &mut request.what {
            What::Up(stack) => read(&vault, &mut stack.desired).map_err(EngineError::Refused)?,
            What::Apply { plan, .. } => {
                plan.desired.as_ref().map_or(Ok(()), |desired| kept(&vault, desired)).map_err(EngineError::Stale)?;
            }
            What::Rollback { release } => kept(&vault, &release.desired).map_err(EngineError::Refused)?,
            What::Down { .. } | What::Restart { .. } | What::Scale { .. } => {}
        }
        Ok(request)
    });
    settled.await.map_err(|_| EngineError::ShuttingDown)?
}

/// Gives every secret of a stack its version, where no control plane does it.
///
/// # Errors
/// A value cannot be read or kept.
pub async fn settle_stack(state: &Path, stack: LoadedStack) -> Result<LoadedStack, EngineError> {
    let settled = settle(&Arc::new(Vault::below(state)), RunRequest::up(stack)).await?;
    match settled.what {
        What::Up(stack) => Ok(*stack),
        _ => unreachable!("it was one"),
    }
}

/// Gives up the values that no release and no resource has any more.
pub(crate) async fn sweep(vault: &Vault, store: &orchestra_store::Store) -> Result<(), EngineError> {
    let wanted = store.read(Reader::secret_versions).await?;
    match vault.retain(|version| wanted.contains(version)) {
        Ok(0) => {}
        Ok(gone) => tracing::info!(gone, "values of secrets that no release has were given up"),
        Err(error) => tracing::warn!(%error, "values of secrets that no release has stay"),
    }
    Ok(())
}

/// Reads and seals what the programs of a stack get. All that is wrong is said at once.
fn read(vault: &Vault, desired: &mut Desired) -> Result<(), Vec<Diagnostic>> {
    let mut versions: BTreeMap<Name, Option<SecretVersion>> = BTreeMap::new();
    let mut errors = Vec::new();
    let Desired { resources, secrets, .. } = desired;
    for resource in resources.values_mut() {
        let program = match resource {
            Resource::Service(service) => &mut service.program,
            Resource::Job(job) => &mut job.program,
            Resource::Volume(_) => continue,
        };
        for (name, version) in program.env.values_mut().flat_map(orchestra_model::Text::secrets_mut) {
            let found = versions.entry(name.clone()).or_insert_with(|| {
                let source = secrets.get(name)?;
                value(vault, name, source).map_err(|error| errors.push(error)).ok()
            });
            version.clone_from(found);
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn value(vault: &Vault, name: &Name, source: &SecretSource) -> Result<SecretVersion, Diagnostic> {
    let secret = orchestra_secrets::read(source).map_err(|error| {
        let help = match source {
            SecretSource::File(_) => "write the value into that file, readable for the server",
            SecretSource::Env(_) => "use `file`, or `orchestra server stop` and start it where the variable is set",
        };
        Diagnostic::error(Code::SECRET, format!("secret {name} has no value: {error}")).help(help)
    })?;
    vault.seal(name, &secret).map_err(|error| {
        Diagnostic::error(Code::STATE_WRITE, format!("the value of secret {name} cannot be kept: {error}"))
    })
}

/// Whether every value that a release had is still there.
fn kept(vault: &Vault, desired: &Desired) -> Result<(), Vec<Diagnostic>> {
    let mut lost: BTreeMap<&Name, VaultError> = BTreeMap::new();
    let programs = desired.resources.values().filter_map(Resource::program);
    for reference in programs.flat_map(|program| program.env.values()).flat_map(orchestra_model::Text::references) {
        if let Reference::Secret { secret, version: Some(version) } = reference
            && let Err(error) = vault.open(version)
        {
            lost.insert(secret, error);
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    let error = |(name, error): (&Name, VaultError)| {
        Diagnostic::error(Code::SECRET, format!("the value of secret {name} is not there: {error}"))
            .help("`orchestra up` reads its present value and makes a release with it")
    };
    Err(lost.into_iter().map(error).collect())
}
