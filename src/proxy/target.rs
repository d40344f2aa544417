//! The target of a request: its host and port, from each form that a target can have.
//!
//! Every ambiguous target ends here, before any byte is forwarded (RFC 9112 sections 3.2 and 3.3, RFC 9113 section
//! 8.3.1): no host, two hosts, two different ones, user information, a target in a form that the method does not have.

use http::header::HeaderMap;
use http::{Method, Uri, Version, header};

/// Host and port of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestTarget<'a> {
    /// The host without the port, as the caller wrote it; empty where an HTTP/1.0 request names none.
    pub(super) host: &'a str,
    /// The port, where one is written.
    pub(super) port: Option<u16>,
}

/// What is wrong with a request's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum TargetError {
    /// RFC 9112 section 3.2.
    #[error("an HTTP/1.1 request needs a Host field (RFC 9112, 3.2)")]
    NoHost,
    /// RFC 9112 section 3.2.
    #[error("there is more than one Host field (RFC 9112, 3.2)")]
    TwoHosts,
    /// RFC 9110 section 7.2, RFC 3986 section 3.2.
    #[error("the host is not of the form host or host:port (RFC 9110, 7.2)")]
    BadHost,
    /// RFC 9113 section 8.3.1.
    #[error("Host and :authority differ (RFC 9113, 8.3.1)")]
    HostsDiffer,
    /// RFC 9112 section 3.2.
    #[error("the target has a form that this method does not have (RFC 9112, 3.2)")]
    BadForm,
    /// RFC 9112 section 3.2.2: only `http` and `https` can be forwarded.
    #[error("the target's scheme is neither http nor https (RFC 9110, 4.2)")]
    BadScheme,
}

impl<'a> RequestTarget<'a> {
    /// Reads the target of a request.
    ///
    /// # Errors
    /// A target that is missing, doubled, contradictory or malformed.
    pub(super) fn read(
        method: &Method,
        uri: &'a Uri,
        version: Version,
        fields: &'a HeaderMap,
    ) -> Result<Self, TargetError> {
        check_form(method, uri, version)?;
        let mut hosts = fields.get_all(header::HOST).iter();
        let host = hosts.next();
        if hosts.next().is_some() {
            return Err(TargetError::TwoHosts);
        }
        let host = host.map(|value| Self::read_authority(value.as_bytes())).transpose()?;
        let named = uri.authority().map(|authority| Self::read_authority(authority.as_str().as_bytes())).transpose()?;
        match (named, host) {
            (Some(named), host) if version == Version::HTTP_2 => match host {
                Some(host) if !same(&host, &named) => Err(TargetError::HostsDiffer),
                _ => Ok(named),
            },
            // The Host field of a request in absolute form counts for nothing (RFC 9112, 3.2.2), but has to be there.
            (Some(_), None) if version == Version::HTTP_11 => Err(TargetError::NoHost),
            (Some(named), _) => Ok(named),
            (None, Some(host)) => Ok(host),
            (None, None) if version <= Version::HTTP_10 => Ok(Self { host: "", port: None }),
            (None, None) => Err(TargetError::NoHost),
        }
    }

    /// The host and port of an authority that was checked when the request came; `None` where the request names no host.
    pub(super) fn parse(authority: &'a [u8]) -> Option<Self> {
        Self::read_authority(authority).ok()
    }

    /// Checks `host` or `host:port` byte by byte.
    fn read_authority(bytes: &'a [u8]) -> Result<Self, TargetError> {
        let host = host_length(bytes).filter(|length| *length > 0).ok_or(TargetError::BadHost)?;
        let port = match &bytes[host..] {
            [] | [b':'] => None,
            [b':', digits @ ..] => Some(parse_port(digits).ok_or(TargetError::BadHost)?),
            _ => return Err(TargetError::BadHost),
        };
        // Only visible ASCII has passed `host_length`.
        let host = std::str::from_utf8(&bytes[..host]).map_err(|_| TargetError::BadHost)?;
        Ok(Self { host, port })
    }

    /// The host without the brackets of an IPv6 address.
    pub(super) fn bare_host(&self) -> &'a str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }
}

fn same(one: &RequestTarget<'_>, other: &RequestTarget<'_>) -> bool {
    one.host.eq_ignore_ascii_case(other.host) && one.port == other.port
}

fn check_form(method: &Method, uri: &Uri, version: Version) -> Result<(), TargetError> {
    if method == Method::CONNECT {
        let bare = uri.authority().is_some_and(|authority| authority.port_u16().is_some_and(|port| port > 0))
            && uri.scheme().is_none()
            && uri.path_and_query().is_none_or(|path| path.as_str().is_empty());
        return if bare { Ok(()) } else { Err(TargetError::BadForm) };
    }
    match uri.scheme_str() {
        Some("http" | "https") => {}
        Some(_) => return Err(TargetError::BadScheme),
        // An authority without a scheme is the form of CONNECT alone.
        None if uri.authority().is_some() && version < Version::HTTP_2 => return Err(TargetError::BadForm),
        None => {}
    }
    let path = uri.path();
    let good = path.starts_with('/') || (path == "*" && method == Method::OPTIONS);
    if good || (path.is_empty() && uri.scheme().is_some()) { Ok(()) } else { Err(TargetError::BadForm) }
}

/// How many bytes of `host[:port]` are the host; `None` if it is not a host of RFC 3986.
fn host_length(bytes: &[u8]) -> Option<usize> {
    if bytes.first() == Some(&b'[') {
        let end = bytes.iter().position(|&byte| byte == b']')?;
        let inside = std::str::from_utf8(&bytes[1..end]).ok()?;
        inside.parse::<std::net::Ipv6Addr>().ok()?;
        return Some(end + 1);
    }
    let end = bytes.iter().position(|&byte| byte == b':').unwrap_or(bytes.len());
    let host = &bytes[..end];
    (host.iter().all(|&byte| is_host_byte(byte)) && is_encoded_well(host)).then_some(end)
}

/// unreserved, sub-delims and `%`: all that RFC 3986, 3.2.2, allows in a name.
fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'-' | b'.'
                | b'_'
                | b'~'
                | b'%'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b';'
                | b'='
        )
}

/// True if two hexadecimal digits follow every `%` (RFC 3986, 2.1).
fn is_encoded_well(host: &[u8]) -> bool {
    host.split(|&byte| byte == b'%').skip(1).all(|part| part.len() >= 2 && part[..2].iter().all(u8::is_ascii_hexdigit))
}

/// Encodes the characters in a path or a query that no URI may contain (RFC 3986, 2): quotes, backslashes, bytes beyond
/// ASCII and the like, which the next hop might read differently. A query without a path gets the path `/` (RFC 9110,
/// 4.2.3). `None` if nothing needs encoding.
pub(super) fn encode(path: &str) -> Option<String> {
    let odd = |byte: u8| {
        !byte.is_ascii_graphic() || matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}')
    };
    let is_rooted = path.starts_with('/') || path == "*";
    if is_rooted && !path.bytes().any(odd) {
        return None;
    }
    let mut encoded = String::with_capacity(path.len() + 16);
    if !is_rooted {
        encoded.push('/');
    }
    for byte in path.bytes() {
        if odd(byte) {
            encoded.push_str(&format!("%{byte:02X}"));
        } else {
            encoded.push(char::from(byte));
        }
    }
    Some(encoded)
}

fn parse_port(digits: &[u8]) -> Option<u16> {
    let all_digits = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    all_digits.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::HeaderValue;

    fn read(method: &str, uri: &str, version: Version, hosts: &[&str]) -> Result<String, TargetError> {
        let mut fields = HeaderMap::new();
        for host in hosts {
            fields.append(header::HOST, HeaderValue::from_str(host).unwrap());
        }
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        RequestTarget::read(&method, &uri.parse().unwrap(), version, &fields)
            .map(|target| format!("{} {:?}", target.host, target.port))
    }

    #[test]
    fn a_target_is_read_from_every_form() {
        const ONE: Version = Version::HTTP_11;
        const TWO: Version = Version::HTTP_2;
        let table = [
            ("GET", "/x", ONE, &["shop"][..], "shop None"),
            ("GET", "/x", ONE, &["shop:8080"], "shop Some(8080)"),
            ("GET", "/x", ONE, &["shop:"], "shop None"),
            ("GET", "/x", ONE, &["[::1]:80"], "[::1] Some(80)"),
            ("GET", "http://a.test:1/x", ONE, &["other"], "a.test Some(1)"),
            ("GET", "http://a.test", ONE, &["a.test"], "a.test None"),
            ("OPTIONS", "*", ONE, &["shop"], "shop None"),
            ("CONNECT", "shop:443", ONE, &["shop:443"], "shop Some(443)"),
            ("GET", "/x", Version::HTTP_10, &[], " None"),
            ("GET", "http://shop/x", TWO, &[], "shop None"),
            ("GET", "http://shop/x", TWO, &["SHOP"], "shop None"),
        ];
        for (method, uri, version, hosts, expected) in table {
            assert_eq!(read(method, uri, version, hosts).as_deref(), Ok(expected), "{method} {uri} {hosts:?}");
        }
    }

    #[test]
    fn what_no_uri_holds_is_encoded_and_nothing_else_is_touched() {
        assert_eq!(encode("/a%20b?c=d&e=[1]~'()*!$+,;:@"), None);
        assert_eq!((encode("*"), encode("").as_deref(), encode("?x").as_deref()), (None, Some("/"), Some("/?x")));
        assert_eq!(encode("/caf\u{e9}\"\\?q={1}").as_deref(), Some("/caf%C3%A9%22%5C?q=%7B1%7D"));
    }

    #[test]
    fn an_ambiguous_target_is_refused() {
        use TargetError::{BadForm, BadHost, BadScheme, HostsDiffer, NoHost, TwoHosts};
        const ONE: Version = Version::HTTP_11;
        let table = [
            ("GET", "/x", ONE, &[][..], NoHost),
            ("GET", "http://a/x", ONE, &[], NoHost),
            ("GET", "/x", ONE, &["a", "a"], TwoHosts),
            ("GET", "/x", ONE, &["a b"], BadHost),
            ("GET", "/x", ONE, &["user@a"], BadHost),
            ("GET", "/x", ONE, &["a:99999"], BadHost),
            ("GET", "/x", ONE, &["a:8o"], BadHost),
            ("GET", "/x", ONE, &[":80"], BadHost),
            ("GET", "/x", ONE, &[""], BadHost),
            ("GET", "/x", ONE, &["a%zz"], BadHost),
            ("GET", "/x", ONE, &["a%4"], BadHost),
            ("GET", "/x", ONE, &["[::1"], BadHost),
            ("GET", "/x", ONE, &["a/b"], BadHost),
            ("GET", "http://user@a/x", ONE, &["a"], BadHost),
            ("GET", "*", ONE, &["a"], BadForm),
            ("GET", "a:80", ONE, &["a"], BadForm),
            ("CONNECT", "/x", ONE, &["a"], BadForm),
            ("CONNECT", "http://a:80/", ONE, &["a"], BadForm),
            ("GET", "ftp://a/x", ONE, &["a"], BadScheme),
            ("GET", "http://a/x", Version::HTTP_2, &["b"], HostsDiffer),
            ("GET", "http://a/x", Version::HTTP_2, &["a:81"], HostsDiffer),
        ];
        for (method, uri, version, hosts, expected) in table {
            assert_eq!(read(method, uri, version, hosts), Err(expected), "{method} {uri} {hosts:?}");
        }
    }
}
