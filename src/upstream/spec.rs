//! Policy values of a destination's upstream: endpoints, protocol, TLS and pooled connections.
//!
//! YAML shapes (`…Spec`), their checks, and the checked values, which `policy` compiles into clusters. No I/O.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::problems::{Cursor, InvalidValue, Sourced};
use crate::rules::count::Count;
use crate::rules::duration::DurationSpec;

/// An entry of `endpoints`: an address, or a name that resolves to any number of addresses. Displays as written in a
/// policy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EndpointSpec {
    /// A fixed address.
    Address(SocketAddr),
    /// A name that is resolved again when its TTL is over.
    Dns {
        /// Lower case. A dot at the end makes the name absolute: no search domain is tried.
        name: String,
        /// 1 to 65535.
        port: u16,
    },
}

impl fmt::Display for EndpointSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Dns { name, port } => write!(f, "dns:{name}:{port}"),
        }
    }
}

/// `protocol:` of a destination: the HTTP version of its endpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum UpstreamProtocol {
    /// The protocol that ALPN agrees on; without TLS, HTTP/2 for gRPC and HTTP/1.1 for all other calls.
    #[default]
    Auto,
    /// HTTP/1.1 always.
    Http1,
    /// HTTP/2 always, without TLS by prior knowledge.
    Http2,
}

impl fmt::Display for UpstreamProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Http1 => "http1",
            Self::Http2 => "http2",
        })
    }
}

/// `tls:` of a destination. The key alone, `tls: {}`, means TLS.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with ca and serverName, or {}")]
pub struct UpstreamTlsSpec {
    /// File of trusted certificates (PEM), relative to the policy's folder. Default: the system's roots.
    pub ca: Option<String>,
    /// The name that the upstream's certificate must bear. Default: the endpoint's name, else a host of
    /// the destination; see docs/policy.md.
    pub server_name: Option<String>,
}

/// TLS to the upstream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UpstreamTls {
    /// File of trusted certificates (PEM); `None` for the system's roots.
    pub ca: Option<PathBuf>,
    /// The name that the certificate must bear, lower case; `None` for the default.
    pub server_name: Option<String>,
}

impl UpstreamTlsSpec {
    /// Checks the values and resolves `ca` against `folder`, the policy file's own.
    pub fn check(&self, folder: &Path, at: &Cursor<'_>) -> UpstreamTls {
        let server_name = self.server_name.as_ref().map(|name| name.to_ascii_lowercase());
        if let Some(name) = &server_name
            && rustls_pki_types::ServerName::try_from(name.as_str()).is_err()
        {
            at.key("serverName")
                .report(format!("`{name}` is no server name"), "write a DNS name or an IP address, no port");
        }
        UpstreamTls { ca: self.ca.as_ref().map(|ca| folder.join(ca)), server_name }
    }
}

/// `connections:` of `defaults` or of a destination.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping with idle, maxIdle, maxHeaderCount, maxAge and maxRequests"
)]
pub struct ConnectionsSpec {
    /// How long an idle connection is kept. Default 3s.
    pub idle: Option<DurationSpec>,
    /// Most idle connections, per endpoint and worker; 0 keeps none. Default 128.
    pub max_idle: Option<Count<0>>,
    /// Most header fields of a response: 1 to 1024. Default 256.
    pub max_header_count: Option<Count<1, 1_024>>,
    /// How long a connection takes new requests, over HTTP/1.1 and HTTP/2. Each connection draws its own part, between 80 %
    /// and 100 %. Default 5m.
    pub max_age: Option<DurationSpec>,
    /// Most requests of a connection, over HTTP/1.1 and HTTP/2. Each connection draws its own part, between 80 % and 100 %.
    /// Default: none.
    pub max_requests: Option<Count<1>>,
}

/// Pooled upstream connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Connections {
    /// How long an idle HTTP/1.1 connection is kept.
    pub idle: Sourced<Duration>,
    /// Most idle HTTP/1.1 connections, per endpoint and worker; 0 keeps none.
    pub max_idle: Sourced<u32>,
    /// Most header fields of a response.
    pub max_header_count: Sourced<u32>,
    /// How long a connection takes new requests.
    pub max_age: Sourced<Duration>,
    /// Most requests of a connection; `None` for the upstream's own bound, which is learned.
    pub max_requests: Option<Sourced<u32>>,
}

impl Connections {
    /// The built-in values: 3 s, 128, 256, 5 min, no bound of requests.
    pub const fn built_in() -> Self {
        Self {
            idle: Sourced::built_in(Duration::from_secs(3)),
            max_idle: Sourced::built_in(128),
            max_header_count: Sourced::built_in(256),
            max_age: Sourced::built_in(Duration::from_secs(300)),
            max_requests: None,
        }
    }
}

impl ConnectionsSpec {
    /// This layer on top of `base`.
    pub fn check(&self, base: &Connections, at: &Cursor<'_>) -> Connections {
        let count = |count: Option<Count<1, 1_024>>| count.map(|count| at.key("maxHeaderCount").set(count.0));
        Connections {
            idle: self.idle.map_or_else(|| base.idle.clone(), |idle| at.key("idle").set(idle.0)),
            max_idle: self.max_idle.map_or_else(|| base.max_idle.clone(), |n| at.key("maxIdle").set(n.0)),
            max_header_count: count(self.max_header_count).unwrap_or_else(|| base.max_header_count.clone()),
            max_age: self.max_age.map_or_else(|| base.max_age.clone(), |age| at.key("maxAge").set(age.0)),
            max_requests: self
                .max_requests
                .map(|n| at.key("maxRequests").set(n.0))
                .or_else(|| base.max_requests.clone()),
        }
    }
}

/// Whether a text is a host name: labels of 1 to 63 letters, digits, `-` and `_`, without `-` at begin or end; 253 bytes in
/// all (RFC 1123, 2.1, with `_` allowed).
pub fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        let letters = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        letters && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

impl EndpointSpec {
    /// Reads `IP:PORT`, `[IPv6]:PORT` or `dns:NAME:PORT`.
    ///
    /// # Errors
    /// For any other text, with a hint that says what to write.
    pub fn parse(text: &str) -> Result<Self, InvalidValue> {
        if let Some(rest) = text.strip_prefix("dns:") {
            if rest.parse::<SocketAddr>().is_ok() {
                return Err(InvalidValue::new(
                    format!("`{text}` is no name"),
                    format!("an address is not looked up: write `{rest}`"),
                ));
            }
            return parse_dns(rest).ok_or_else(|| {
                InvalidValue::new(
                    format!("`{text}` is no name and port"),
                    "write `dns:NAME:PORT`, like `dns:payment:8080`",
                )
            });
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() == 0 => {
                Err(InvalidValue::new(format!("`{text}` has port 0"), "write a port from 1 to 65535"))
            }
            Ok(address) => Ok(Self::Address(address)),
            Err(_) => Err(not_an_address(text)),
        }
    }
}

fn parse_dns(text: &str) -> Option<EndpointSpec> {
    let (name, port) = text.rsplit_once(':')?;
    let port = port.parse::<u16>().ok().filter(|port| *port > 0)?;
    // The dot at the end is kept: it makes the name absolute, so that no search domain is tried.
    is_host_name(name.strip_suffix('.').unwrap_or(name))
        .then(|| EndpointSpec::Dns { name: name.to_ascii_lowercase(), port })
}

fn not_an_address(text: &str) -> InvalidValue {
    let hint = if let Some(endpoint) = without_scheme(text) {
        format!("an endpoint has no scheme: write `{endpoint}`; TLS is asked for by `tls: {{}}`")
    } else if parse_dns(text).is_some() {
        format!("a name is looked up: write `dns:{text}`")
    } else if text.parse::<std::net::Ipv6Addr>().is_ok() {
        format!("write `[{text}]:PORT`")
    } else if text.parse::<std::net::IpAddr>().is_ok() {
        format!("write `{text}:PORT`")
    } else if is_host_name(text) {
        format!("write `dns:{text}:PORT`")
    } else {
        "write `10.0.0.7:8080`, `[::1]:8080` or `dns:NAME:8080`".into()
    };
    InvalidValue::new(format!("`{text}` is no endpoint"), hint)
}

/// The endpoint of a URL, with the default port of its scheme if the URL has none.
fn without_scheme(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let port = match scheme.to_ascii_lowercase().as_str() {
        "http" => "80",
        "https" => "443",
        _ => "PORT",
    };
    let bare = [authority.to_owned(), format!("{authority}:{port}")];
    let resolved = bare.clone().map(|address| format!("dns:{address}"));
    bare.into_iter().chain(resolved).find(|candidate| EndpointSpec::parse(&candidate.replace(":PORT", ":1")).is_ok())
}

impl<'de> Deserialize<'de> for EndpointSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EndpointVisitor;
        impl Visitor<'_> for EndpointVisitor {
            type Value = EndpointSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an endpoint like `10.0.0.7:8080` or `dns:NAME:8080`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<EndpointSpec, E> {
                EndpointSpec::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(EndpointVisitor)
    }
}

impl JsonSchema for EndpointSpec {
    fn schema_name() -> Cow<'static, str> {
        "Endpoint".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "IP:PORT, [IPv6]:PORT or dns:NAME:PORT",
            "pattern": "^(dns:[A-Za-z0-9_.-]+|[0-9.]+|\\[[0-9A-Fa-f:.]+(%[0-9]+)?\\]):[0-9]{1,5}$",
            "examples": ["10.0.0.7:8080", "[::1]:8080", "dns:payment-headless:8080"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_displays_as_it_is_parsed() {
        for text in ["10.0.0.7:8080", "[::1]:80", "dns:payment-headless:8080", "dns:a.b_c.d:65535"] {
            assert_eq!(EndpointSpec::parse(text).map(|e| e.to_string()), Ok(text.to_owned()));
        }
        assert_eq!(EndpointSpec::parse("dns:Pay.Shop.:80").map(|e| e.to_string()), Ok("dns:pay.shop.:80".to_owned()));
    }

    #[test]
    fn an_invalid_endpoint_is_reported_with_a_hint() {
        let table = [
            ("payment:8080", "`dns:payment:8080`"),
            ("payment", "`dns:payment:PORT`"),
            ("::1", "`[::1]:PORT`"),
            ("10.0.0.7", "`10.0.0.7:PORT`"),
            ("http://payment:8080/x", "`dns:payment:8080`"),
            ("http://payment", "`dns:payment:80`"),
            ("https://payment/", "`dns:payment:443`"),
            ("HTTPS://[::1]?x", "`[::1]:443`"),
            ("http://10.0.0.7", "`10.0.0.7:80`"),
            ("tcp://payment", "`dns:payment:PORT`"),
            ("http://pay ment", "`10.0.0.7:8080`"),
            ("http://payment:0", "`10.0.0.7:8080`"),
            ("https://10.0.0.7:8080", "`10.0.0.7:8080`"),
            ("10.0.0.7:0", "1 to 65535"),
            ("10.0.0.7:99999", "10.0.0.7:8080"),
            ("dns:payment", "`dns:NAME:PORT`"),
            ("dns:pay ment:80", "`dns:NAME:PORT`"),
            ("dns::80", "`dns:NAME:PORT`"),
            ("dns:10.0.0.7:80", "`10.0.0.7:80`"),
            ("", "`10.0.0.7:8080`"),
        ];
        for (text, hint) in table {
            let fault = EndpointSpec::parse(text).expect_err(text);
            assert!(fault.hint.as_deref().is_some_and(|h| h.contains(hint)), "{text}: {fault}");
        }
    }
}
