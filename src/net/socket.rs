//! TCP sockets: listeners with one socket per worker, and connections with the options of the proxy.
//!
//! Every connection, accepted or opened, gets the same options ([`tune`]).

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::net::{TcpSocket, TcpStream};

/// Connections that wait to be accepted, per listener and worker; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// Silence after which the kernel sends keep-alive probes, and the time between two probes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How long sent bytes may stay unacknowledged before the kernel ends the connection (TCP_USER_TIMEOUT, RFC 5482).
const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// Opens `count` sockets on one address (SO_REUSEPORT), one per worker; the kernel spreads connections over them.
///
/// For port 0 the kernel chooses one port for all.
///
/// # Errors
/// If a socket cannot be opened. Also if another process listens on the address with SO_REUSEPORT: two proxies on one port
/// would each get half of the calls.
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

/// Opens one socket on an address without SO_REUSEPORT, for the admin server.
///
/// # Errors
/// If the socket cannot be opened, or the address is in use.
pub fn listen_exclusive(address: SocketAddr) -> io::Result<TcpListener> {
    open(address, false)
}

/// Opens a TCP connection. Has no time limit.
///
/// # Errors
/// If the kernel cannot connect.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let stream = socket.connect(address).await?;
    tune(&stream)?;
    Ok(stream)
}

/// Sets the options of every connection: TCP_NODELAY, keep-alive probes after 30 s of silence, and the end of a connection
/// with bytes unacknowledged for 60 s.
///
/// # Errors
/// If the kernel rejects an option.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// Makes dropping the stream send RST instead of FIN (SO_LINGER 0).
pub fn reset_on_drop(stream: &TcpStream) {
    // Fails only if the connection is closed already.
    let _closed = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Waits for the reset of a connection whose peer has half-closed it. Reading shows nothing then: behind a FIN the kernel
/// returns the end again and again.
pub struct ResetWatch(Pin<Box<dyn Future<Output = ()> + Send>>);

impl ResetWatch {
    /// Watches `stream` through a file descriptor of its own. `None` if the process has none left.
    pub fn new(stream: &TcpStream) -> Option<Self> {
        let own = stream.as_fd().try_clone_to_owned().ok()?;
        let own = TcpStream::from_std(std::net::TcpStream::from(own)).ok()?;
        // An error of the wait itself means that the runtime ends.
        Some(Self(Box::pin(async move { drop(own.ready(Interest::ERROR).await) })))
    }

    /// Ready once, when the peer has reset the connection.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_one_port_and_a_second_process_cannot_bind_it() {
        let listeners = listen("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert!(listeners.iter().all(|l| l.local_addr().unwrap() == address));
        assert_eq!(listen(address, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
