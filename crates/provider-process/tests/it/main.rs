//! The process provider with real processes.

mod behaviour;
mod kill;
mod torture;
mod world;
mod zygote;

use orchestra_provider::conformance;
use orchestra_provider_process::Cgroups;

#[tokio::test(flavor = "multi_thread")]
async fn the_process_provider_conforms() {
    conformance::run(|| world::Processes::new(Cgroups::Auto)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_provider_conforms_without_control_groups() {
    conformance::run(|| world::Processes::new(Cgroups::Off)).await;
}
