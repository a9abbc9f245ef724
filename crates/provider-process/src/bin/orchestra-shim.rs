//! The shim alone. Tests and benchmarks run it where `orchestra shim` runs in production.

fn main() -> std::process::ExitCode {
    orchestra_provider_process::shim::main(std::env::args_os().skip(1))
}
