//! One module per command or family of commands. Each asks the API and renders the answer.

pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod environments;
pub(crate) mod events;
pub(crate) mod explain;
pub(crate) mod flags;
pub(crate) mod history;
pub(crate) mod init;
pub(crate) mod install;
pub(crate) mod logs;
pub(crate) mod plan;
pub(crate) mod rollout;
pub(crate) mod runs;
pub(crate) mod server;
pub(crate) mod status;
pub(crate) mod tls;
pub(crate) mod traffic;

#[cfg(test)]
pub(crate) mod tests;
