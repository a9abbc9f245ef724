//! x
/// Runs a proxy process until it was told to end (`orchestra proxy --home DIR`), and returns its exit code.
///
/// `args` are those after the word `proxy`.
pub fn main(args: impl IntoIterator<Item = std::ffi::OsString>) -> std::process::ExitCode {
    drop(args.into_iter());
    std::process::ExitCode::FAILURE
}
