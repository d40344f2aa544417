//! One name server, by hickory: retransmission over UDP, TCP for truncated answers, CNAME chains.
//!
//! The UDP sockets are connected. So a server that does not run fails at once, by its ICMP error, instead of by timeout;
//! and a server with a link-local address is reached over its interface, of which hickory knows nothing.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ServerOrderingStrategy,
};
use hickory_resolver::net::runtime::{DnsUdpSocket, RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Resolver, lookup::Lookup};
use tokio::io::{Interest, ReadBuf};
use tokio::net::UdpSocket;
use tokio::time::Instant;

use crate::upstream::resolver::servers::{AddressFamily, FamilyAnswer, NameServer, NoAddresses};
use crate::upstream::resolver::settings::ResolverSettings;

/// Longer than any timeout of a query, which the caller limits.
const NO_TIMEOUT: Duration = Duration::from_secs(3_600);

/// A name server that is reached over the network.
pub(super) struct RemoteServer {
    address: SocketAddr,
    resolver: Resolver<ServerProvider>,
}

impl RemoteServer {
    /// The server at an address.
    ///
    /// # Errors
    /// If hickory cannot be set up.
    pub(super) fn new(address: SocketAddr, settings: &ResolverSettings) -> Result<Self, String> {
        let all = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
        let connections = all.into_iter().skip(usize::from(settings.use_tcp)).collect();
        let server = NameServerConfig::new(address.ip(), true, connections);
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let provider = ServerProvider { tokio: TokioRuntimeProvider::default(), address };
        let mut builder = Resolver::builder_with_config(config, provider);
        let options = builder.options_mut();
        options.timeout = NO_TIMEOUT;
        // Attempts after the first.
        options.attempts = 0;
        options.edns0 = settings.edns0;
        // `discovery` keeps answers for their TTL; a second cache would only return old ones.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        let resolver = builder.build().map_err(|error| error.to_string())?;
        Ok(Self { address, resolver })
    }

    /// Why the server gave no address.
    fn reason(&self, error: &NetError) -> NoAddresses {
        let server = self.address.ip();
        match error {
            NetError::Dns(DnsError::NoRecordsFound(none)) if none.response_code == ResponseCode::NXDomain => {
                NoAddresses::NoName
            }
            NetError::Dns(DnsError::NoRecordsFound(none)) if none.response_code == ResponseCode::NoError => {
                NoAddresses::NoData
            }
            NetError::Dns(DnsError::ResponseCode(ResponseCode::ServFail)) => {
                NoAddresses::ServerFailure(format!("name server {server} answered SERVFAIL"))
            }
            NetError::Dns(DnsError::ResponseCode(code)) => {
                NoAddresses::NoAnswer(format!("name server {server} answered: {code}"))
            }
            // hickory's only text for any I/O error of its last server.
            NetError::NoConnections => NoAddresses::NoAnswer(format!("name server {server} cannot be reached")),
            error => NoAddresses::NoAnswer(format!("name server {server}: {error}")),
        }
    }
}

impl NameServer for RemoteServer {
    async fn query(&self, name: &str, family: AddressFamily) -> Result<FamilyAnswer, NoAddresses> {
        // A name that is too long with a search domain does not exist.
        let name = Name::from_str_relaxed(name).map_err(|_| NoAddresses::NoName)?;
        let record_type = match family {
            AddressFamily::V4 => RecordType::A,
            AddressFamily::V6 => RecordType::AAAA,
        };
        // Boxed, because hickory's future is large.
        let lookup = Box::pin(self.resolver.lookup(name, record_type)).await;
        addresses(&lookup.map_err(|error| self.reason(&error))?)
    }
}

/// The addresses of an answer, which may consist of CNAME records only.
pub(super) fn addresses(lookup: &Lookup) -> Result<FamilyAnswer, NoAddresses> {
    let addresses: Vec<_> = lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect();
    if addresses.is_empty() {
        return Err(NoAddresses::NoData);
    }
    let ttl = lookup.valid_until().saturating_duration_since(Instant::now().into_std());
    Ok(FamilyAnswer { addresses, ttl })
}

/// hickory's I/O to one server.
#[derive(Clone)]
struct ServerProvider {
    tokio: TokioRuntimeProvider,
    /// The server, with its interface.
    address: SocketAddr,
}

impl RuntimeProvider for ServerProvider {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = ConnectedSocket;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.tokio.create_handle()
    }

    fn connect_tcp(
        &self,
        _server_addr: SocketAddr,
        bind_addr: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        self.tokio.connect_tcp(self.address, bind_addr, timeout)
    }

    fn bind_udp(
        &self,
        local_addr: SocketAddr,
        server_addr: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Udp>>>> {
        let address = self.address;
        Box::pin(async move {
            let socket = UdpSocket::bind(local_addr).await?;
            socket.connect(address).await?;
            Ok(ConnectedSocket { socket, server: server_addr })
        })
    }
}

/// A UDP socket that is connected to the server.
struct ConnectedSocket {
    socket: UdpSocket,
    /// The server as hickory knows it, without an interface.
    server: SocketAddr,
}

impl DnsUdpSocket for ConnectedSocket {
    type Time = TokioTime;

    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        let mut buf = ReadBuf::new(buf);
        self.socket.poll_recv(cx, &mut buf).map_ok(|()| (buf.filled().len(), self.server))
    }

    /// Also ends for an ICMP error, which makes a socket neither readable nor closed.
    fn recv_from<'socket, 'buf, 'both>(
        &'socket self,
        buf: &'buf mut [u8],
    ) -> Pin<Box<dyn Future<Output = io::Result<(usize, SocketAddr)>> + Send + 'both>>
    where
        'socket: 'both,
        'buf: 'both,
        Self: 'both,
    {
        Box::pin(async move {
            loop {
                let ready = self.socket.ready(Interest::READABLE | Interest::ERROR).await?;
                if ready.is_error() {
                    self.take_error()?;
                }
                match self.socket.try_recv(buf) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    received => return received.map(|length| (length, self.server)),
                }
            }
        })
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, buf: &[u8], _target: SocketAddr) -> Poll<io::Result<usize>> {
        self.socket.poll_send(cx, buf)
    }
}

impl ConnectedSocket {
    /// The error of the socket, if it has one.
    fn take_error(&self) -> io::Result<()> {
        let none = || io::Error::from(ErrorKind::WouldBlock);
        // `WouldBlock` makes the next call of `ready` wait for another error.
        let taken = self.socket.try_io(Interest::ERROR, || Err(self.socket.take_error()?.unwrap_or_else(none)));
        match taken {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            taken => taken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::resolver::settings::ResolverEnvironment;

    #[tokio::test]
    async fn a_server_that_does_not_run_fails_at_once() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        drop(socket);
        let (settings, _) = ResolverSettings::parse("", &ResolverEnvironment::default());
        let server = RemoteServer::new(address, &settings).unwrap();
        // Without the ICMP error the query would never end.
        let Err(NoAddresses::NoAnswer(reason)) = server.query("shop.test.", AddressFamily::V4).await else {
            panic!("an answer of a server that does not run");
        };
        assert_eq!(reason, "name server 127.0.0.1 cannot be reached");
    }
}
