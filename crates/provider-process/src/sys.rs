//! System calls that have no safe wrapper: fork into a control group, the way from fork to exec, messages with
//! credentials, and what the kernel knows of a process that is gone.

#![expect(unsafe_code, reason = "fork, exec, signal dispositions and control messages have no safe interface")]

use std::{
    ffi::{CStr, CString, c_char, c_int},
    io,
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    ptr,
};

use orchestra_model::desired::Limit;

/// Ids to run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Looks up a user by name or as `UID` or `UID:GID`.
pub(crate) fn find_user(text: &str) -> io::Result<Option<User>> {
    if let Some((uid, gid)) = text.split_once(':')
        && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
    {
        return Ok(Some(User { uid, gid, groups: vec![gid] }));
    }
    let number: Option<u32> = text.parse().ok();
    let Ok(name) = CString::new(text) else { return Ok(None) };
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let mut buffer: Vec<c_char> = vec![0; 4096];
    let entry = loop {
        let mut found = ptr::null_mut();
        // SAFETY: all pointers are to live memory of the given sizes; `found` is null or points to `entry`.
        let error = unsafe {
            match number {
                Some(uid) => {
                    libc::getpwuid_r(uid, entry.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &raw mut found)
                }
                None => libc::getpwnam_r(
                    name.as_ptr(),
                    entry.as_mut_ptr(),
                    buffer.as_mut_ptr(),
                    buffer.len(),
                    &raw mut found,
                ),
            }
        };
        match error {
            libc::ERANGE if buffer.len() < 1 << 20 => buffer.resize(buffer.len() * 4, 0),
            0 if found.is_null() => {
                return Ok(number.map(|uid| User { uid, gid: uid, groups: vec![uid] }));
            }
            // SAFETY: a non-null result means that the entry was filled in.
            0 => break unsafe { entry.assume_init() },
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    };
    let mut groups: Vec<u32> = vec![0; 64];
    loop {
        let mut count = c_int::try_from(groups.len()).unwrap_or(c_int::MAX);
        // SAFETY: `pw_name` points into `buffer`, which lives; `groups` has room for `count` ids.
        let enough =
            unsafe { libc::getgrouplist(entry.pw_name, entry.pw_gid, groups.as_mut_ptr(), &raw mut count) } >= 0;
        let count = usize::try_from(count).unwrap_or(0);
        groups.resize(count, 0);
        if enough {
            return Ok(Some(User { uid: entry.pw_uid, gid: entry.pw_gid, groups }));
        }
    }
}

pub(crate) fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Signals that people and init systems send to whole sessions; the shim has to outlive them.
const IGNORED: [c_int; 10] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    // The server's own limits must not kill the shim either.
    libc::SIGXFSZ,
    libc::SIGXCPU,
];

/// Makes the calling process deaf to [`IGNORED`] and gives it a descriptor that reports the end of children.
pub(crate) fn prepare_signals() -> io::Result<OwnedFd> {
    // SAFETY: only integers and local, initialised signal sets are passed.
    unsafe {
        for signal in IGNORED {
            libc::signal(signal, libc::SIG_IGN);
        }
        // A server that ignores SIGCHLD would hand that on, and the kernel would throw our children's ends away.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut set = mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Makes the calling process deaf to [`IGNORED`], and lets the kernel throw the ends of its children away.
pub(crate) fn ignore_children() -> io::Result<()> {
    for signal in IGNORED.into_iter().chain([libc::SIGCHLD]) {
        // SAFETY: passes numbers.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Forks the calling process, which must have one thread. Returns whether the caller is the child.
pub(crate) fn fork() -> io::Result<bool> {
    // SAFETY: one thread, so the copied address space is consistent and the child may do what its parent may.
    match unsafe { libc::fork() } {
        0 => Ok(true),
        1.. => Ok(false),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Overwrites the arguments that the kernel gave to this process, as `ps` shows them. The range must lie within what
/// `/proc/self/stat` calls `arg_start` to `arg_end`.
pub(crate) fn overwrite_arguments(address: usize, text: &[u8]) {
    let place = ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: the range is writable memory of this process on its initial stack. No Rust value refers to it: the
    // standard library has copied what it gave out, and this process has one thread.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), place, text.len()) };
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) {
    // SAFETY: called before this process has opened any descriptor of its own.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) < 0 {
            for fd in first..4096 {
                libc::close(RawFd::try_from(fd).unwrap_or(-1));
            }
        }
    }
}

/// Takes a descriptor that was inherited under a number, away from that number.
pub(crate) fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: duplicating does not invalidate anybody's descriptor; the new one is owned by nobody else.
    unsafe {
        let fd = libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 10);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Puts `/dev/null` on the three standard descriptors.
pub(crate) fn null_standard(null: BorrowedFd<'_>) -> io::Result<()> {
    for number in 0..3 {
        // SAFETY: the standard descriptors are not owned by any Rust value of the shim.
        if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Where on the way to exec a child failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Group = 1,
    Streams,
    Limit,
    User,
    Directory,
    Exec,
}

/// All that a child needs, prepared before the fork: between fork and exec nothing may be allocated.
#[derive(Debug)]
pub(crate) struct Child {
    /// Candidates for the program, tried in order as `execvp` does.
    pub(crate) programs: Vec<CString>,
    pub(crate) args: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) directory: CString,
    pub(crate) user: Option<User>,
    pub(crate) umask: u32,
    pub(crate) limits: Vec<(Limit, u64)>,
    /// A session of its own; otherwise only a process group.
    pub(crate) session: bool,
}

/// Descriptors that a child uses.
#[derive(Debug)]
pub(crate) struct ChildFds<'a> {
    pub(crate) stdin: BorrowedFd<'a>,
    pub(crate) stdout: BorrowedFd<'a>,
    pub(crate) stderr: BorrowedFd<'a>,
    /// The child executes once it can read a byte from the first, and ends if it cannot. The second is the writing end,
    /// which the child closes in itself, so that it ends with the shim.
    pub(crate) go: Option<(BorrowedFd<'a>, BorrowedFd<'a>)>,
    /// Gets a [`Step`], an argument and an error number if the child fails; closed by a successful exec.
    pub(crate) failure: BorrowedFd<'a>,
    /// Directory of the control group to start in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// A child that was forked.
#[derive(Debug)]
pub(crate) struct Forked {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
    /// Whether it is in the control group it was meant for.
    pub(crate) in_cgroup: bool,
}

/// Forks a child that prepares itself, waits for `go` and executes. The calling process must have one thread.
pub(crate) fn fork_exec(child: &Child, fds: &ChildFds<'_>) -> io::Result<Forked> {
    let argv = pointers(&child.args);
    let envp = pointers(&child.env);
    let mut in_cgroup = fds.cgroup.is_some();
    let mut pidfd: c_int = -1;
    // The child is born as deaf as we are ([`IGNORED`]), and may be told to stop before it has run at all. A blocked signal
    // waits even if it is ignored at that moment (signal(7)); `run_child` unblocks it once it has its default action.
    let blocked = BlockedSignals::all()?;
    // SAFETY: one thread, so the copied address space is consistent; the arguments outlive the call.
    let mut pid = unsafe { clone3(&mut pidfd, fds.cgroup) };
    if pid < 0 && in_cgroup {
        // An older kernel, or a sandbox that knows no clone3 or does not let us into the group.
        in_cgroup = false;
        // SAFETY: as above.
        pid = unsafe { clone3(&mut pidfd, None) };
    }
    if pid < 0 {
        // SAFETY: as above.
        pid = unsafe { libc::fork() }.into();
    }
    if pid != 0 {
        drop(blocked);
    }
    match pid {
        0 => {
            // SAFETY: this is the child of a process with one thread; `argv` and `envp` are null-terminated arrays of
            // C strings that live in its copy of the address space.
            unsafe { run_child(child, fds, &argv, &envp) }
        }
        1.. => {
            let pid = u32::try_from(pid).unwrap_or(0);
            let pidfd = if pidfd >= 0 {
                // SAFETY: the kernel made this descriptor for us.
                unsafe { OwnedFd::from_raw_fd(pidfd) }
            } else {
                pidfd_open(pid)?
            };
            Ok(Forked { pid, pidfd, in_cgroup })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// All signals wait until this is dropped.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn all() -> io::Result<Self> {
        // SAFETY: only local signal sets are passed; the first is initialised by the C library, the second by the kernel.
        unsafe {
            let (mut all, mut before) = (mem::zeroed::<libc::sigset_t>(), mem::zeroed::<libc::sigset_t>());
            libc::sigfillset(&raw mut all);
            if libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut before) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { before })
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set is what the kernel gave us.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut()) };
    }
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
}

/// `clone3(2)` as a fork that also yields a pidfd and starts in a control group.
///
/// # Safety
/// The process must have one thread.
unsafe fn clone3(pidfd: &mut c_int, cgroup: Option<BorrowedFd<'_>>) -> i64 {
    #[repr(C, align(8))]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    const CLONE_PIDFD: u64 = 0x1000;
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let args = CloneArgs {
        flags: CLONE_PIDFD | if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 },
        pidfd: ptr::from_mut(pidfd) as u64,
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        cgroup: cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
        ..CloneArgs::default()
    };
    // SAFETY: the structure is laid out as the kernel wants it, and its size is passed.
    unsafe { libc::syscall(libc::SYS_clone3, &raw const args, mem::size_of::<CloneArgs>()) }
}

/// From fork to exec. Calls only what is safe there: no allocation, no locks.
///
/// # Safety
/// Must run in the child of a process with one thread.
unsafe fn run_child(child: &Child, fds: &ChildFds<'_>, argv: &[*const c_char], envp: &[*const c_char]) -> ! {
    let fail = |step: Step, argument: u8| -> ! {
        let error = io::Error::last_os_error().raw_os_error().unwrap_or(0).to_le_bytes();
        let report = [step as u8, argument, error[0], error[1], error[2], error[3]];
        // SAFETY: writes a local array to an open descriptor, then ends without running destructors of the parent.
        unsafe {
            libc::write(fds.failure.as_raw_fd(), report.as_ptr().cast(), report.len());
            libc::_exit(127)
        }
    };
    // SAFETY: system calls with pointers to live memory.
    unsafe {
        if (if child.session { libc::setsid() } else { libc::setpgid(0, 0) }) < 0 {
            fail(Step::Group, 0);
        }
        // By the system call: the C library refuses to touch the two signals that it uses itself. A zeroed structure
        // means the default action.
        let default = [0_u64; 4];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), ptr::null::<u64>(), 8);
        }
        let mut none = mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        for (fd, number) in [(fds.stdin, 0), (fds.stdout, 1), (fds.stderr, 2)] {
            if libc::dup2(fd.as_raw_fd(), number) < 0 {
                fail(Step::Streams, 0);
            }
        }
        libc::umask(child.umask);
        for (index, (limit, value)) in child.limits.iter().enumerate() {
            let value = libc::rlimit { rlim_cur: *value, rlim_max: *value };
            if libc::setrlimit(resource(*limit), &raw const value) < 0 {
                fail(Step::Limit, u8::try_from(index).unwrap_or(u8::MAX));
            }
        }
        if let Some(user) = &child.user
            && (libc::setgroups(user.groups.len(), user.groups.as_ptr()) < 0
                || libc::setgid(user.gid) < 0
                || libc::setuid(user.uid) < 0)
        {
            fail(Step::User, 0);
        }
        if libc::chdir(child.directory.as_ptr()) < 0 {
            fail(Step::Directory, 0);
        }
        if let Some((go, writer)) = fds.go {
            libc::close(writer.as_raw_fd());
            let mut byte = 0_u8;
            // End of file: the shim died before it had recorded us, so we must never have existed.
            if libc::read(go.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(127);
            }
        }
        // Everything above the standard streams is closed by exec, whoever opened it.
        libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        // As execvp: go on along the path where there is no such file, but remember a file that may not be run.
        let mut denied = false;
        for program in &child.programs {
            libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
            match *libc::__errno_location() {
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR => {}
                _ => fail(Step::Exec, 0),
            }
        }
        if denied {
            *libc::__errno_location() = libc::EACCES;
        }
        fail(Step::Exec, 0)
    }
}

const fn resource(limit: Limit) -> libc::__rlimit_resource_t {
    match limit {
        Limit::Nofile => libc::RLIMIT_NOFILE,
        Limit::Nproc => libc::RLIMIT_NPROC,
        Limit::Core => libc::RLIMIT_CORE,
        Limit::As => libc::RLIMIT_AS,
        Limit::Memlock => libc::RLIMIT_MEMLOCK,
        Limit::Stack => libc::RLIMIT_STACK,
        Limit::Fsize => libc::RLIMIT_FSIZE,
        Limit::Cpu => libc::RLIMIT_CPU,
    }
}

/// A descriptor for a process.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Sends a signal to the process behind a descriptor. A process that is gone is no error.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: c_int) {
    // SAFETY: passes a descriptor, a number and no further information.
    unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, ptr::null::<libc::siginfo_t>(), 0);
    }
}

pub(crate) fn kill(pid: u32, signal: c_int) {
    if let Ok(pid) = i32::try_from(pid)
        && pid > 1
    {
        // SAFETY: passes numbers only.
        unsafe {
            libc::kill(pid, signal);
        }
    }
}

/// What the kernel remembers of the process behind a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PidfdInfo {
    /// Wait status, once it is reaped (Linux 6.15).
    pub(crate) wait_status: Option<i32>,
    /// Inode number of its control group's directory.
    pub(crate) cgroup: Option<u64>,
}

/// `PIDFD_GET_INFO` (Linux 6.13); nothing on older kernels.
pub(crate) fn pidfd_info(pidfd: BorrowedFd<'_>) -> PidfdInfo {
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const CGROUP: u64 = 1 << 2;
    const EXIT: u64 = 1 << 3;
    // _IOWR(0xFF, 11, struct of 64 bytes): the first published size of the structure.
    const PIDFD_GET_INFO: u64 = (3 << 30) | (64 << 16) | (0xFF << 8) | 0x0B;
    let mut info = Info { mask: CGROUP | EXIT, ..Info::default() };
    // SAFETY: the structure has the 64 bytes that are encoded in the request.
    if unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) } < 0 {
        return PidfdInfo::default();
    }
    PidfdInfo {
        wait_status: (info.mask & EXIT != 0).then_some(info.exit_code),
        cgroup: (info.mask & CGROUP != 0).then_some(info.cgroup),
    }
}

/// A child that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reaped {
    pub(crate) pid: u32,
    pub(crate) wait_status: i32,
}

/// What [`reap`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reap {
    One(Reaped),
    /// There are children, all alive.
    Later,
    /// There are no children.
    Childless,
}

/// Reaps any one child that ended.
pub(crate) fn reap() -> Reap {
    let mut wait_status = 0;
    loop {
        // SAFETY: passes a pointer to a local.
        let pid = unsafe { libc::waitpid(-1, &raw mut wait_status, libc::WNOHANG | libc::__WALL) };
        return match pid {
            0 => Reap::Later,
            1.. => Reap::One(Reaped { pid: pid.unsigned_abs(), wait_status }),
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => continue,
            _ => Reap::Childless,
        };
    }
}

/// Lets notify datagrams carry the sender's credentials and, where the kernel can, a descriptor of the sender.
pub(crate) fn pass_credentials(socket: BorrowedFd<'_>) -> io::Result<()> {
    const SO_PASSPIDFD: c_int = 76;
    let on: c_int = 1;
    let size = libc::socklen_t::try_from(mem::size_of::<c_int>()).unwrap_or(4);
    let set = |option| {
        // SAFETY: passes a pointer to a local of the given size.
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const on).cast(), size) }
    };
    if set(libc::SO_PASSCRED) < 0 {
        return Err(io::Error::last_os_error());
    }
    // Linux 6.5; without it, senders that are gone cannot be checked and are not believed.
    set(SO_PASSPIDFD);
    Ok(())
}

/// A datagram with its sender.
#[derive(Debug)]
pub(crate) struct Datagram {
    pub(crate) len: usize,
    pub(crate) pid: Option<u32>,
    pub(crate) pidfd: Option<OwnedFd>,
}

/// Receives one datagram. Descriptors that came with it (`FDSTORE`, `BARRIER`) are closed.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
    const SCM_PIDFD: c_int = 4;
    // Room for credentials, a pidfd and the 253 descriptors that the kernel allows at most (SCM_MAX_FD).
    let mut control = [0_u64; 160];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a zeroed header is valid and is filled in below with pointers to live memory and their sizes.
    let mut header = unsafe { mem::zeroed::<libc::msghdr>() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of_val(&control);
    // SAFETY: see above.
    let len =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
    let Ok(len) = usize::try_from(len) else { return Err(io::Error::last_os_error()) };
    let mut datagram = Datagram { len, pid: None, pidfd: None };
    // SAFETY: the kernel wrote well-formed control messages; each is read within its own length.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            let size = (*message).cmsg_len - (data as usize - message as usize);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                    let credentials = data.cast::<libc::ucred>().read_unaligned();
                    datagram.pid = u32::try_from(credentials.pid).ok().filter(|pid| *pid > 0);
                }
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for index in 0..size / mem::size_of::<RawFd>() {
                        let fd = data.add(index * mem::size_of::<RawFd>()).cast::<[u8; 4]>().read();
                        drop(OwnedFd::from_raw_fd(RawFd::from_ne_bytes(fd)));
                    }
                }
                (libc::SOL_SOCKET, SCM_PIDFD) => {
                    let fd = RawFd::from_ne_bytes(data.cast::<[u8; 4]>().read());
                    datagram.pidfd = (fd >= 0).then(|| OwnedFd::from_raw_fd(fd));
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    Ok(datagram)
}

/// User at the other end of a Unix socket.
pub(crate) fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(socket.as_fd())?.uid.as_raw())
}

/// Names the process for `ps`; at most 15 bytes are kept.
pub(crate) fn name_process(name: &CStr) {
    let _ = rustix::thread::set_name(name);
}

/// Waits on a descriptor that the kernel makes readable. Must be called within a tokio runtime.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and the same descriptor as long as it lives, and it lives in the `AsyncFd`.
    let watched = unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) };
    watched.map_err(Into::into)
}
