//! The zygote: shims come from it, and nothing depends on it.

use std::{fs, path::Path, time::Instant};

use orchestra_model::quantity::Timespan;
use orchestra_provider::conformance::{Program, Server, term};
use orchestra_provider_process::Cgroups;
use rustix::process::{Pid, Signal, kill_process};

use crate::world::{self, Processes, bench, kill_nine};

/// Parent and command line of a process.
fn process(pid: u32) -> (u32, Vec<u8>) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
    (parent.unwrap_or(0), fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
}

/// The zygotes of a state directory.
fn zygotes(state: &Path) -> Vec<u32> {
    let root = state.join("launches");
    let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let ours = |pid: &u32| {
        let words: Vec<Vec<u8>> = process(*pid).1.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        words.iter().any(|word| word == b"--zygote")
            && words.iter().any(|word| word == root.as_os_str().as_encoded_bytes())
    };
    entries.filter(ours).collect()
}

async fn ready(world: &Processes) -> u32 {
    world::eventually("there is a zygote that waits", || {
        // It names itself once it is about to wait.
        matches!(zygotes(&world.state)[..], [pid]
            if fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "orchestra-shims"))
    })
    .await;
    zygotes(&world.state)[0]
}

async fn end(server: &mut Server, key: &orchestra_model::launch::LaunchKey) {
    server.provider.terminate(key.clone(), term(Timespan::seconds(10))).await.unwrap();
    server.gone(key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shims_come_from_the_zygote_and_look_like_executed_ones() {
    let (world, bench) = bench("forked", Cgroups::Auto);
    let mut server = bench.serve();
    let zygote = ready(&world).await;
    for ordinal in 1..=3 {
        let launch = bench.launch(ordinal, Program::Run);
        let key = launch.key.clone();
        server.provider.start(launch).await.unwrap();
        server.started(&key).await;
        let shim = world::shim_of(&world, &key);
        let (parent, line) = process(shim);
        assert_eq!(parent, zygote);
        let line = String::from_utf8(line).unwrap();
        let folder = world::folder(&world, &key);
        assert_eq!(line.trim_end_matches('\0'), format!("{}\0--inherit\0{}", world::SHIM, folder.display()));
        assert_eq!(fs::read_link(format!("/proc/{shim}/cwd")).unwrap(), folder);
        assert!(fs::read(format!("/proc/{shim}/environ")).unwrap().is_empty(), "nothing ran into its environment");
        // Nothing of the zygote is left open, which would keep it alive or a lock held.
        let open = |pid: u32| {
            let mut links: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .map(|entry| fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned())
                .collect();
            links.sort();
            links
        };
        assert_eq!(open(zygote).iter().filter(|link| !link.starts_with("/dev/null")).count(), 1, "{:?}", open(zygote));
        let locks = open(shim).iter().filter(|link| link.ends_with("/lock")).count();
        assert_eq!(locks, 1, "{:?}", open(shim));
        end(&mut server, &key).await;
        // Nobody has to collect it.
        world::eventually("the shim is gone", || process(shim).0 == 0).await;
    }
    assert_eq!(zygotes(&world.state), [zygote]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_zygote_costs_nothing() {
    let (world, bench) = bench("killed-zygote", Cgroups::Auto);
    let mut server = bench.serve();
    let first = bench.launch(1, Program::Run);
    ready(&world).await;
    server.provider.start(first.clone()).await.unwrap();
    for ordinal in 2..=6 {
        let zygote = ready(&world).await;
        let launch = bench.launch(ordinal, Program::Run);
        // Before, while and after it is asked.
        let (asked, ()) = tokio::join!(server.provider.start(launch.clone()), async {
            if ordinal % 3 > 0 {
                tokio::time::sleep(std::time::Duration::from_micros(100 * u64::from(ordinal))).await;
            }
            kill_nine(zygote);
        });
        asked.unwrap();
        server.started(&launch.key).await;
        world::eventually("another one takes its place", || {
            ![&[][..], &[zygote]].contains(&&zygotes(&world.state)[..])
        })
        .await;
    }
    for ordinal in 1..=6 {
        end(&mut server, &bench.launch(ordinal, Program::Run).key).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_zygote_holds_nothing_up_for_long() {
    let (world, bench) = bench("stopped-zygote", Cgroups::Auto);
    let mut server = bench.serve();
    let zygote = ready(&world).await;
    kill_process(Pid::from_raw(i32::try_from(zygote).unwrap()).unwrap(), Signal::STOP).unwrap();
    let launch = bench.launch(1, Program::Run);
    let began = Instant::now();
    server.provider.start(launch.clone()).await.unwrap();
    server.started(&launch.key).await;
    eprintln!("started after {:?} although its zygote was stopped", began.elapsed());
    world::eventually("it is replaced", || !zygotes(&world.state).contains(&zygote)).await;
    end(&mut server, &launch.key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zygote_ends_with_its_server() {
    let (world, bench) = bench("orphaned-zygote", Cgroups::Auto);
    let file = world.dir.path().join("launch");
    let launch = bench.launch(1, Program::Run);
    let key = launch.key.clone();
    fs::write(&file, serde_json::to_vec(&launch).unwrap()).unwrap();
    let mut served = crate::kill::Served::start(&world.state, &file, "watch", Cgroups::Auto);
    served.until("Started");
    let zygote = ready(&world).await;
    served.kill();
    world::eventually("the zygote has ended", || !world::lives(zygote)).await;
    assert!(world::lives(world::shim_of(&world, &key)), "its shims go on");
    let mut server = bench.serve();
    server.provider.find_by_intent(key.clone()).await.unwrap().unwrap();
    end(&mut server, &key).await;
}
