//! A parser of HTTP/1.1 that accepts only what leaves nothing to interpret: the judge of the bytes that the proxy writes.
//!
//! It is far stricter than RFC 9112 asks of a recipient, because it stands for every recipient at once: what
//! passes here means the same to all of them. It never repairs; each breach is reported in words.

/// A field as it was written, its name in lower case.
pub(crate) type Field = (String, Vec<u8>);

/// A message that was read wholly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// Method and target, or status code and reason.
    pub(crate) start: (String, String),
    /// The header section.
    pub(crate) fields: Vec<Field>,
    /// The content, without its framing.
    pub(crate) body: Vec<u8>,
    /// The trailer section.
    pub(crate) trailers: Vec<Field>,
    /// Interim answers that stood before this one.
    pub(crate) interim: Vec<u16>,
    /// Its end is the end of the connection.
    pub(crate) until_close: bool,
}

/// What stands after the last whole message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Nothing.
    Clean,
    /// A message that is not there wholly; `head` is there where its header section is complete.
    Partial {
        /// The part that can be told already.
        head: Option<Box<Message>>,
    },
    /// After a switch of protocols: bytes that are not HTTP.
    Opaque(Vec<u8>),
    /// Bytes that break the strict grammar, in words.
    Broken(String),
}

/// All that stands on a connection: the whole messages, and what follows them.
pub(crate) type Reading = (Vec<Message>, Tail);

/// A breach, in words.
type Breach = String;
/// A line without its end, once its end is there.
type Line<'a> = Option<&'a [u8]>;
/// The fields of a section, once the section is there wholly.
type Section = Option<Vec<Field>>;
/// A message, or what can be told of it so far.
type Step = Result<Message, Option<Box<Message>>>;

/// What is known about the requests that answers belong to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asked {
    /// The methods in order; GET where the list ends.
    pub(crate) methods: Vec<String>,
    /// The caller spoke HTTP/1.0.
    pub(crate) http10: bool,
}

impl Message {
    /// The values of a field, in order.
    pub(crate) fn values(&self, name: &str) -> Vec<&[u8]> {
        let same = |field: &&Field| field.0 == name;
        self.fields.iter().filter(same).map(|field| field.1.as_slice()).collect()
    }

    /// Whether one of a field's lines holds this list element, without regard to case.
    pub(crate) fn lists(&self, name: &str, element: &str) -> bool {
        self.values(name)
            .iter()
            .any(|value| value.split(|b| *b == b',').any(|e| e.trim_ascii().eq_ignore_ascii_case(element.as_bytes())))
    }

    /// The status of an answer.
    pub(crate) fn status(&self) -> u16 {
        self.start.0.parse().unwrap_or(0)
    }
}

/// Reads all requests of a connection.
pub(crate) fn requests(bytes: &[u8]) -> Reading {
    let mut reader = Reader { bytes, at: 0 };
    let mut done = Vec::new();
    loop {
        if reader.rest().is_empty() {
            return (done, Tail::Clean);
        }
        match request(&mut reader) {
            Ok(Ok(message)) => done.push(message),
            Ok(Err(head)) => return (done, Tail::Partial { head }),
            Err(breach) => return (done, Tail::Broken(breach)),
        }
    }
}

/// Reads all answers of a connection; `ended` tells that no more bytes will come.
pub(crate) fn responses(bytes: &[u8], asked: &Asked, ended: bool) -> Reading {
    let mut reader = Reader { bytes, at: 0 };
    let mut done: Vec<Message> = Vec::new();
    let mut interim = Vec::new();
    loop {
        if reader.rest().is_empty() {
            let clean = interim.is_empty();
            return (done, if clean { Tail::Clean } else { Tail::Partial { head: None } });
        }
        let method = asked.methods.get(done.len()).map_or("GET", String::as_str);
        match response(&mut reader, method, asked.http10, ended) {
            Ok(Ok(message)) if message.status() == 101 => {
                let opaque = reader.rest().to_vec();
                done.push(Message { interim: std::mem::take(&mut interim), ..message });
                return (done, Tail::Opaque(opaque));
            }
            Ok(Ok(message)) if message.status() < 200 => interim.push(message.status()),
            Ok(Ok(message)) => {
                done.push(Message { interim: std::mem::take(&mut interim), ..message });
            }
            Ok(Err(head)) => return (done, Tail::Partial { head }),
            Err(breach) => return (done, Tail::Broken(breach)),
        }
    }
}

/// Interim statuses seen so far, also those whose final answer has not come.
pub(crate) fn interim_statuses(bytes: &[u8]) -> Vec<u16> {
    let heads = bytes.split(|b| *b == b'\n').filter_map(|line| line.strip_prefix(b"HTTP/1.1 1"));
    heads.filter_map(|rest| std::str::from_utf8(rest.get(..2)?).ok()?.parse::<u16>().ok()).map(|n| 100 + n).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    None,
    Length(usize),
    Chunked,
    UntilClose,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// The next line without its CRLF; `None` while its end has not come.
    fn line(&mut self) -> Result<Line<'a>, Breach> {
        let rest = self.rest();
        let end = rest.windows(2).position(|pair| pair == b"\r\n");
        let line = &rest[..end.unwrap_or(rest.len())];
        let line = if end.is_none() { line.strip_suffix(b"\r").unwrap_or(line) } else { line };
        if let Some(bad) = line.iter().find(|b| matches!(b, b'\r' | b'\n' | 0)) {
            return Err(format!("a bare {bad:#04x} in the line {:?}", text(line)));
        }
        Ok(end.map(|end| {
            self.at += end + 2;
            line
        }))
    }

    fn take(&mut self, wanted: usize) -> Option<&'a [u8]> {
        let part = self.rest().get(..wanted)?;
        self.at += wanted;
        Some(part)
    }
}

fn request(reader: &mut Reader<'_>) -> Result<Step, Breach> {
    let Some(mut message) = request_head(reader)? else {
        return Ok(Err(None));
    };
    let framing = declared_framing(&message)?.unwrap_or(Framing::None);
    let whole = body(reader, framing, &mut message, false)?;
    Ok(if whole { Ok(message) } else { Err(Some(Box::new(message))) })
}

fn response(reader: &mut Reader<'_>, method: &str, http10: bool, ended: bool) -> Result<Step, Breach> {
    let Some(mut message) = response_head(reader, http10, method)? else {
        return Ok(Err(None));
    };
    let framing = response_framing(&message, method, http10)?;
    let whole = body(reader, framing, &mut message, ended)?;
    Ok(if whole { Ok(message) } else { Err(Some(Box::new(message))) })
}

fn request_head(reader: &mut Reader<'_>) -> Result<Option<Message>, Breach> {
    let Some(line) = reader.line()? else {
        return Ok(None);
    };
    let parts: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let [method, target, version] = parts[..] else {
        return Err(format!("not three words in the request line {:?}", text(line)));
    };
    if !is_token(method) {
        return Err(format!("method {:?}", text(method)));
    }
    if version != b"HTTP/1.1" {
        return Err(format!("version {:?}", text(version)));
    }
    clean_target(method, target)?;
    let Some(fields) = fields(reader)? else {
        return Ok(None);
    };
    let message = Message {
        start: (text(method), text(target)),
        fields,
        body: Vec::new(),
        trailers: Vec::new(),
        interim: Vec::new(),
        until_close: false,
    };
    clean_host(&message)?;
    no_hop_by_hop(&message, !message.values("upgrade").is_empty())?;
    Ok(Some(message))
}

fn clean_target(method: &[u8], target: &[u8]) -> Result<(), Breach> {
    let star = target == b"*" && method == b"OPTIONS";
    let clean = |b: &u8| b.is_ascii_graphic() && !b"#\"<>\\".contains(b);
    if star || (target.starts_with(b"/") && target.iter().all(clean)) {
        return Ok(());
    }
    Err(format!("target {:?}", text(target)))
}

fn clean_host(message: &Message) -> Result<(), Breach> {
    let hosts = message.values("host");
    let [host] = hosts[..] else {
        return Err(format!("{} Host fields", hosts.len()));
    };
    let host = text(host);
    let (name, port) = match host.split_once(']') {
        Some((name, rest)) => (name, rest),
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let port_ok =
        port.is_empty() || port.strip_prefix(':').is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let name_ok = match name.strip_prefix('[') {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.contains(']') && is_registered_name(name.as_bytes()),
    };
    if name_ok && port_ok { Ok(()) } else { Err(format!("host {host:?}")) }
}

/// `reg-name` of RFC 3986: letters, digits, some signs, and whole percent-encodings.
fn is_registered_name(name: &[u8]) -> bool {
    let sign = |b: &u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(b);
    let encoded = |rest: &[u8]| rest.get(..2).is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit));
    let mut after_percent = name.split(|b| *b == b'%').skip(1);
    !name.is_empty() && name.iter().all(sign) && after_percent.all(encoded)
}

/// Connection may carry only what belongs to this hop and is ours to say.
fn no_hop_by_hop(message: &Message, upgrading: bool) -> Result<(), Breach> {
    for name in ["keep-alive", "proxy-connection", "http2-settings"] {
        if !message.values(name).is_empty() {
            return Err(format!("hop-by-hop field {name}"));
        }
    }
    for value in message.values("connection") {
        for option in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
            let option = text(option).to_ascii_lowercase();
            if !["close", "keep-alive", "upgrade", "te"].contains(&option.as_str()) {
                return Err(format!("connection option {option:?}"));
            }
        }
    }
    if upgrading != message.lists("connection", "upgrade") {
        return Err("Upgrade and Connection: upgrade do not go together".to_owned());
    }
    let te = message.values("te");
    if te.iter().any(|value| !value.eq_ignore_ascii_case(b"trailers")) || te.len() > 1 {
        return Err("TE says more than trailers".to_owned());
    }
    if !te.is_empty() && !message.lists("connection", "te") {
        return Err("TE without Connection: TE".to_owned());
    }
    Ok(())
}

fn response_head(reader: &mut Reader<'_>, http10: bool, method: &str) -> Result<Option<Message>, Breach> {
    let Some(line) = reader.line()? else {
        return Ok(None);
    };
    let version_ok = line.starts_with(b"HTTP/1.1 ") || (http10 && line.starts_with(b"HTTP/1.0 "));
    let code = line.get(9..12).unwrap_or_default();
    let reason = line.get(12..).unwrap_or_default();
    let reason_ok = reason.first() == Some(&b' ') && reason.iter().all(|b| is_text(*b));
    if !version_ok || !code.iter().all(u8::is_ascii_digit) || code.len() != 3 || !reason_ok {
        return Err(format!("status line {:?}", text(line)));
    }
    let Some(fields) = fields(reader)? else {
        return Ok(None);
    };
    let message = Message {
        start: (text(code), text(reason.trim_ascii())),
        fields,
        body: Vec::new(),
        trailers: Vec::new(),
        interim: Vec::new(),
        until_close: false,
    };
    let status = message.status();
    if status < 100 {
        return Err(format!("status {status}"));
    }
    if http10 && status < 200 {
        return Err(format!("interim answer {status} to HTTP/1.0"));
    }
    let switching = status == 101 || (status == 426 && !message.values("upgrade").is_empty());
    if method != "CONNECT" {
        no_hop_by_hop(&message, switching)?;
    }
    Ok(Some(message))
}

/// Reads field lines up to the empty line.
fn fields(reader: &mut Reader<'_>) -> Result<Section, Breach> {
    let mut fields = Vec::new();
    loop {
        let Some(line) = reader.line()? else {
            return Ok(None);
        };
        if line.is_empty() {
            return Ok(Some(fields));
        }
        let colon = line.iter().position(|b| *b == b':');
        let (name, value) = line.split_at(colon.ok_or(format!("no colon in {:?}", text(line)))?);
        if !is_token(name) {
            return Err(format!("field name {:?}", text(name)));
        }
        let value = &value[1..];
        if !value.iter().all(|b| is_text(*b)) {
            return Err(format!("value of {:?}: {:?}", text(name), text(value)));
        }
        fields.push((text(name).to_ascii_lowercase(), value.trim_ascii().to_vec()));
    }
}

fn response_framing(message: &Message, method: &str, http10: bool) -> Result<Framing, Breach> {
    let declared = declared_framing(message)?;
    let status = message.status();
    let connected = method == "CONNECT" && (200..300).contains(&status);
    if declared.is_some() && (status < 200 || status == 204 || connected) {
        return Err(format!("a framing field in an answer {status} to {method}"));
    }
    if http10 && declared == Some(Framing::Chunked) {
        return Err("chunked to HTTP/1.0".to_owned());
    }
    if method == "HEAD" || status < 200 || status == 204 || status == 304 || connected {
        return Ok(Framing::None);
    }
    Ok(declared.unwrap_or(Framing::UntilClose))
}

/// At most one framing field, once, in its plainest form.
fn declared_framing(message: &Message) -> Result<Option<Framing>, Breach> {
    let (te, cl) = (message.values("transfer-encoding"), message.values("content-length"));
    match (&te[..], &cl[..]) {
        ([], []) => Ok(None),
        ([coding], []) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Some(Framing::Chunked)),
        ([], [length]) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
            let length = text(length).parse().map_err(|_| "a length without end".to_owned())?;
            Ok(Some(Framing::Length(length)))
        }
        _ => Err(format!(
            "framing fields Transfer-Encoding {:?}, Content-Length {:?}",
            te.iter().map(|v| text(v)).collect::<Vec<_>>(),
            cl.iter().map(|v| text(v)).collect::<Vec<_>>(),
        )),
    }
}

/// Reads the body; `false` while it is not there wholly.
fn body(reader: &mut Reader<'_>, framing: Framing, message: &mut Message, ended: bool) -> Result<bool, Breach> {
    match framing {
        Framing::None => Ok(true),
        Framing::Length(length) => {
            let part = reader.take(length.min(reader.rest().len())).unwrap_or_default();
            message.body = part.to_vec();
            Ok(part.len() == length)
        }
        Framing::UntilClose => {
            message.body = reader.take(reader.rest().len()).unwrap_or_default().to_vec();
            message.until_close = true;
            Ok(ended)
        }
        Framing::Chunked => chunks(reader, message),
    }
}

fn chunks(reader: &mut Reader<'_>, message: &mut Message) -> Result<bool, Breach> {
    loop {
        let Some(line) = reader.line()? else {
            return Ok(false);
        };
        let size = std::str::from_utf8(line).ok().filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()));
        let size = size.and_then(|s| usize::from_str_radix(s, 16).ok());
        let size = size.ok_or(format!("chunk size {:?}", text(line)))?;
        if size == 0 {
            let Some(trailers) = fields(reader)? else {
                return Ok(false);
            };
            let framing = ["content-length", "transfer-encoding", "host", "trailer", "connection", "te"];
            if let Some(bad) = trailers.iter().find(|t| framing.contains(&t.0.as_str())) {
                return Err(format!("trailer {}", bad.0));
            }
            message.trailers = trailers;
            return Ok(true);
        }
        let Some(data) = reader.take(size) else {
            message.body.extend(reader.rest());
            return Ok(false);
        };
        message.body.extend(data);
        match reader.line()? {
            Some(b"") => {}
            None => return Ok(false),
            Some(extra) => return Err(format!("{:?} after a chunk", text(extra))),
        }
    }
}

fn is_token(bytes: &[u8]) -> bool {
    let tchar = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    !bytes.is_empty() && bytes.iter().all(tchar)
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_requests_are_read_in_order() {
        let bytes = b"GET /a HTTP/1.1\r\nhost: h\r\n\r\nPOST /b HTTP/1.1\r\nhost: [::1]:80\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n";
        let (found, tail) = requests(bytes);
        assert_eq!(tail, Tail::Clean);
        assert_eq!(found[0].start, ("GET".to_owned(), "/a".to_owned()));
        assert_eq!(found[1].body, b"hello");
        assert_eq!(found[1].trailers, [("x-t".to_owned(), b"1".to_vec())]);
    }

    #[test]
    fn every_ambiguity_in_a_request_is_a_breach() {
        let breaches: &[&[u8]] = &[
            b"GET  / HTTP/1.1\r\nhost: h\r\n\r\n",
            b"GET / HTTP/1.0\r\nhost: h\r\n\r\n",
            b"GET / HTTP/1.1\nhost: h\r\n\r\n",
            b"GET http://h/ HTTP/1.1\r\nhost: h\r\n\r\n",
            b"GET /# HTTP/1.1\r\nhost: h\r\n\r\n",
            b"G(T / HTTP/1.1\r\nhost: h\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a:b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a%2\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: [a]\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: ::1]\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost:\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\n folded\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nx : 1\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nx: a\rb\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nx: a\0b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nx: a\x01b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nkeep-alive: 1\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nconnection: x-a\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nupgrade: websocket\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: h\r\nte: gzip\r\nconnection: te\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: +1\r\n\r\na",
            b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na",
            b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1;a\r\nb\r\n",
            b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\nbc\r\n",
            b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\nhost: b\r\n\r\n",
        ];
        for bytes in breaches {
            assert!(matches!(requests(bytes).1, Tail::Broken(_)), "{}", text(bytes));
        }
    }

    #[test]
    fn what_is_not_there_yet_is_partial_and_no_breach() {
        let whole =
            b"POST /b HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n";
        for end in 1..whole.len() {
            let (found, tail) = requests(&whole[..end]);
            assert!(found.is_empty() && matches!(tail, Tail::Partial { .. }), "{end}");
        }
    }

    #[test]
    fn answers_are_framed_by_what_was_asked() {
        let head = Asked { methods: vec!["HEAD".to_owned()], http10: false };
        let bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let (found, tail) = responses(bytes, &head, false);
        assert_eq!((found.len(), tail), (2, Tail::Clean));
        let plain = Asked::default();
        let until_close = b"HTTP/1.1 200 OK\r\n\r\nabc";
        assert_eq!(responses(until_close, &plain, false).0.len(), 0);
        assert_eq!(responses(until_close, &plain, true).0[0].body, b"abc");
        let interim = b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(responses(interim, &plain, false).0[0].interim, [103]);
        assert_eq!(interim_statuses(interim), [103]);
    }

    #[test]
    fn every_ambiguity_in_an_answer_is_a_breach() {
        let breaches: &[&[u8]] = &[
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 200\r\n\r\n",
            b"HTTP/1.1 200 a\x01\r\n\r\n",
            b"HTTP/1.0 200 OK\r\n\r\n",
            b"HTTP/1.1 204 No\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 1, 1\r\n\r\na",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n\r\na",
            b"HTTP/1.1 200 OK\r\nkeep-alive: a\r\ncontent-length: 0\r\n\r\n",
        ];
        for bytes in breaches {
            assert!(matches!(responses(bytes, &Asked::default(), true).1, Tail::Broken(_)), "{}", text(bytes));
        }
        let old = Asked { methods: Vec::new(), http10: true };
        for bytes in [&b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"[..], b"HTTP/1.1 100 Continue\r\n\r\n"] {
            assert!(matches!(responses(bytes, &old, true).1, Tail::Broken(_)), "{}", text(bytes));
        }
    }
}
