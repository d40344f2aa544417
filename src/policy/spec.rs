//! The shape of a policy file, as serde reads it and as editors are told of it.
//!
//! Nothing is required here and nothing has a default: what is missing, and what it means that it is, is decided by
//! `check`, so that a missing entry is reported together with all other problems.

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
use crate::rules::duration::DurationSpec;
use crate::rules::mode::ModesSpec;
use crate::rules::ratio::Ratio;
use crate::rules::rule::Rule;
use crate::rules::size::Size;
use crate::upstream::spec::{ConnectionsSpec, EndpointSpec, UpstreamProtocol, UpstreamTlsSpec};

/// The shape's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum ApiVersion {
    /// The only one so far.
    #[serde(rename = "hopguard.dev/v1alpha1")]
    V1Alpha1,
}

/// What a document is.
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
    /// Who we are in metrics, logs and `Via`. Default: $HOPGUARD_SERVICE, else "unknown".
    pub service: Option<String>,
    /// Which exchanges get a log line, and in which form.
    pub access_log: Option<AccessLogSpec>,
    /// Where calls come in.
    pub listeners: Option<Vec<ListenerSpec>>,
    /// How strictly each rule is kept.
    pub rules: Option<ModesSpec>,
    /// What every destination begins with.
    pub defaults: Option<DefaultsSpec>,
    /// Where calls go.
    pub destinations: Option<Vec<DestinationSpec>>,
}

/// `accessLog:`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with mode, format and ratio")]
pub struct AccessLogSpec {
    /// Which exchanges get a line: none, failures, all, or failures and a sample. Default errors.
    pub mode: Option<LogMode>,
    /// Default json.
    pub format: Option<LogFormat>,
    /// The share of exchanges that get a line, with mode sampled. Default 0.01.
    pub ratio: Option<Ratio>,
}

/// A shape with an entry for each rule that may stand in it, where it says `rules,`: serde needs one struct with all fields.
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
    /// Address and port, IPv6 in brackets.
    pub bind: Option<Bind>,
    /// The destination that gets every call.
    pub to: Option<String>,
    /// Explicit proxy: each call goes to the destination that its host names.
    pub forward: Option<bool>,
    /// Whose calls these are. Default: inbound with `to`, outbound with `forward`.
    pub direction: Option<Direction>,
    /// How long callers may take.
    pub timeouts: Option<ListenerTimeoutsSpec>,
    /// The whole header section of a request, in bytes or KiB/MiB: 1KiB to 256KiB. Default 64KiB.
    pub max_header_size: Option<Size<1_024, 262_144>>,
    /// Certificate and key; without them calls come in as plain text.
    pub tls: Option<ListenerTlsSpec>,
}

/// `timeouts:` of a listener.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with headers and idle")]
pub struct ListenerTimeoutsSpec {
    /// For a caller to send a whole request head. Default 10s.
    pub headers: Option<DurationSpec>,
    /// For a caller's connection without a request. Default 60s.
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
        /// Where its instances are. None: where the caller was going.
        pub endpoints: Option<Vec<EndpointSpec>>,
        /// Default auto.
        pub protocol: Option<UpstreamProtocol>,
        /// TLS to the upstream; also when empty.
        pub tls: Option<UpstreamTlsSpec>,
        rules,
        /// Pooled connections to it.
        pub connections: Option<ConnectionsSpec>,
        /// Calls that are treated differently; the most specific wins, whatever the order.
        pub routes: Option<Vec<RouteSpec>>,
    }
} }

catalogue! { route => with_rules! {
    /// One of `routes:`.
    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a route with name and match")]
    #[schemars(extend("required" = ["name"]))]
    pub struct RouteSpec {
        /// Unique in its destination; the metric label. Not `default`, which stands for all other calls.
        pub name: Option<String>,
        /// Which calls. Without it, all.
        pub r#match: Option<MatchSpec>,
        rules,
        /// Lives by idle and maxDuration, not by request, once the head of the answer is there.
        pub stream: Option<bool>,
    }
} }

/// `match:` of a route. All that is written must hold.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping with methods, path, headers or grpc"
)]
#[schemars(extend("not" = { "required": ["path", "grpc"] }))]
pub struct MatchSpec {
    /// Any of these, in upper case.
    pub methods: Option<Vec<MethodName>>,
    /// A template like /orders/{id} or /files/{*rest}.
    pub path: Option<String>,
    /// Exact values.
    pub headers: Option<BTreeMap<String, String>>,
    /// gRPC calls of package.Service/Method, or of a whole package.Service.
    pub grpc: Option<String>,
}

/// A method like GET. Not a star, which HTTP would allow: it is meant for all methods and would match none.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(inline, extend("not" = { "const": "*" }))]
pub struct MethodName(pub String);

impl<'de> Deserialize<'de> for MethodName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "*" {
            let hint = "remove `methods`: without it, all methods match";
            return Err(de::Error::custom(InvalidValue::new("`*` is no method", hint)));
        }
        Ok(Self(text))
    }
}

/// An address to listen at, `IP:PORT`, IPv6 in brackets; port 0 lets the system choose.
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
            InvalidValue::new(format!("`{text}` is no address to listen at"), hint)
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
