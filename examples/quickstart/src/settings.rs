//! Settings, all from the environment.

use std::{fmt::Display, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

/// An error that ends a program; its text is for the log.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The variable, if it is set and not empty.
pub fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The variable as a value, or `default` if it is not set.
pub fn value<T: FromStr<Err: Display>>(name: &str, default: T) -> Result<T, Error> {
    match text(name) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|error| format!("{name}={text}: {error}").into()),
    }
}

/// The variable in whole milliseconds.
pub fn millis(name: &str, default: u64) -> Result<Duration, Error> {
    Ok(Duration::from_millis(value(name, default)?))
}

/// Where to listen: `$HOST` (127.0.0.1) and `$PORT`.
pub fn address() -> Result<SocketAddr, Error> {
    let host = value("HOST", std::net::IpAddr::from([127, 0, 0, 1]))?;
    let port = text("PORT").ok_or("PORT is not set")?;
    Ok(SocketAddr::new(host, port.parse().map_err(|error| format!("PORT={port}: {error}"))?))
}

/// The database on the volume: `agents.db` in `$DATA_DIR`.
pub fn database() -> Result<PathBuf, Error> {
    Ok(PathBuf::from(text("DATA_DIR").ok_or("DATA_DIR is not set")?).join("agents.db"))
}
