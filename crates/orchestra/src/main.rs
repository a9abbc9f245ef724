//! The one binary: chooses a role, wires the adapters to the ports, and turns the outcome into an exit code.
//!
//! | role | command | lives |
//! |---|---|---|
//! | client | everything else | as long as the command |
//! | control plane | `orchestra server run` | until it is stopped; started by itself |
//! | data plane | `orchestra proxy` | outlives the control plane |
//! | supervisor of one instance | `orchestra shim` | as long as its instance; outlives both |

mod client;
mod daemon;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let program = arguments.next();
    // The shim first, and before anything is allocated that it does not need: there is one per instance.
    match arguments.next() {
        Some(role) if role == "shim" => orchestra_provider_process::shim::main(arguments),
        Some(role) if role == "proxy" => orchestra_proxy::main(arguments),
        first => client::main(program.into_iter().chain(first).chain(arguments)),
    }
}
