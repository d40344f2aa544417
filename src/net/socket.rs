//! Sockets: listeners that several workers share, and connections with the options that a proxy wants.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

/// Connections that wait to be accepted, per listener and worker; the kernel's own ceiling is `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// When the kernel asks a silent peer whether it is still there, and how long unanswered bytes may wait.
const KEEPALIVE: Duration = Duration::from_secs(30);
const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// Opens `count` listeners on one address, one for each worker; the kernel spreads connections over them.
///
/// Port 0 is chosen once and then shared. Fails if anybody holds the address, even if they would share it, because two
/// proxies on one port would each get half of the calls.
pub fn listen(address: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    let address = open(address, false)?.local_addr()?;
    (0..count).map(|_| open(address, true)).collect()
}

fn open(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if let SocketAddr::V6(v6) = address {
        // `[::]` also takes IPv4; an explicit IPv6 address takes only itself.
        socket.set_only_v6(!v6.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Opens one listener that nobody shares (the admin door).
pub fn listen_alone(address: SocketAddr) -> io::Result<TcpListener> {
    open(address, false)
}

/// Connects, without a time limit of its own.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let stream = socket.connect(address).await?;
    tune(&stream)?;
    Ok(stream)
}

/// Sets what every connection of the proxy's wants: no delay for small writes, and an end for peers that vanished.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// Has the connection reset, not closed, when it is dropped.
pub fn reset_on_drop(stream: &TcpStream) {
    // Fails only if the connection is over already.
    let _over = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_one_port_and_a_second_owner_is_refused() {
        let listeners = listen("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert!(listeners.iter().all(|l| l.local_addr().unwrap() == address));
        assert_eq!(listen(address, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
