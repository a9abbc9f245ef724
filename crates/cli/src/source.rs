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
/// Longest stack file that is sent to a server, in bytes. `spec` reads less; this only keeps the client from filling
/// its memory with what somebody named by mistake.
const LIMIT: u64 = 64 << 20;

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
    pub(crate) fn read(&self, environment: Option<Name>) -> Result<Source, Diagnostic> {
        let failed = |error: io::Error| unreadable(&self.shown, &error);
        let mut bytes = Vec::new();
        File::open(&self.path).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes)).map_err(failed)?;
        if bytes.len() as u64 > LIMIT {
            return Err(Diagnostic::error(
                Code::TOO_LARGE,
                format!("{} is larger than {} MiB", self.shown, LIMIT >> 20),
            )
            .help("a stack file is text of a few kilobytes: is it the right file?"));
        }
        let source_text = String::from_utf8(bytes).map_err(|error| encoding(&self.shown, &error))?;
        Ok(Source {
            source_path: self.path.to_string_lossy().into_owned(),
            source_text,
            display_path: Some(self.shown.clone()),
            environment,
        })
    }
}

fn unreadable(shown: &str, error: &io::Error) -> Diagnostic {
    Diagnostic::error(Code::NOT_READABLE, format!("{shown} cannot be read"))
        .caused_by(error)
        .help("name the stack file with `--file`, or write one with `orchestra init`")
}

fn encoding(shown: &str, error: &std::string::FromUtf8Error) -> Diagnostic {
    let valid = error.utf8_error().valid_up_to();
    let line = error.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count() + 1;
    let byte = error.as_bytes().get(valid).copied().unwrap_or_default();
    let utf16 = matches!(error.as_bytes(), [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..]);
    let note = if utf16 {
        "it begins with the byte order mark of UTF-16".to_owned()
    } else {
        format!("line {line} has the byte 0x{byte:02x} at offset {valid}")
    };
    Diagnostic::error(Code::ENCODING, format!("{shown} is not UTF-8 text"))
        .note(note)
        .help("save it as UTF-8 without a byte order mark")
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
    fn other_encodings_are_named() {
        let folder = tempfile::tempdir().unwrap();
        for (bytes, note) in [
            (&b"name: caf\xe9\n"[..], "line 1 has the byte 0xe9 at offset 9"),
            (b"\xff\xfen\0a\0", "it begins with the byte order mark of UTF-16"),
        ] {
            std::fs::write(folder.path().join(NAME), bytes).unwrap();
            let error = StackFile::find(None, folder.path()).unwrap().read(None).unwrap_err();
            assert_eq!((error.code, &error.notes[0][..]), (Code::ENCODING, note));
        }
    }
}
