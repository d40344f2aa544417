//! A name server whose replies the test decides, on port 53 of a loopback address of its own, which needs root.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::nameserver::own_address;

/// What the server does with a query.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// The addresses that are of the queried family, with a TTL in seconds.
    Addresses(Vec<IpAddr>, u32),
    /// No address, with this code.
    Code(ResponseCode),
    /// None, until [`ScriptedNameserver::release`].
    Hold,
}

impl Reply {
    pub(crate) fn address(address: IpAddr) -> Self {
        Self::Addresses(vec![address], 60)
    }
}

/// A query that the server got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SeenQuery {
    pub(crate) name: String,
    pub(crate) record_type: RecordType,
    pub(crate) edns: bool,
    pub(crate) tcp: bool,
}

type Script = dyn Fn(&str, RecordType) -> Reply + Send + Sync;

#[derive(Clone)]
pub(crate) struct ScriptedNameserver {
    pub(crate) at: IpAddr,
    script: Arc<Script>,
    seen: Arc<Mutex<Vec<SeenQuery>>>,
    held: Arc<Mutex<Vec<(Message, SocketAddr)>>>,
    udp: Option<Arc<UdpSocket>>,
}

impl ScriptedNameserver {
    /// Starts it with replies to names in lower case with a dot at the end. Without `udp`, only over TCP.
    ///
    /// # Errors
    /// If the test does not run as root.
    pub(crate) async fn start(
        udp: bool,
        script: impl Fn(&str, RecordType) -> Reply + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let at = own_address();
        let tcp = TcpListener::bind((at, 53)).await?;
        let udp = if udp { Some(Arc::new(UdpSocket::bind((at, 53)).await?)) } else { None };
        let (seen, held) = (Arc::default(), Arc::default());
        let server = Self { at, script: Arc::new(script), seen, held, udp };
        tokio::spawn(server.clone().serve_udp());
        tokio::spawn(server.clone().accept(tcp));
        Ok(server)
    }

    /// The queries so far.
    pub(crate) fn seen(&self) -> Vec<SeenQuery> {
        self.seen.lock().unwrap().clone()
    }

    /// Forgets the queries so far.
    pub(crate) fn forget(&self) {
        self.seen.lock().unwrap().clear();
    }

    /// The names of the A queries so far.
    pub(crate) fn names(&self) -> Vec<String> {
        self.seen().into_iter().filter(|query| query.record_type == RecordType::A).map(|query| query.name).collect()
    }

    /// Number of queries without a reply so far.
    pub(crate) fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    /// Replies to the held queries.
    pub(crate) async fn release(&self, reply: &Reply) {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for (query, from) in held {
            self.udp.as_ref().unwrap().send_to(&encode(query, reply), from).await.unwrap();
        }
    }

    async fn serve_udp(self) {
        let Some(socket) = self.udp.clone() else { return };
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            match self.reply(&query, false) {
                Reply::Hold => self.held.lock().unwrap().push((query, from)),
                reply => drop(socket.send_to(&encode(query, &reply), from).await),
            }
        }
    }

    async fn accept(self, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(self.clone().serve_tcp(stream));
        }
    }

    async fn serve_tcp(self, mut stream: TcpStream) {
        while let Ok(length) = stream.read_u16().await {
            let mut buffer = vec![0; length.into()];
            stream.read_exact(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer).unwrap();
            let reply = encode(query.clone(), &self.reply(&query, true));
            stream.write_u16(u16::try_from(reply.len()).unwrap()).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    }

    fn reply(&self, query: &Message, tcp: bool) -> Reply {
        let (name, record_type) = (query.queries[0].name().to_string().to_lowercase(), query.queries[0].query_type());
        let reply = (self.script)(&name, record_type);
        let edns = query.edns.is_some();
        self.seen.lock().unwrap().push(SeenQuery { name, record_type, edns, tcp });
        reply
    }
}

fn encode(query: Message, reply: &Reply) -> Vec<u8> {
    let (name, record_type) = (query.queries[0].name().clone(), query.queries[0].query_type());
    let mut answer = query.into_response();
    answer.metadata.recursion_available = true;
    answer.edns = None;
    match reply {
        Reply::Addresses(addresses, ttl) => {
            let records = addresses.iter().map(|ip| Record::from_rdata(name.clone(), *ttl, RData::from(*ip)));
            answer.add_answers(records.filter(|record| record.record_type() == record_type));
        }
        Reply::Code(code) => answer.metadata.response_code = *code,
        Reply::Hold => unreachable!("a held query has no reply"),
    }
    answer.to_vec().unwrap()
}
