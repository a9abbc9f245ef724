//! The proxy process alone, for tests of this crate; users get it as `orchestra proxy`.

fn main() -> std::process::ExitCode {
    orchestra_proxy::main(std::env::args_os().skip(1))
}
