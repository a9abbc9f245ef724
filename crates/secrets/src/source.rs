//! Reading the value of a secret from where the stack file says.

use std::{fs::File, io, io::Read as _};

use orchestra_model::secret::{Secret, SecretSource};

/// Longest value, in bytes: a variable of the environment holds at most 128 KiB with its name (`MAX_ARG_STRLEN`).
pub const MAX_VALUE: u64 = 120 << 10;

/// Why a secret has no value. Says nothing of the value.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Its file cannot be read.
    #[error("`{path}` cannot be read: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no such variable.
    #[error("the server was started without the variable `{0}`")]
    NoVariable(String),
    /// The value cannot stand in the environment of a program.
    #[error("{0} is {1}")]
    Unfit(SecretSource, &'static str),
}

/// The present value. One line end at the end of a file is not a part of it: editors put it there.
///
/// # Errors
/// There is none, or it cannot be passed on: it is empty, too long, not UTF-8, or has a NUL byte.
pub fn read(source: &SecretSource) -> Result<Secret, Unreadable> {
    let unfit = |why| Unreadable::Unfit(source.clone(), why);
    let bytes = match source {
        SecretSource::Env(name) => {
            let value = std::env::var_os(name).ok_or_else(|| Unreadable::NoVariable(name.clone()))?;
            value.into_encoded_bytes()
        }
        SecretSource::File(path) => {
            let failed = |source| Unreadable::File { path: path.clone(), source };
            let mut bytes = Vec::new();
            let file = File::open(path).map_err(failed)?;
            // A pipe or a device would keep the server waiting.
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(unfit("not a file"));
            }
            file.take(MAX_VALUE + 2).read_to_end(&mut bytes).map_err(failed)?;
            if bytes.ends_with(b"\n") {
                bytes.pop();
                if bytes.ends_with(b"\r") {
                    bytes.pop();
                }
            }
            bytes
        }
    };
    if bytes.is_empty() {
        return Err(unfit("empty"));
    }
    if bytes.len() as u64 > MAX_VALUE {
        return Err(unfit("longer than 120 KiB, which is more than a variable holds"));
    }
    if bytes.contains(&0) {
        return Err(unfit("no text: it has a NUL byte"));
    }
    match String::from_utf8(bytes) {
        Ok(value) => Ok(Secret::new(value)),
        Err(_) => Err(unfit("no text: it is not UTF-8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_file(content: &[u8]) -> Result<String, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("value");
        std::fs::write(&path, content).unwrap();
        let source = SecretSource::File(path.to_str().unwrap().to_owned());
        read(&source).map(|secret| secret.reveal().to_owned()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_its_content_without_the_last_line_end() {
        assert_eq!(of_file(b"sk-1").unwrap(), "sk-1");
        assert_eq!(of_file(b"sk-1\n").unwrap(), "sk-1");
        assert_eq!(of_file(b"sk-1\r\n").unwrap(), "sk-1");
        assert_eq!(of_file(b"-----BEGIN\nkey\n-----END\n\n").unwrap(), "-----BEGIN\nkey\n-----END\n");
        assert_eq!(of_file(&vec![b'x'; 120 << 10]).unwrap().len(), 120 << 10);
    }

    #[test]
    fn what_no_variable_can_hold_is_refused_without_a_word_of_it() {
        let long = vec![b'h'; (120 << 10) + 1];
        let contents: [(&[u8], &str); 5] =
            [(b"", "empty"), (b"\n", "empty"), (b"hush\0hush", "NUL"), (b"hush\xff", "UTF-8"), (&long, "longer")];
        for (content, why) in contents {
            let error = of_file(content).unwrap_err();
            assert!(error.contains(why) && !error.contains("hush") && !error.contains("hhhh"), "{error}");
        }
        let error = |source: SecretSource| read(&source).unwrap_err().to_string();
        assert!(error(SecretSource::File("/no/such/file".to_owned())).contains("`/no/such/file` cannot be read"));
        assert!(error(SecretSource::File("/dev".to_owned())).contains("not a file"));
        assert!(error(SecretSource::Env("ORCHESTRA_NO_SUCH_VARIABLE".to_owned())).contains("without the variable"));
    }
}
