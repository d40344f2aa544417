//! Whether the process at the other end of a half-closed connection has closed it, if it runs on this host.
//!
//! A FIN does not tell a caller that waits for its response (`shutdown`) from one that has left (`close`). The kernel of the
//! caller's host knows: a socket that no process holds has no inode. For a caller in the same network namespace, as the app
//! beside a sidecar is, that kernel is ours, and it answers one question about one connection (sock_diag(7)).

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// Bytes of the header of a netlink message, of the question (`inet_diag_req_v2`), and of the answer (`inet_diag_msg`).
const HEADER: usize = 16;
const QUESTION: usize = 56;
const ANSWER: usize = 72;

/// True if the connection from `peer` to `local` is held by no process of this host any more; false if one holds it, or if
/// the peer is on another host.
pub fn is_closed(peer: SocketAddr, local: SocketAddr) -> bool {
    ask(&question(peer, local)).is_ok_and(|answer| inode(&answer) == Some(0))
}

fn ask(question: &[u8]) -> io::Result<Vec<u8>> {
    let mut kernel = Socket::new(Domain::from(AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    // The kernel answers while it takes the question; without an answer there is nothing to wait for.
    kernel.set_nonblocking(true)?;
    kernel.send(question)?;
    let mut answer = vec![0; 1024];
    let length = kernel.read(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

fn question(peer: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let (from, to) = (peer.ip().to_canonical(), local.ip().to_canonical());
    let family = if from.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut message = Vec::with_capacity(HEADER + QUESTION);
    message.extend_from_slice(&u32::try_from(HEADER + QUESTION).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and port, of which only the answer would have use.
    message.extend_from_slice(&[0; 8]);
    // No extensions; any state.
    message.extend_from_slice(&[family, IPPROTO_TCP, 0, 0]);
    message.extend_from_slice(&u32::MAX.to_ne_bytes());
    message.extend_from_slice(&peer.port().to_be_bytes());
    message.extend_from_slice(&local.port().to_be_bytes());
    message.extend_from_slice(&octets(from));
    message.extend_from_slice(&octets(to));
    // Any interface, no cookie.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&[u8::MAX; 8]);
    message
}

/// The address in the 16 bytes that the kernel has for it.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(v6) => v6.octets(),
        IpAddr::V4(v4) => {
            let mut all = [0; 16];
            all[..4].copy_from_slice(&v4.octets());
            all
        }
    }
}

/// The inode in an answer, which is its last field; `None` if the answer is an error, such as that of an unknown connection.
fn inode(answer: &[u8]) -> Option<u32> {
    let kind = answer.get(4..6)?;
    let inode = answer.get(HEADER + ANSWER - 4..HEADER + ANSWER)?;
    (kind == SOCK_DIAG_BY_FAMILY.to_ne_bytes()).then(|| u32::from_ne_bytes([inode[0], inode[1], inode[2], inode[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpListener, TcpStream};

    fn pair(bind: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(bind).unwrap();
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (caller, listener.accept().unwrap().0)
    }

    #[test]
    fn a_connection_that_its_process_has_closed_is_told_from_a_half_closed_one() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let (caller, accepted) = pair(bind);
            let (peer, local) = (accepted.peer_addr().unwrap(), accepted.local_addr().unwrap());
            assert!(!is_closed(peer, local), "{bind}: open");
            caller.shutdown(Shutdown::Write).unwrap();
            assert!(!is_closed(peer, local), "{bind}: half-closed");
            drop(caller);
            assert!(is_closed(peer, local), "{bind}: closed");
        }
    }

    #[test]
    fn a_peer_on_another_host_is_not_known() {
        let (_caller, accepted) = pair("127.0.0.1:0");
        assert!(!is_closed("192.0.2.1:4711".parse().unwrap(), accepted.local_addr().unwrap()));
        assert_eq!(inode(&[]), None);
        assert_eq!(inode(&[0; 16]), None);
    }
}
