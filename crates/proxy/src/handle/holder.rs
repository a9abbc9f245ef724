//! Who holds a TCP address: for error messages that name the culprit.
//!
//! `/proc/net/tcp` and `/proc/net/tcp6` give the inode of the listening socket (fields of `proc_pid_net(5)`), and
//! `/proc/PID/fd` the process that has it open. Processes of other users are invisible without privileges: then the
//! answer is `None`.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// A process in words, such as `nginx (pid 812)`.
pub(super) fn of(address: SocketAddr) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        text.lines().skip(1).find_map(|line| listening(line, address))
    })?;
    let wanted = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) else { continue };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = |file: fs::DirEntry| fs::read_link(file.path()).is_ok_and(|link| link.as_os_str() == &*wanted);
        if files.flatten().any(holds) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (pid {pid})", program.trim()));
        }
    }
    None
}

/// The inode of a line of `/proc/net/tcp*` if it listens where `address` would.
fn listening(line: &str, address: SocketAddr) -> Option<u64> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (ip, port) = fields.get(1)?.split_once(':')?;
    if *fields.get(3)? != LISTEN || u16::from_str_radix(port, 16).ok()? != address.port() {
        return None;
    }
    let ip = parse_ip(ip)?;
    let same = ip == address.ip() || ip.is_unspecified() || address.ip().is_unspecified();
    if same { fields.get(9)?.parse().ok() } else { None }
}

/// The kernel prints addresses as 32-bit words in the byte order of the machine.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let words: Option<Vec<[u8; 4]>> = text
        .as_bytes()
        .chunks(8)
        .map(|w| Some(u32::from_str_radix(std::str::from_utf8(w).ok()?, 16).ok()?.to_ne_bytes()))
        .collect();
    match words?.as_slice() {
        [v4] => Some(Ipv4Addr::from(*v4).into()),
        v6 => {
            let bytes: [u8; 16] = v6.concat().try_into().ok()?;
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_itself() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let holder = of(listener.local_addr().unwrap()).unwrap();
            assert!(holder.ends_with(&format!("(pid {})", std::process::id())), "{holder}");
        }
    }

    #[test]
    fn reads_the_kernels_notation() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 4242 1 0 100";
        assert_eq!(listening(line, "127.0.0.1:8080".parse().unwrap()), Some(4242));
        assert_eq!(listening(line, "0.0.0.0:8080".parse().unwrap()), Some(4242));
        assert_eq!(listening(line, "127.0.0.2:8080".parse().unwrap()), None);
        assert_eq!(listening(line, "127.0.0.1:8081".parse().unwrap()), None);
        assert_eq!(listening(&line.replace(" 0A ", " 01 "), "127.0.0.1:8080".parse().unwrap()), None);
        assert_eq!(listening("garbage", "127.0.0.1:8080".parse().unwrap()), None);
    }
}
