//! Sealed values by version, in a folder of the state directory.
//!
//! | file | content |
//! |---|---|
//! | `key` | 32 random bytes, made at the first use (0600) |
//! | `VERSION` | a nonce of 12 bytes, then the value under AES-256-GCM with the version as associated data (0600) |
//!
//! The version of a value is the first half of HMAC-SHA-256 over the secret's name and the value, with a key of its own: the
//! hash of a short password by itself would give the password away. Who has the whole state directory has the key and thus
//! the values; a copy of the rest (the database, logs, launch folders) has neither.
//!
//! Sources: RFC 2104 (HMAC), NIST SP 800-38D (GCM; nonces are random, 8.2.2, and a key seals far fewer than 2^32 values).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use orchestra_model::{
    Name,
    secret::{Secret, SecretVersion},
};

const KEY: &str = "key";
const KEY_BYTES: usize = 32;
/// How long a value is kept that no release has: a saved plan may have it.
pub const SPARED: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a value cannot be sealed or had back.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// A file of the vault cannot be read or written.
    #[error("`{path}` cannot be used: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The version was never sealed here, or was given up with the last release that had it.
    #[error("version {0} is not kept any more")]
    Unknown(SecretVersion),
    /// Its file was changed, or the key was.
    #[error("`{0}` is damaged, or was sealed with another key")]
    Damaged(PathBuf),
}

/// Sealed values of secrets.
#[derive(Debug)]
pub struct Vault {
    folder: PathBuf,
    keys: OnceLock<Keys>,
}

#[derive(Debug)]
struct Keys {
    seal: RandomizedNonceKey,
    version: hmac::Key,
}

impl Keys {
    fn derive(key: &[u8; KEY_BYTES]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, key);
        let seal = hmac::sign(&key, b"orchestra secrets: seal");
        let version = hmac::sign(&key, b"orchestra secrets: version");
        Self {
            seal: RandomizedNonceKey::new(&AES_256_GCM, seal.as_ref()).expect("HMAC-SHA-256 gives 32 bytes"),
            version: hmac::Key::new(hmac::HMAC_SHA256, version.as_ref()),
        }
    }
}

impl Vault {
    /// The vault in a folder, which is made when something is sealed.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), keys: OnceLock::new() }
    }

    /// The vault of a state directory.
    pub fn below(state: &Path) -> Self {
        Self::new(state.join("secrets"))
    }

    /// Keeps a value; its version. Sealing a value again changes nothing.
    ///
    /// # Errors
    /// The folder cannot be read or written.
    pub fn seal(&self, name: &Name, value: &Secret) -> Result<SecretVersion, VaultError> {
        let keys = self.keys()?;
        let version = version(keys, name, value);
        let path = self.folder.join(&version.0);
        match self.open(&version) {
            Ok(_) => {
                // It counts as sealed now. Where that cannot be said it may be given up earlier.
                let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                return Ok(version);
            }
            // Nobody can have it back from there.
            Err(VaultError::Damaged(path)) => {
                fs::remove_file(&path).map_err(|source| VaultError::Io { path, source })?;
            }
            Err(_) => {}
        }
        let mut sealed = value.reveal().as_bytes().to_vec();
        let aad = Aad::from(version.0.as_bytes());
        let nonce = keys.seal.seal_in_place_append_tag(aad, &mut sealed).expect("it is shorter than 64 GiB");
        let mut content = nonce.as_ref().to_vec();
        content.append(&mut sealed);
        write(&self.folder, &path, &content).map_err(|source| VaultError::Io { path, source })?;
        Ok(version)
    }

    /// A value that was kept.
    ///
    /// # Errors
    /// It was not, cannot be read, or is not what was sealed.
    pub fn open(&self, version: &SecretVersion) -> Result<Secret, VaultError> {
        if !version.is_well_formed() {
            return Err(VaultError::Unknown(version.clone()));
        }
        let path = self.folder.join(&version.0);
        let mut content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(VaultError::Unknown(version.clone())),
            Err(source) => return Err(VaultError::Io { path, source }),
        };
        let opened = || -> Option<String> {
            let (nonce, sealed) = content.split_first_chunk_mut::<NONCE_LEN>()?;
            let (nonce, aad) = (Nonce::from(&*nonce), Aad::from(version.0.as_bytes()));
            let value = self.keys().ok()?.seal.open_in_place(nonce, aad, sealed).ok()?;
            String::from_utf8(value.to_vec()).ok()
        }();
        opened.map(Secret::new).ok_or(VaultError::Damaged(path))
    }

    /// Gives up what is not asked for any more and was sealed more than [`SPARED`] ago; how many values that were.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn retain(&self, wanted: impl Fn(&SecretVersion) -> bool) -> Result<usize, VaultError> {
        let failed = |source| VaultError::Io { path: self.folder.clone(), source };
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(source) => return Err(failed(source)),
        };
        let mut gone = 0;
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let Some(version) = name.to_str().map(|name| SecretVersion(name.to_owned())) else { continue };
            let path = self.folder.join(&name);
            if version.is_well_formed() && !wanted(&version) && is_old(&path) && fs::remove_file(path).is_ok() {
                gone += 1;
            }
        }
        Ok(gone)
    }

    fn keys(&self) -> Result<&Keys, VaultError> {
        if let Some(keys) = self.keys.get() {
            return Ok(keys);
        }
        let path = self.folder.join(KEY);
        let key = key(&self.folder, &path).map_err(|source| VaultError::Io { path, source })?;
        Ok(self.keys.get_or_init(|| Keys::derive(&key)))
    }
}

fn version(keys: &Keys, name: &Name, value: &Secret) -> SecretVersion {
    let mut context = hmac::Context::with_key(&keys.version);
    context.update(name.as_str().as_bytes());
    // No name has one.
    context.update(b"\0");
    context.update(value.reveal().as_bytes());
    let tag = context.sign();
    let (half, _) = tag.as_ref().split_at(16);
    let half = half.iter().fold(0, |number: u128, byte| number << 8 | u128::from(*byte));
    SecretVersion(format!("{half:032x}"))
}

/// Whether a value was sealed long ago. Not one that lies in the future, as after a clock was set back.
fn is_old(path: &Path) -> bool {
    let sealed = fs::metadata(path).and_then(|found| found.modified());
    sealed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > SPARED))
}

/// The key of a folder; made if there is none.
fn key(folder: &Path, path: &Path) -> io::Result<[u8; KEY_BYTES]> {
    let read = || -> io::Result<[u8; KEY_BYTES]> {
        let mut content = Vec::new();
        File::open(path)?.take(KEY_BYTES as u64 + 1).read_to_end(&mut content)?;
        content.try_into().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a key has 32 bytes"))
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        read => return read,
    }
    let mut key = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut key).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    write(folder, path, &key)?;
    // What is there now counts: somebody else may have been first.
    read()
}

/// Writes a file that nobody else may read, whole or not at all. One that is there already stays.
fn write(folder: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let mut random = [0; 8];
    SystemRandom::new().fill(&mut random).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    let new = folder.join(format!("new-{:016x}", u64::from_le_bytes(random)));
    let written = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        match fs::hard_link(&new, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        File::open(folder)?.sync_all()
    }();
    let _ = fs::remove_file(&new);
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Name {
        name.parse().unwrap()
    }

    fn secret(value: &str) -> Secret {
        Secret::new(value.to_owned())
    }

    #[test]
    fn a_value_comes_back_from_its_version_and_stands_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(folder.path().join("secrets"));
        let value = secret("correct horse battery staple");
        let version = vault.seal(&name("db"), &value).unwrap();
        assert!(version.is_well_formed());
        assert_eq!(vault.seal(&name("db"), &value).unwrap(), version, "the same again");
        assert_ne!(vault.seal(&name("cache"), &value).unwrap(), version, "two secrets do not look alike");
        // Another server finds it.
        let later = Vault::new(folder.path().join("secrets"));
        assert_eq!(later.open(&version).unwrap(), value);
        assert_eq!(later.seal(&name("db"), &value).unwrap(), version);
        for entry in fs::read_dir(folder.path().join("secrets")).unwrap() {
            use std::os::unix::fs::PermissionsExt as _;
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            let content = fs::read(entry.path()).unwrap();
            assert!(!content.windows(7).any(|part| part == b"battery"), "{:?}", entry.path());
        }
        assert_eq!(format!("{value:?}"), "(a secret)");
    }

    #[test]
    fn what_was_changed_or_is_gone_is_said_and_mended_by_sealing_again() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(folder.path());
        let value = secret("s");
        let version = vault.seal(&name("db"), &value).unwrap();
        let path = folder.path().join(&version.0);
        let content = fs::read(&path).unwrap();
        for at in 0..content.len() {
            let mut changed = content.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert!(matches!(vault.open(&version), Err(VaultError::Damaged(_))), "byte {at}");
            fs::write(&path, &content[..at]).unwrap();
            assert!(matches!(vault.open(&version), Err(VaultError::Damaged(_))), "{at} bytes");
        }
        assert_eq!(vault.seal(&name("db"), &value).unwrap(), version);
        assert_eq!(vault.open(&version).unwrap(), value);
        fs::remove_file(&path).unwrap();
        assert!(matches!(vault.open(&version), Err(VaultError::Unknown(_))));
        for odd in ["", "key", "../../etc/passwd", "0123", &"A".repeat(32)] {
            assert!(matches!(vault.open(&SecretVersion(odd.to_owned())), Err(VaultError::Unknown(_))), "{odd}");
        }
    }

    #[test]
    fn what_nobody_wants_is_given_up_but_not_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(folder.path());
        assert_eq!(vault.retain(|_| false).unwrap(), 0);
        let kept = vault.seal(&name("db"), &secret("new")).unwrap();
        let old = vault.seal(&name("db"), &secret("old")).unwrap();
        let age = |version: &SecretVersion| {
            let file = File::open(folder.path().join(&version.0)).unwrap();
            file.set_modified(SystemTime::now() - SPARED - Duration::from_secs(60)).unwrap();
        };
        assert_eq!(vault.retain(|_| false).unwrap(), 0, "a saved plan may have them");
        age(&kept);
        age(&old);
        vault.seal(&name("db"), &secret("old")).unwrap();
        assert_eq!(vault.retain(|version| *version == kept).unwrap(), 0, "it was asked for again");
        age(&old);
        assert_eq!(vault.retain(|version| *version == kept).unwrap(), 1);
        let later = Vault::new(folder.path());
        assert_eq!(later.open(&kept).unwrap(), secret("new"));
        assert!(matches!(later.open(&old), Err(VaultError::Unknown(_))));
    }

    #[test]
    fn many_at_once_make_one_key() {
        let folder = tempfile::tempdir().unwrap();
        let versions: Vec<SecretVersion> = std::thread::scope(|scope| {
            let seal = || Vault::new(folder.path()).seal(&name("db"), &secret("x")).unwrap();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(seal)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(versions.windows(2).all(|pair| pair[0] == pair[1]), "{versions:?}");
        assert_eq!(Vault::new(folder.path()).open(&versions[0]).unwrap(), secret("x"));
    }
}
