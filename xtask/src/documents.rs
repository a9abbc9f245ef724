//! Documents that are made from code.

use std::{fs, path::Path};

/// A document, and the command that makes it.
pub(crate) struct Document {
    path: &'static str,
    command: &'static str,
    text: String,
}

pub(crate) fn openapi() -> Document {
    Document { path: "api/openapi.json", command: "openapi", text: format!("{:#}\n", orchestra_api::document()) }
}

pub(crate) fn schema() -> Document {
    let text = format!("{:#}\n", orchestra_spec::json_schema());
    Document { path: "schema/orchestra.schema.json", command: "schema", text }
}

pub(crate) fn cli_reference() -> [Document; 2] {
    let command = "cli-reference";
    [
        Document { path: "docs/reference/cli.md", command, text: orchestra_cli::cli_reference() },
        Document { path: "docs/reference/exit-codes.md", command, text: orchestra_cli::exit_code_reference() },
    ]
}

pub(crate) fn all() -> Vec<Document> {
    [openapi(), schema()].into_iter().chain(cli_reference()).collect()
}

pub(crate) fn each(documents: &[Document], act: impl Fn(&Document) -> Vec<String>) -> Vec<String> {
    documents.iter().flat_map(act).collect()
}

impl Document {
    pub(crate) fn write(&self, root: &Path) -> Vec<String> {
        let path = root.join(self.path);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, &self.text));
        written.err().map(|error| format!("{} cannot be written: {error}", self.path)).into_iter().collect()
    }

    pub(crate) fn check(&self, root: &Path) -> Vec<String> {
        match fs::read_to_string(root.join(self.path)) {
            Ok(text) if text == self.text => Vec::new(),
            Ok(_) => vec![format!("{} is stale: run `cargo xtask {}`", self.path, self.command)],
            Err(error) => vec![format!("{} cannot be read: {error}", self.path)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_current_once_written_and_stale_once_changed() {
        let folder = tempfile::tempdir().unwrap();
        let document = Document { path: "a/b.md", command: "x", text: "text\n".into() };
        assert_eq!(document.check(folder.path()).len(), 1);
        assert!(document.write(folder.path()).is_empty());
        assert!(document.check(folder.path()).is_empty());
        fs::write(folder.path().join("a/b.md"), "text").unwrap();
        assert_eq!(document.check(folder.path()), ["a/b.md is stale: run `cargo xtask x`"]);
    }
}
