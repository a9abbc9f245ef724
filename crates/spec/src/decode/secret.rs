//! Secrets: where they come from, and where they may stand.
//!
//! A secret may be a part of a variable of a program's environment, which only the program and its user can read. A command
//! line everybody on the machine can read, and texts that must be known before a release is made would put it into the
//! plan.

use orchestra_model::{
    Name, Text,
    diagnostic::Code,
    secret::SecretSource,
    text::{Reference, Segment},
};

use super::{Decoder, Fields, invalid, scope::Scope, template, text, unknown};
use crate::{
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, cut},
};

/// Where a value comes from that is not to stand in a file.
pub(super) fn source(
    report: &mut Report<'_>,
    scope: &Scope<'_, '_>,
    fields: &Fields<'_, '_>,
    of: &str,
) -> Option<SecretSource> {
    let way = fields.only(report)?;
    if way.key == "file" {
        return template::stack_path(report, scope, &way.value, of).map(SecretSource::File);
    }
    let name = text(report, &way.value, "the name of a variable")?;
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        let message = || format!("`{}` is not the name of a variable", cut(name));
        invalid(report, way.value.span, message, "letters, digits and `_`");
        return None;
    }
    Some(SecretSource::Env(name.to_owned()))
}

impl<'n, 'a> Decoder<'_, 'n, 'a> {
    /// `{secret: NAME}` as the value of a variable.
    pub(super) fn variable_of_secret(&mut self, node: &'n Node<'a>, at: Span) -> Option<Text> {
        let fields = Fields::read(self.report, node, &tables::ENV_SECRET, at)?;
        let entry: &Entry<'_> = fields.get("secret")?;
        let name = text(self.report, &entry.value, "the name of a secret")?;
        let Some((secret, _)) = self.scope.secrets.get_key_value(name) else {
            let known = self.scope.secrets.keys().map(Name::as_str);
            unknown(self.report, entry.value.span, || format!("there is no secret `{}`", cut(name)), known, name);
            return None;
        };
        let reference = Reference::Secret { secret: secret.clone(), version: None };
        Some(Text(vec![Segment::Reference(reference)]))
    }

    /// Reports a secret where it would be seen by others.
    pub(super) fn without_secret(&mut self, node: &Node<'_>, text: &Text) {
        if text.is_secret() {
            let message = || "a secret cannot be a part of a command: everybody on the machine can read it".to_owned();
            let remedy = help("pass it in a variable, `env: {NAME: {secret: …}}`, and let the program read that");
            self.report.error(Code::INTERPOLATION, node.span, message, remedy);
        }
    }
}
