//! Finding and reading the stack file.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use orchestra_api::Source;
use orchestra_model::{Code, Diagnostic, Name};

/// Name of a stack file that is found by itself.
const NAME: &str = "orchestra.yaml";
/// Longest stack file that is read, in bytes.
const LIMIT: usize = orchestra_spec::MAX_BYTES;

/// A stack file: where it is and how the user calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StackFile {
    pub(crate) path: PathBuf,
    pub(crate) shown: String,
}

impl StackFile {
    /// The file that was named, or the nearest one in `cwd` and the folders above it.
    pub(crate) fn find(named: Option<&Path>, cwd: &Path) -> Result<Self, Diagnostic> {
        if let Some(named) = named {
            let path = cwd.join(named);
            let path = if path.is_dir() { path.join(NAME) } else { path };
            let shown = shorten(&path, cwd);
            if let Err(error) = std::fs::metadata(&path) {
                return Err(unreadable(&shown, &error));
            }
            // Two ways to write one path must not become two sources.
            let path = path.canonicalize().unwrap_or(path);
            return Ok(Self { path, shown });
        }
        for folder in cwd.ancestors() {
            let path = folder.join(NAME);
            if path.is_file() {
                let shown = shorten(&path, cwd);
                let path = path.canonicalize().unwrap_or(path);
                return Ok(Self { path, shown });
            }
        }
        Err(Diagnostic::error(Code::NOT_READABLE, format!("there is no {NAME} in {} or above it", cwd.display()))
            .help("write one with `orchestra init`, or name one with `--file`"))
    }

    /// Its text, ready to be sent.
    pub(crate) fn read(&self, environment: Option<Name>) -> Result<Source, Vec<Diagnostic>> {
        let mut bytes = Vec::new();
        File::open(&self.path)
            .and_then(|file| file.take(LIMIT as u64 + 1).read_to_end(&mut bytes))
            .map_err(|error| vec![unreadable(&self.shown, &error)])?;
        if bytes.len() > LIMIT {
            return Err(self.refused(&bytes));
        }
        let source_text = String::from_utf8(bytes).map_err(|error| self.refused(error.as_bytes()))?;
        Ok(Source {
            source_path: self.path.to_string_lossy().into_owned(),
            source_text,
            display_path: Some(self.shown.clone()),
            environment,
            preview: None,
        })
    }

    /// What `spec` has to say of bytes that cannot be sent as text. It says it before it looks at anything else.
    fn refused(&self, bytes: &[u8]) -> Vec<Diagnostic> {
        let context = orchestra_spec::Context {
            directory: String::new(),
            volumes: String::new(),
            environment: None,
            preview: None,
        };
        let loaded = orchestra_spec::load(orchestra_spec::Source { path: &self.shown, bytes }, &context);
        loaded.err().unwrap_or_else(|| {
            vec![Diagnostic::error(Code::INTERNAL, format!("{} cannot be sent to the server", self.shown))]
        })
    }
}

fn unreadable(shown: &str, error: &io::Error) -> Diagnostic {
    Diagnostic::error(Code::NOT_READABLE, format!("{shown} cannot be read"))
        .caused_by(error)
        .help("name the stack file with `--file`, or write one with `orchestra init`")
}

/// The path from `cwd`, if it is not below it the whole.
fn shorten(path: &Path, cwd: &Path) -> String {
    path.strip_prefix(cwd).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let error = StackFile::find(None, &deep).unwrap_err();
        assert_eq!(error.code, Code::NOT_READABLE);
        std::fs::write(folder.path().join(NAME), "version: 1").unwrap();
        let root = folder.path().canonicalize().unwrap();
        assert_eq!(StackFile::find(None, &deep).unwrap().path, root.join(NAME));
        std::fs::write(deep.join(NAME), "version: 1").unwrap();
        let found = StackFile::find(None, &deep).unwrap();
        assert_eq!((found.path, found.shown.as_str()), (root.join("a/b").join(NAME), NAME));
        let named = StackFile::find(Some(Path::new("..")), &root.join("a")).unwrap();
        assert_eq!(named.path, root.join(NAME));
        assert!(StackFile::find(Some(Path::new("none.yaml")), &deep).is_err());
    }

    #[test]
    fn what_is_no_text_or_too_much_is_refused_before_it_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        for (bytes, code) in [
            (b"name: caf\xe9\n".to_vec(), Code::ENCODING),
            (b"\xff\xfen\0a\0".to_vec(), Code::ENCODING),
            (vec![b'#'; LIMIT + 10], Code::TOO_LARGE),
        ] {
            std::fs::write(folder.path().join(NAME), bytes).unwrap();
            let errors = StackFile::find(None, folder.path()).unwrap().read(None).unwrap_err();
            assert_eq!(errors[0].code, code);
        }
        std::fs::write(folder.path().join(NAME), "nul: \"\0\"").unwrap();
        assert!(
            StackFile::find(None, folder.path()).unwrap().read(None).is_ok(),
            "the server says what is wrong with it"
        );
    }
}
