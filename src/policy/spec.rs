//! Shape of a policy file, as serde reads it and as the JSON Schema describes it.
//!
//! All entries are optional here and none has a default: `check` decides what a missing entry means, so that it is
//! reported together with all other problems.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::model::{Direction, LogFormat, LogMode};
use crate::problems::InvalidValue;
use crate::rules::catalogue;
use crate::rules::count::Count;
use crate::rules::duration::DurationSpec;
use crate::rules::mode::ModesSpec;
use crate::rules::ratio::Ratio;
use crate::rules::rule::Rule;
use crate::rules::size::Size;
use crate::upstream::spec::{ConnectionsSpec, EndpointSpec, UpstreamProtocol, UpstreamTlsSpec};

/// Version of the policy format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum ApiVersion {
    /// The only version so far.
    #[serde(rename = "hopguard.dev/v1alpha1")]
    V1Alpha1,
}

/// Kind of the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum DocumentKind {
    /// The only kind so far.
    Policy,
}

/// A hopguard policy file.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with apiVersion, kind and more")]
#[schemars(title = "hopguard policy", extend("required" = ["apiVersion", "kind"]))]
pub struct PolicySpec {
    /// Always hopguard.dev/v1alpha1.
    pub api_version: Option<ApiVersion>,
    /// Always Policy.
    pub kind: Option<DocumentKind>,
    /// Name of this service in metrics and logs. Default: $HOPGUARD_SERVICE, else "unknown".
    pub service: Option<String>,
    /// Which exchanges are logged, and in which format.
    pub access_log: Option<AccessLogSpec>,
    /// Addresses for downstream connections.
    pub listeners: Option<Vec<ListenerSpec>>,
    /// Mode of each rule.
    pub rules: Option<ModesSpec>,
    /// Values of all destinations that have none of their own.
    pub defaults: Option<DefaultsSpec>,
    /// Named upstreams with their rules.
    pub destinations: Option<Vec<DestinationSpec>>,
}

/// `accessLog:`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with mode, format and ratio")]
pub struct AccessLogSpec {
    /// Which exchanges are logged: none, failures, all, or failures and a share of the others. Default errors.
    pub mode: Option<LogMode>,
    /// Format of a line. Default json.
    pub format: Option<LogFormat>,
    /// Share of the exchanges that are logged with mode sampled. Default 0.01.
    pub ratio: Option<Ratio>,
}

/// A shape that contains the rules of its layer in the place of `rules,`. serde needs one struct with all fields to
/// report unknown ones.
macro_rules! with_rules {
    (
        {
            $(#[$meta:meta])*
            pub struct $Spec:ident {
                $( $(#[$before_meta:meta])* pub $before:ident: $Before:ty, )*
                rules,
                $( $(#[$after_meta:meta])* pub $after:ident: $After:ty, )*
            }
        }
        { $( [$field:ident $Rule:ident $key:tt $text:tt $($_of:ident)?] )* }
    ) => {
        $(#[$meta])*
        pub struct $Spec {
            $( $(#[$before_meta])* pub $before: $Before, )*
            $( #[doc = $text] #[serde(rename = $key)] pub $field: Option<<crate::rules::$field::$Rule as Rule>::Spec>, )*
            $( $(#[$after_meta])* pub $after: $After, )*
        }
    };
}

catalogue! { defaults => with_rules! {
    /// `defaults:`.
    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of defaults")]
    pub struct DefaultsSpec {
        rules,
        /// Pooled upstream connections.
        pub connections: Option<ConnectionsSpec>,
    }
} }

/// One of `listeners:`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a listener with name, bind and to or forward"
)]
#[schemars(extend("required" = ["name", "bind"], "anyOf" = [{ "required": ["to"] }, { "required": ["forward"] }]))]
pub struct ListenerSpec {
    /// Unique.
    pub name: Option<String>,
    /// IP address and port, IPv6 in brackets.
    pub bind: Option<Bind>,
    /// Destination of every call.
    pub to: Option<String>,
    /// Explicit proxy: the host of each call chooses the destination.
    pub forward: Option<bool>,
    /// Traffic direction. Default: inbound with `to`, outbound with `forward`.
    pub direction: Option<Direction>,
    /// Timeouts of downstream connections.
    pub timeouts: Option<ListenerTimeoutsSpec>,
    /// Upper bound of a request's header section, in bytes or KiB/MiB: 1KiB to 256KiB. Default 64KiB.
    pub max_header_size: Option<Size<1_024, 262_144>>,
    /// Most header fields of a request: 1 to 1024. Default 256.
    pub max_header_count: Option<Count<1, 1_024>>,
    /// Concurrent HTTP/2 streams per downstream connection: 1 to 1024. Default 256.
    pub max_streams: Option<Count<1, 1_024>>,
    /// Certificate and key; without them connections are plain text.
    pub tls: Option<ListenerTlsSpec>,
}

/// `timeouts:` of a listener.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with headers and idle")]
pub struct ListenerTimeoutsSpec {
    /// For a whole request head. Default 10s.
    pub headers: Option<DurationSpec>,
    /// For a connection without a request. Default 60s.
    pub idle: Option<DurationSpec>,
}

/// `tls:` of a listener.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with certificate and key")]
#[schemars(extend("required" = ["certificate", "key"]))]
pub struct ListenerTlsSpec {
    /// Certificate chain (PEM), relative to the policy's folder.
    pub certificate: Option<String>,
    /// Private key (PEM), relative to the policy's folder.
    pub key: Option<String>,
}

catalogue! { destination => with_rules! {
    /// One of `destinations:`.
    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a destination with name and more")]
    #[schemars(extend("required" = ["name"]))]
    pub struct DestinationSpec {
        /// Unique; the metric label.
        pub name: Option<String>,
        /// Exact names, `*.suffix` or `*`, without port.
        pub hosts: Option<Vec<String>>,
        /// Addresses of its instances. Default: the host and port of each request.
        pub endpoints: Option<Vec<EndpointSpec>>,
        /// Protocol of the upstream. Default auto.
        pub protocol: Option<UpstreamProtocol>,
        /// TLS to the upstream; `{}` suffices.
        pub tls: Option<UpstreamTlsSpec>,
        rules,
        /// Pooled connections to it.
        pub connections: Option<ConnectionsSpec>,
        /// Calls with values of their own; the most specific match wins, whatever the order.
        pub routes: Option<Vec<RouteSpec>>,
    }
} }

catalogue! { route => with_rules! {
    /// One of `routes:`.
    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a route with name and match")]
    #[schemars(extend("required" = ["name"]))]
    pub struct RouteSpec {
        /// Unique in its destination; the metric label. Not `default`, the name of the implicit route.
        pub name: Option<String>,
        /// Calls of the route. Default: all.
        pub r#match: Option<MatchSpec>,
        rules,
        /// Once the response head is received, idle and maxDuration apply instead of request. Default false.
        pub stream: Option<bool>,
    }
} }

/// `match:` of a route. All conditions must hold.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping with methods, path, headers or grpc"
)]
#[schemars(extend("not" = { "required": ["path", "grpc"] }))]
pub struct MatchSpec {
    /// Any of these methods, in upper case.
    pub methods: Option<Vec<MethodName>>,
    /// A template like /orders/{id} or /files/{*rest}.
    pub path: Option<String>,
    /// Headers with exact values.
    pub headers: Option<BTreeMap<String, String>>,
    /// gRPC calls of package.Service/Method, or of all methods of package.Service.
    pub grpc: Option<String>,
}

/// A method like GET. Not a star: HTTP allows it as a method, but it is meant for all methods and would match none.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(inline, extend("not" = { "const": "*" }))]
pub struct MethodName(pub String);

impl<'de> Deserialize<'de> for MethodName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "*" {
            let hint = "remove `methods`: without it, all methods match";
            return Err(de::Error::custom(InvalidValue::new("`*` is not a method", hint)));
        }
        Ok(Self(text))
    }
}

/// An address to listen at, `IP:PORT`, IPv6 in brackets; the system chooses the port for 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind(pub SocketAddr);

impl Bind {
    fn parse(text: &str) -> Result<SocketAddr, InvalidValue> {
        text.parse().map_err(|_| {
            let bare = text.strip_prefix(':').or_else(|| text.strip_prefix("*:")).unwrap_or(text);
            let hint = if bare.parse::<u16>().is_ok() {
                format!("write `0.0.0.0:{bare}`, or `127.0.0.1:{bare}` for callers on this machine only")
            } else if let Some(port) = text.strip_prefix("localhost:") {
                format!("write `127.0.0.1:{port}`")
            } else {
                "write an IP address and a port, like `0.0.0.0:8080` or `[::]:8080`".into()
            };
            InvalidValue::new(format!("`{text}` is not an address to listen at"), hint)
        })
    }
}

impl<'de> Deserialize<'de> for Bind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BindVisitor;
        impl Visitor<'_> for BindVisitor {
            type Value = Bind;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address like `0.0.0.0:8080`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bind, E> {
                Bind::parse(text).map(Bind).map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Bind, E> {
                self.visit_str(&number.to_string())
            }
        }
        deserializer.deserialize_any(BindVisitor)
    }
}

impl JsonSchema for Bind {
    fn schema_name() -> Cow<'static, str> {
        "Bind".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "IP:PORT, IPv6 in brackets.",
            "pattern": "^([0-9.]+|\\[[0-9A-Fa-f:.]+(%[0-9]+)?\\]):[0-9]{1,5}$",
            "examples": ["0.0.0.0:8080", "[::]:8080"],
        })
    }
}
