//! Collects everything that is wrong, within bounds.
//!
//! Decoding goes on after an error, so that a user sees all of them. A file with a million errors must not cost a
//! million messages: after [`MAX_ERRORS`] they are only counted.

use orchestra_model::diagnostic::{Code, Diagnostic, Location};

use crate::source::{Sources, Span};

/// Errors that are shown.
pub(crate) const MAX_ERRORS: usize = 100;

#[derive(Debug)]
pub(crate) struct Report<'a> {
    pub(crate) sources: &'a Sources<'a>,
    errors: Vec<Diagnostic>,
    warnings: Vec<Diagnostic>,
    hidden: usize,
}

impl<'a> Report<'a> {
    pub(crate) fn new(sources: &'a Sources<'a>) -> Self {
        Self { sources, errors: Vec::new(), warnings: Vec::new(), hidden: 0 }
    }

    /// Whether further errors are only counted.
    pub(crate) fn is_full(&self) -> bool {
        self.errors.len() >= MAX_ERRORS
    }

    pub(crate) fn has_errors(&self) -> bool {
        !self.errors.is_empty()
    }

    pub(crate) fn location(&self, span: Span) -> Location {
        self.sources.location(span)
    }

    /// Adds an error at `span`. `detail` (labels, notes, help) is only asked for if the error will be shown.
    pub(crate) fn error(
        &mut self,
        code: Code,
        span: Span,
        message: impl FnOnce() -> String,
        detail: impl FnOnce(Diagnostic, &Sources<'a>) -> Diagnostic,
    ) {
        if self.is_full() {
            self.hidden += 1;
            return;
        }
        let diagnostic = Diagnostic::error(code, message()).at(self.location(span), "");
        let diagnostic = detail(diagnostic, self.sources);
        // A value behind an alias is read once per use; its error is one error.
        if !self.errors.contains(&diagnostic) {
            self.errors.push(diagnostic);
        }
    }

    pub(crate) fn warning(
        &mut self,
        code: Code,
        span: Span,
        message: impl FnOnce() -> String,
        detail: impl FnOnce(Diagnostic, &Sources<'a>) -> Diagnostic,
    ) {
        if self.warnings.len() < MAX_ERRORS {
            let diagnostic = Diagnostic::warning(code, message()).at(self.location(span), "");
            let diagnostic = detail(diagnostic, self.sources);
            if !self.warnings.contains(&diagnostic) {
                self.warnings.push(diagnostic);
            }
        }
    }

    /// Everything in the order of its places: errors, then warnings.
    pub(crate) fn finish(mut self) -> (Vec<Diagnostic>, Vec<Diagnostic>) {
        let place = |d: &Diagnostic| d.labels.first().map_or((0, 0), |l| (l.location.line, l.location.column));
        self.errors.sort_by_key(place);
        self.warnings.sort_by_key(place);
        if self.hidden > 0
            && let Some(last) = self.errors.last_mut()
        {
            last.notes.push(format!("{} more errors are not shown", self.hidden));
        }
        (self.errors, self.warnings)
    }
}

/// The usual end of [`Report::error`]: what to do.
pub(crate) fn help<'a>(text: impl Into<String>) -> impl FnOnce(Diagnostic, &Sources<'a>) -> Diagnostic {
    let text = text.into();
    move |diagnostic, _| if text.is_empty() { diagnostic } else { diagnostic.help(text) }
}

/// The end of [`Report::error`] where the message says it all.
pub(crate) fn plain(diagnostic: Diagnostic, _: &Sources<'_>) -> Diagnostic {
    diagnostic
}
