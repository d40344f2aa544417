//! Values of all rules in the layers of a policy, made from the catalogue: those of a destination and those of a route.
//!
//! Used by name (`route.retry`) or all together (hash, rows). `policy::spec` makes the shapes in YAML, `policy::check`
//! their checks.

use super::rule::{Row, RowContext, Rule};

/// Sorts the catalogue into lists and passes one of them to a macro, each rule in brackets:
///
/// | list | rules | brackets |
/// |---|---|---|
/// | `all` | all | `[field Type key layers…]` |
/// | `modes` | those with a mode | `[field Type key TEXT]` |
/// | `defaults`, `destination` | those with this layer | `[field Type key TEXT destination]` or `[… route]`: what the values belong to |
/// | `route` | those whose values belong to a route | `[field Type key TEXT]` |
/// | `per_destination` | those whose values belong to a destination | `[field Type key TEXT]` |
macro_rules! lists {
    ($list:ident $then:ident $args:tt
        $( $field:ident $Rule:ident $key:tt {
            $( per destination { $( defaults $d_defaults:tt )? destination $d_destination:tt } )?
            $( per route { $( defaults $r_defaults:tt )? destination $r_destination:tt route $r_route:tt } )?
            $( mode $mode:tt )?
        } )*
    ) => {
        $crate::rules::layers::pick! { $list $then $args
            all { $( [$field $Rule $key
                $( $( Defaults $d_defaults )? Destination $d_destination )?
                $( $( Defaults $r_defaults )? Destination $r_destination Route $r_route )?
            ] )* }
            modes { $( $( [$field $Rule $key $mode] )? )* }
            defaults { $(
                $( $( [$field $Rule $key $d_defaults destination] )? )?
                $( $( [$field $Rule $key $r_defaults route] )? )?
            )* }
            destination { $(
                $( [$field $Rule $key $d_destination destination] )?
                $( [$field $Rule $key $r_destination route] )?
            )* }
            route { $( $( [$field $Rule $key $r_route] )? )* }
            per_destination { $( $( [$field $Rule $key $d_destination] )? )* }
        }
    };
}
pub(crate) use lists;

/// Passes the list of this name to a macro: the first list here, or one behind it.
macro_rules! pick {
    (all $then:ident $args:tt all $list:tt $($behind:tt)*) => { $then! { $args $list } };
    (modes $then:ident $args:tt modes $list:tt $($behind:tt)*) => { $then! { $args $list } };
    (defaults $then:ident $args:tt defaults $list:tt $($behind:tt)*) => { $then! { $args $list } };
    (destination $then:ident $args:tt destination $list:tt $($behind:tt)*) => { $then! { $args $list } };
    (route $then:ident $args:tt route $list:tt $($behind:tt)*) => { $then! { $args $list } };
    (per_destination $then:ident $args:tt per_destination $list:tt) => { $then! { $args $list } };
    ($name:ident $then:ident $args:tt $other:ident $list:tt $($behind:tt)*) => {
        $crate::rules::layers::pick! { $name $then $args $($behind)* }
    };
}
pub(crate) use pick;

/// A layer of a policy in which values of a rule may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// `defaults`.
    Defaults,
    /// One of `destinations`.
    Destination,
    /// One of `routes`.
    Route,
}

impl Layer {
    /// Name in documentation.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Defaults => "`defaults`",
            Self::Destination => "destination",
            Self::Route => "route",
        }
    }
}

/// Entry of the catalogue.
#[derive(Debug, Clone, Copy)]
pub struct RuleEntry {
    /// Name in metrics and logs; snake_case.
    pub name: &'static str,
    /// Key in YAML; camelCase.
    pub key: &'static str,
    /// Layers of its values; empty for a rule that has only a mode.
    pub layers: &'static [Layer],
}

macro_rules! entries {
    ({} { $( [$field:ident $Rule:ident $key:tt $( $Layer:ident $text:tt )*] )* }) => {
        /// All rules, in the order in which they are shown.
        pub const CATALOGUE: &[RuleEntry] = &[
            $( RuleEntry { name: stringify!($field), key: $key, layers: &[$( Layer::$Layer ),*] } ),*
        ];
    };
}
catalogue! { all => entries! {} }

/// Values of all rules after one layer has been laid over those below.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleValues {
    /// Values that belong to a destination.
    pub destination: DestinationRules,
    /// Values that belong to a route.
    pub route: RouteRules,
}

impl RuleValues {
    /// The lowest layer.
    pub const BUILT_IN: Self = Self { destination: DestinationRules::BUILT_IN, route: RouteRules::BUILT_IN };
}

/// The rows of one rule.
#[derive(Debug)]
pub struct RuleRows {
    /// The rule's key in YAML.
    pub key: &'static str,
    /// Its effective values.
    pub rows: Vec<Row>,
}

macro_rules! values {
    ({ $(#[$meta:meta])* $Values:ident } { $( [$field:ident $Rule:ident $key:tt $text:tt] )* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Hash)]
        pub struct $Values {
            $( #[doc = $text] pub $field: <super::$field::$Rule as Rule>::Value, )*
        }

        impl $Values {
            /// The built-in values.
            pub const BUILT_IN: Self = Self { $( $field: <super::$field::$Rule as Rule>::BUILT_IN, )* };

            /// The rows of each rule, without the rules that equal `below`, unless they are shown everywhere.
            pub fn rows(&self, below: Option<&Self>, seen: &RowContext) -> Vec<RuleRows> {
                let mut shown = Vec::new();
                $(
                    let is_new = below.is_none_or(|below| below.$field != self.$field);
                    if is_new || <super::$field::$Rule as Rule>::IS_SHOWN_EVERYWHERE {
                        let rows = <super::$field::$Rule as Rule>::rows(&self.$field, seen);
                        shown.push(RuleRows { key: $key, rows });
                    }
                )*
                shown
            }
        }
    };
}
catalogue! { per_destination => values! {
    /// Values of the rules that belong to a destination.
    DestinationRules
} }
catalogue! { route => values! {
    /// Values of the rules that belong to a route.
    RouteRules
} }

/// The rows of all rules with values, in the order of the catalogue.
pub fn rows(destination: &DestinationRules, route: &RouteRules, seen: &RowContext) -> Vec<Row> {
    let mut rules = destination.rows(None, seen);
    rules.extend(route.rows(None, seen));
    rules.sort_by_key(|rule| CATALOGUE.iter().position(|entry| entry.key == rule.key));
    rules.into_iter().flat_map(|rule| rule.rows.into_iter().map(move |row| row.below(rule.key))).collect()
}
