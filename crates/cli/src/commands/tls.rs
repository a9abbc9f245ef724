//! `orchestra tls`: the development authority, who trusts it, and the certificates of ports.

use std::path::Path;

use orchestra_api::{AuthorityStatus, CertificateStatus, TlsStatus};
use orchestra_model::{
    Code, Diagnostic,
    time::{UnixMillis, date},
};
use serde_json::json;

use crate::{
    args::TlsCommand,
    exit::Exit,
    failure::Result,
    output::Output,
    session::Session,
    table::{Cell, Table, Tone},
    text::printable,
    trust::{TrustStore, trusts},
};

/// A certificate that ends sooner is pointed out.
const SOON: UnixMillis = 14 * 86_400_000;

pub(crate) async fn tls(command: &TlsCommand, session: &Session, output: &mut Output) -> Result<Exit> {
    match command {
        TlsCommand::Trust { print: true } => print(session, output).await,
        TlsCommand::Trust { print: false } => change(true, session, output).await,
        TlsCommand::Untrust => change(false, session, output).await,
        TlsCommand::Status => status(session, output).await,
    }
}

async fn authority(session: &Session, output: &mut Output) -> Result<AuthorityStatus> {
    let status = session.server(output).await?.tls().await?;
    let missing = || {
        Diagnostic::error(Code::TRUST, "the server has no development authority")
            .help(format!("its log says why: {}", session.home.join("server.log").display()))
    };
    Ok(status.authority.ok_or_else(missing)?)
}

async fn print(session: &Session, output: &mut Output) -> Result<Exit> {
    let authority = authority(session, output).await?;
    if output.json {
        output.json(&authority)?;
    } else {
        output.text(&authority.certificate)?;
    }
    Ok(Exit::Success)
}

fn store(session: &Session) -> Option<TrustStore> {
    let system = &session.system;
    TrustStore::detect(&system.root(), system.is_macos(), |program| system.has(program))
}

/// Makes the system trust the authority, or stop doing so.
async fn change(trust: bool, session: &Session, output: &mut Output) -> Result<Exit> {
    let authority = authority(session, output).await?;
    let by_hand = "import it where it is to be trusted: `orchestra tls trust --print > orchestra-ca.pem`";
    if session.is_remote() && !Path::new(&authority.path).is_file() {
        let message = "the authority is on another machine";
        return Err(Diagnostic::error(Code::TRUST, message).help(by_hand).into());
    }
    let Some(store) = store(session) else {
        let message = "the trust store of this system is not known";
        return Err(Diagnostic::error(Code::TRUST, message).help(by_hand).into());
    };
    if trusts(&session.system.root(), &authority.certificate) == Some(trust) {
        return done(trust, &authority, output);
    }
    let certificate = Path::new(&authority.path);
    let commands = if trust {
        store.trust(certificate, &authority.fingerprint)
    } else {
        store.untrust(certificate, &authority.fingerprint)
    };
    if !session.system.is_root() {
        let message = "only root can change what this system trusts";
        return Err(Diagnostic::error(Code::TRUST, message).help(commands.shell()).into());
    }
    for command in &commands.commands {
        let failed = |why: String| {
            Diagnostic::error(Code::TRUST, format!("`{}` failed", command.join(" "))).note(why).help(by_hand)
        };
        match session.system.run(command) {
            Ok((true, _)) => {}
            Ok((false, said)) => return Err(failed(said.trim().to_owned()).into()),
            Err(error) => return Err(failed(error.to_string()).into()),
        }
    }
    if trusts(&session.system.root(), &authority.certificate) == Some(!trust) {
        let message = "everything succeeded, and what this system trusts is as it was before";
        return Err(Diagnostic::error(Code::TRUST, message).note(commands.shell()).help(by_hand).into());
    }
    done(trust, &authority, output)
}

fn done(trust: bool, authority: &AuthorityStatus, output: &mut Output) -> Result<Exit> {
    if output.json {
        output.json(&json!({"trusted": trust, "name": authority.name, "fingerprint": authority.fingerprint}))?;
        return Ok(Exit::Success);
    }
    let word = if trust { "trusts" } else { "does not trust" };
    output.line(&format!("this machine {word} the {}", authority.name))?;
    if trust {
        output
            .note("programs that run see it at their next start; browsers and Java may have trust stores of their own");
    }
    Ok(Exit::Success)
}

async fn status(session: &Session, output: &mut Output) -> Result<Exit> {
    let status = session.server(output).await?.tls().await?;
    let trusted =
        status.authority.as_ref().and_then(|authority| trusts(&session.system.root(), &authority.certificate));
    if output.json {
        let mut value = serde_json::to_value(&status).unwrap_or_default();
        value["trusted"] = json!(trusted);
        output.json(&value)?;
        return Ok(Exit::Success);
    }
    let text = render(&status, trusted, (session.now)(), output);
    output.text(&text)?;
    Ok(Exit::Success)
}

fn render(status: &TlsStatus, trusted: Option<bool>, now: UnixMillis, output: &Output) -> String {
    let mut text = match &status.authority {
        None => "there is no development authority; the server's log says why\n".to_owned(),
        Some(authority) => {
            let trust = match trusted {
                Some(true) => output.palette.good("trusted by this machine"),
                Some(false) => output.palette.busy("not trusted by this machine: `orchestra tls trust`"),
                None => "whether this machine trusts it cannot be seen".to_owned(),
            };
            format!(
                "{}\n  {trust}\n  valid until  {}\n  SHA-256      {}\n  certificate  {}\n",
                printable(&authority.name),
                date(authority.expires_at),
                printable(&authority.fingerprint),
                printable(&authority.path)
            )
        }
    };
    let mut table = Table::new(["PORT", "CERTIFICATE", "VALID UNTIL", "NAMES", "PROBLEM"]);
    for certificate in &status.certificates {
        table.row(row(certificate, now));
    }
    if !table.is_empty() {
        text.push('\n');
        text.push_str(&table.render(output.palette, output.columns()));
    }
    text
}

fn row(certificate: &CertificateStatus, now: UnixMillis) -> [Cell; 5] {
    let CertificateStatus { environment, service, port, .. } = certificate;
    let until = match certificate.expires_at {
        None => Cell::new("none", Tone::Bad),
        Some(at) if at <= now => Cell::new(date(at), Tone::Bad),
        Some(at) if at < now.saturating_add(SOON) => Cell::new(date(at), Tone::Busy),
        Some(at) => date(at).into(),
    };
    [
        format!("{environment}/{service}:{port}").into(),
        certificate.file.as_deref().unwrap_or("development").into(),
        until,
        certificate.names.join(", ").into(),
        Cell::new(certificate.problem.as_deref().unwrap_or_default(), Tone::Bad),
    ]
}
