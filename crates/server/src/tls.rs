//! What is known of TLS: the development authority, and what ports show.

use std::path::Path;

use axum::{Json, extract::State};
use orchestra_api::{AuthorityStatus, CertificateStatus, DoctorCheck, TlsStatus};
use orchestra_certificate::{Pair, authority_path};
use orchestra_engine::{ControlPlane, ShownCertificate};
use orchestra_model::{route::RouteId, time::UnixMillis, traffic::Tls};

use crate::{
    answer::Failure,
    backend::{App, Backend},
};

/// A certificate that ends sooner wants looking after.
const SOON: UnixMillis = 14 * 86_400_000;

pub(crate) async fn tls(State(app): State<App>) -> Result<Json<TlsStatus>, Failure> {
    let home = app.facts.home.clone();
    let authority = tokio::task::spawn_blocking(move || authority(Path::new(&home))).await.unwrap_or_default();
    let certificates = match &app.backend {
        Backend::Live(control) => certificates(control),
        Backend::Recorded(_) => Vec::new(),
    };
    Ok(Json(TlsStatus { authority, certificates }))
}

/// Only its certificate is read: the key is the authority's own.
fn authority(home: &Path) -> Option<AuthorityStatus> {
    let path = authority_path(home);
    let certificate = std::fs::read_to_string(&path).ok()?;
    let facts = Pair::facts(certificate.as_bytes()).ok()?;
    Some(AuthorityStatus {
        name: facts.subject,
        fingerprint: facts.fingerprint,
        expires_at: facts.not_after.saturating_mul(1000),
        path: path.display().to_string(),
        certificate,
    })
}

fn certificates(control: &ControlPlane) -> Vec<CertificateStatus> {
    control.certificates().into_iter().map(|(route, shown)| certificate(route, shown)).collect()
}

fn certificate(route: RouteId, ShownCertificate { tls, report }: ShownCertificate) -> CertificateStatus {
    let RouteId { environment, service, port } = route;
    let file = match tls {
        Tls::Files { certificate, .. } => Some(certificate),
        Tls::Development { .. } => None,
    };
    CertificateStatus {
        environment,
        service,
        port,
        development: file.is_none(),
        file,
        names: report.as_ref().map(|report| report.names.clone()).unwrap_or_default(),
        fingerprint: report.as_ref().and_then(|report| report.fingerprint.clone()),
        expires_at: report.as_ref().and_then(|report| report.not_after).map(|end| end.saturating_mul(1000)),
        flawed: report.as_ref().is_some_and(|report| report.flawed),
        problem: report.and_then(|report| report.problem),
    }
}

/// One check per port with TLS.
pub(crate) fn checks(control: &ControlPlane, now: UnixMillis) -> Vec<DoctorCheck> {
    let check = |status: CertificateStatus| {
        let name = format!("certificate {}/{}:{}", status.environment, status.service, status.port);
        let until = status.expires_at.map(orchestra_model::time::date);
        match (status.problem, status.expires_at, until) {
            (Some(problem), None, _) => {
                DoctorCheck::failed(name, problem, "put the files in order; they are read again by themselves")
            }
            (Some(problem), Some(_), _) => {
                let shown = if status.flawed { "it is shown all the same" } else { "an older certificate is shown" };
                DoctorCheck::warning(
                    name,
                    format!("{problem}; {shown}"),
                    "put the files in order; they are read again by themselves",
                )
            }
            (None, Some(end), Some(until)) if end < now.saturating_add(SOON) => {
                DoctorCheck::warning(name, format!("it ends on {until}"), "put a new one in its place")
            }
            (None, _, Some(until)) => DoctorCheck::ok(name, format!("valid until {until}")),
            (None, _, None) => DoctorCheck::ok(name, "the proxy is reading it"),
        }
    };
    certificates(control).into_iter().map(check).collect()
}
