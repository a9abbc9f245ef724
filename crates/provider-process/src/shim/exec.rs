//! Commands that run beside the program, for `exec` checks: same environment, directory, user, limits and group.
//!
//! Each gets a session and, where there are control groups, a group of its own below the instance's, so that its whole
//! tree ends with it or with its deadline, whatever it forked.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use orchestra_model::launch::Exit;
use rustix::{io::Errno, pipe::PipeFlags};

use super::{
    launch,
    tree::{Tree, open_group},
};
use crate::{
    cgroup, clock,
    folder::LaunchFile,
    sys::{self, Child, ChildFds, Reaped},
};

/// Output that is kept; the rest is read and dropped, so that the command is not held up by it.
const MAX_OUTPUT: usize = 4096;
/// Commands at a time.
const MAX_RUNNING: usize = 64;
/// Time that a killed command's pipe may still be open for, before it is given up.
const CLOSE_MILLIS: u64 = 200;

/// All commands that run now.
#[derive(Debug, Default)]
pub(crate) struct Execs {
    running: Vec<Running>,
    next: u64,
    /// Groups that could not be removed yet because a process in them was still on its way out.
    leftover: Vec<PathBuf>,
}

#[derive(Debug)]
struct Running {
    /// Ours.
    number: u64,
    /// Of the request, and who made it.
    id: u64,
    connection: u64,
    child: Child,
    pid: u32,
    group: Option<PathBuf>,
    output: Option<OwnedFd>,
    failure: Option<OwnedFd>,
    text: Vec<u8>,
    deadline: u64,
    timed_out: bool,
    exit: Option<Exit>,
    /// Set when the command ended: when its pipe is given up.
    close_at: Option<u64>,
}

/// A command that came to its end.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) id: u64,
    pub(crate) connection: u64,
    pub(crate) exit: Option<Exit>,
    pub(crate) output: String,
}

impl Execs {
    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Starts a command.
    pub(crate) fn start(
        &mut self,
        file: &LaunchFile,
        tree: &Tree,
        null: BorrowedFd<'_>,
        (connection, id): (u64, u64),
        command: &[String],
        timeout_ms: u64,
    ) -> Result<(), String> {
        if self.running.len() >= MAX_RUNNING {
            return Err(format!("{MAX_RUNNING} commands already run beside this instance"));
        }
        self.sweep();
        self.next += 1;
        let number = self.next;
        let child = launch::prepare(file, command, Some((number, tree.group().is_none())))?;
        let group = tree
            .group()
            .map(|group| group.join(format!("exec-{number}")))
            .filter(|group| cgroup::create(group, &orchestra_model::desired::Resources::default()).is_ok());
        let started = || -> io::Result<_> {
            let (failure, child_failure) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (output, child_output) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&output, true)?;
            let directory = group.as_ref().map(open_group).transpose()?;
            let forked = sys::fork_exec(
                &child,
                &ChildFds {
                    stdin: null,
                    stdout: child_output.as_fd(),
                    stderr: child_output.as_fd(),
                    go: None,
                    failure: child_failure.as_fd(),
                    cgroup: directory.as_ref().map(|fd| fd.as_fd()),
                },
            )?;
            Ok((forked.pid, output, failure))
        };
        match started() {
            Ok((pid, output, failure)) => {
                self.running.push(Running {
                    number,
                    id,
                    connection,
                    child,
                    pid,
                    group,
                    output: Some(output),
                    failure: Some(failure),
                    text: Vec::new(),
                    deadline: clock::boot_millis().saturating_add(timeout_ms),
                    timed_out: false,
                    exit: None,
                    close_at: None,
                });
                Ok(())
            }
            Err(error) => {
                self.leftover.extend(group);
                Err(format!("the command cannot be started: {error}"))
            }
        }
    }

    /// Descriptors to wait for.
    pub(crate) fn outputs(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.running.iter().filter_map(|exec| Some((exec.number, exec.output.as_ref()?.as_fd())))
    }

    /// Reads what a command printed.
    pub(crate) fn read(&mut self, number: u64) {
        let Some(exec) = self.running.iter_mut().find(|exec| exec.number == number) else { return };
        exec.read();
    }

    /// Takes a child's end, if it was a command's.
    pub(crate) fn reaped(&mut self, reaped: Reaped, file: &LaunchFile, tree: &Tree) -> bool {
        let Some(exec) = self.running.iter_mut().find(|exec| exec.pid == reaped.pid && exec.exit.is_none()) else {
            return false;
        };
        exec.exit = Some(super::supervise::exit_of(reaped.wait_status));
        if let Some(failure) = exec.failure.take()
            && let Some(message) = launch::read_failure(failure, &exec.child, &file.launch)
        {
            exec.exit = Some(Exit::NotStarted);
            exec.text = message.into_bytes();
        }
        tree.kill_exec(exec.group.as_ref(), exec.pid, exec.number);
        exec.close_at = Some(clock::boot_millis() + CLOSE_MILLIS);
        exec.read();
        true
    }

    /// Kills all commands, because the launch ends.
    pub(crate) fn abort(&mut self, tree: &Tree) {
        for exec in &mut self.running {
            exec.timed_out = true;
            exec.deadline = u64::MAX;
            tree.kill_exec(exec.group.as_ref(), exec.pid, exec.number);
        }
    }

    /// Kills the commands of a connection that is no more.
    pub(crate) fn abandon(&mut self, connection: u64, tree: &Tree) {
        for exec in self.running.iter_mut().filter(|exec| exec.connection == connection) {
            exec.timed_out = true;
            exec.deadline = u64::MAX;
            tree.kill_exec(exec.group.as_ref(), exec.pid, exec.number);
        }
    }

    /// Next time at which [`Self::tick`] has something to do.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.running.iter().map(|exec| exec.close_at.unwrap_or(exec.deadline)).filter(|at| *at != u64::MAX).min()
    }

    /// Kills those whose time is over, and returns those that ended.
    pub(crate) fn tick(&mut self, now: u64, tree: &Tree) -> Vec<Finished> {
        let mut finished = Vec::new();
        for exec in &mut self.running {
            if exec.exit.is_none() && exec.deadline <= now {
                exec.timed_out = true;
                // Once more in a while, should it have forked faster than it could be killed.
                exec.deadline = now + CLOSE_MILLIS;
                sys::kill(exec.pid, libc::SIGKILL);
                tree.kill_exec(exec.group.as_ref(), exec.pid, exec.number);
            }
        }
        self.running.retain_mut(|exec| {
            let over = exec.close_at.is_some_and(|at| exec.output.is_none() || at <= now);
            if over {
                self.leftover.extend(exec.group.take());
                finished.push(Finished {
                    id: exec.id,
                    connection: exec.connection,
                    exit: if exec.timed_out { None } else { exec.exit },
                    output: String::from_utf8_lossy(&exec.text).into_owned(),
                });
            }
            !over
        });
        if !finished.is_empty() {
            self.sweep();
        }
        finished
    }

    fn sweep(&mut self) {
        self.leftover.retain(|group| cgroup::remove(group).is_err());
    }
}

impl Running {
    fn read(&mut self) {
        let mut buffer = [0; 4096];
        // A bounded number of turns: a command that floods is read again after everybody else.
        for _ in 0..32 {
            let Some(output) = &self.output else { return };
            match rustix::io::read(output, &mut buffer) {
                Ok(0) => self.output = None,
                Ok(read) => {
                    let room = MAX_OUTPUT - self.text.len().min(MAX_OUTPUT);
                    self.text.extend_from_slice(&buffer[..read.min(room)]);
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// What a command that cannot be started is answered with.
pub(crate) fn not_started(connection: u64, id: u64, message: String) -> Finished {
    Finished { id, connection, exit: Some(Exit::NotStarted), output: message }
}
