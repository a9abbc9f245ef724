//! Programs that behave badly on purpose, for the tests of this crate; the first argument says how. `serve` is a
//! server that can be killed.
#![expect(unsafe_code, reason = "forks and signal dispositions are what is tested here")]

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        linux::net::SocketAddrExt as _,
        unix::{
            fs::FileExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    process::ExitCode,
};

use orchestra_model::{
    desired::Signal,
    launch::{Launch, ProviderEvent, Termination},
    quantity::Timespan,
};
use orchestra_provider::Provider as _;
use orchestra_provider_process::{Options, ProcessProvider};
use orchestra_task::TaskTree;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // SAFETY: ends the process quietly when its reader is gone, as C programs do.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match args[..] {
        ["run"] => forever(),
        ["spin"] => loop {
            std::hint::spin_loop();
        },
        ["burn", millis] => burn(millis.parse().unwrap()),
        ["exit", code] => ExitCode::from(code.parse::<u8>().unwrap()),
        ["print", stdout, stderr, code] => {
            print(1, stdout.as_bytes());
            print(2, stderr.as_bytes());
            ExitCode::from(code.parse::<u8>().unwrap())
        }
        ["print-and-run", stdout] => {
            print(1, stdout.as_bytes());
            forever()
        }
        ["stubborn"] => {
            ignore_signals();
            print(1, b"armed\n");
            forever()
        }
        ["notify", status] => {
            notify(&format!("READY=1\nSTATUS={status}"));
            forever()
        }
        ["notify-each", ref messages @ ..] => {
            for message in messages {
                notify(message);
            }
            forever()
        }
        ["daemons", count, "and", last] => {
            ignore_signals();
            for _ in 0..count.parse().unwrap() {
                daemon();
            }
            print(1, b"armed\n");
            if last == "exit" { ExitCode::SUCCESS } else { forever() }
        }
        ["storm", chains] => {
            ignore_signals();
            for _ in 0..chains.parse().unwrap() {
                // SAFETY: one thread, and the child only forks on.
                if unsafe { libc::fork() } == 0 {
                    storm();
                }
            }
            print(1, b"armed\n");
            forever()
        }
        ["flood", bytes] => flood(bytes.parse().unwrap()),
        ["count", file] => count(file, 0),
        ["count", file, daemons] => count(file, daemons.parse().unwrap()),
        ["close"] => {
            print(1, b"closing");
            // SAFETY: nothing of the standard library holds these numbers.
            unsafe {
                libc::close(1);
                libc::close(2);
            }
            forever()
        }
        ["report"] => report(),
        ["serve", state, shim, launch, how] => serve(state, shim, launch, how),
        _ => ExitCode::from(2),
    }
}

fn forever() -> ! {
    loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
}

fn ignore_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: passes numbers.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn print(number: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of a slice.
        let written = unsafe { libc::write(number, bytes.as_ptr().cast(), bytes.len()) };
        let Ok(written) = usize::try_from(written) else { return };
        bytes = &bytes[written..];
    }
}

fn notify(message: &str) {
    let name = std::env::var("NOTIFY_SOCKET").unwrap();
    let address = SocketAddr::from_abstract_name(name.strip_prefix('@').unwrap()).unwrap();
    UnixDatagram::unbound().unwrap().send_to_addr(message.as_bytes(), &address).unwrap();
}

/// A grandchild in a session of its own that nobody knows any more.
fn daemon() {
    // SAFETY: one thread; the children only make system calls.
    unsafe {
        if libc::fork() == 0 {
            libc::setsid();
            if libc::fork() == 0 {
                forever();
            }
            libc::_exit(0);
        }
    }
}

/// Never the same process for long: each forks a successor and exits.
fn storm() -> ! {
    loop {
        // SAFETY: one thread; the children only make system calls.
        unsafe {
            match libc::fork() {
                0 => {
                    libc::setsid();
                }
                -1 => {
                    libc::usleep(100);
                }
                _ => libc::_exit(0),
            }
        }
    }
}

/// A child that is reaped and an orphan both use that much CPU time and end; whoever is left uses none.
fn burn(millis: i64) -> ! {
    let spin = || loop {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        if now.tv_sec * 1000 + now.tv_nsec / 1_000_000 >= millis {
            // SAFETY: ends the child without running what belongs to its parent.
            unsafe { libc::_exit(0) }
        }
    };
    // SAFETY: one thread; the children only make system calls.
    unsafe {
        match libc::fork() {
            0 => spin(),
            child => _ = libc::waitpid(child, std::ptr::null_mut(), 0),
        }
        match libc::fork() {
            0 if libc::fork() == 0 => spin(),
            0 => libc::_exit(0),
            child => _ = libc::waitpid(child, std::ptr::null_mut(), 0),
        }
    }
    print(1, b"armed\n");
    forever()
}

/// Blocks of an odd size that begin with their number, so that a lost, doubled or moved piece shows.
fn flood(bytes: u64) -> ExitCode {
    let mut out = io::stdout().lock();
    let mut block: Vec<u8> = (0..4099_u32).map(|at| (at * 31 + (at >> 8)).to_le_bytes()[0]).collect();
    let mut left = usize::try_from(bytes).unwrap();
    for number in 0_u64.. {
        block[..8].copy_from_slice(&number.to_le_bytes());
        let part = left.min(block.len());
        out.write_all(&block[..part]).unwrap();
        left -= part;
        if left == 0 {
            break;
        }
    }
    out.flush().unwrap();
    ExitCode::SUCCESS
}

/// Prints numbers in order and notes in a file up to which one the kernel has taken them.
fn count(file: &str, daemons: u32) -> ExitCode {
    ignore_signals();
    for _ in 0..daemons {
        daemon();
    }
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(file).unwrap();
    for number in 1_u64.. {
        print(if number.is_multiple_of(3) { 2 } else { 1 }, format!("{number}\n").as_bytes());
        file.write_all_at(&number.to_le_bytes(), 0).unwrap();
        if number.is_multiple_of(64) {
            std::thread::yield_now();
        }
        if number.is_multiple_of(1000) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    ExitCode::SUCCESS
}

/// Says everything that a process inherits.
fn report() -> ExitCode {
    let mut text = String::new();
    let mut add = |key: &str, value: String| {
        text.push_str(key);
        text.push('=');
        text.push_str(value.trim_end());
        text.push('\n');
    };
    let mut rest = Vec::new();
    let read = io::stdin().read_to_end(&mut rest).unwrap();
    add("stdin", read.to_string());
    let mut env: Vec<String> = std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    env.sort();
    add("env", env.join("|"));
    add("directory", std::env::current_dir().unwrap().display().to_string());
    let status = fs::read_to_string("/proc/self/status").unwrap();
    for key in ["Umask", "SigBlk", "SigIgn"] {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
        add(key, line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    for (name, key) in [("Max open files", "nofile"), ("Max core file size", "core")] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        add(key, line.split_whitespace().take(2).collect::<Vec<_>>().join(" "));
    }
    let listing = fs::File::open("/proc/self/fd").unwrap();
    let own = listing.as_raw_fd();
    let mut fds: Vec<i32> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().ok())
        .collect();
    fds.sort_unstable();
    // One for the listing above, one for the reading of it.
    add("fds", fds.iter().filter(|fd| **fd < own).map(ToString::to_string).collect::<Vec<_>>().join(" "));
    add("pgrp", (rustix::process::getpgrp() == rustix::process::getpid()).to_string());
    print(1, text.as_bytes());
    ExitCode::SUCCESS
}

/// A server: starts or adopts a launch, prints its events, and ends with it.
fn serve(state: &str, shim: &str, launch: &str, how: &str) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut options = Options::below(state.as_ref(), shim);
        options.shim_args.clear();
        if std::env::var_os("TORTURE_NO_CGROUPS").is_some() {
            options.cgroups = orchestra_provider_process::Cgroups::Off;
        }
        let provider = ProcessProvider::open(options, TaskTree::new()).unwrap();
        let mut events = provider.take_events().unwrap();
        let launch: Launch = serde_json::from_slice(&fs::read(launch).unwrap()).unwrap();
        let key = launch.key.clone();
        provider.start(launch).await.unwrap();
        print(1, b"serving\n");
        if how == "terminate" {
            let how = Termination { signal: Signal::Term, grace: Timespan::millis(20) };
            provider.terminate(key, how).await.unwrap();
        }
        while let Some((_, event)) = events.recv().await {
            print(1, format!("{}\n", serde_json::to_string(&event).unwrap()).as_bytes());
            if event == ProviderEvent::Gone {
                break;
            }
        }
        ExitCode::SUCCESS
    })
}
