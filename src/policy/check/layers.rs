//! Check of the rules in `defaults`, at a destination and at a route: each layer is laid over the one below.

use crate::policy::spec::{DefaultsSpec, DestinationSpec, RouteSpec};
use crate::problems::Cursor;
use crate::rules::catalogue;
use crate::rules::layers::{RouteRules, RuleValues};
use crate::rules::rule::Rule;

macro_rules! over_all_rules {
    ({ $Spec:ident } { $( [$field:ident $Rule:ident $key:tt $text:tt $of:ident] )* }) => {
        impl $Spec {
            /// Lays the rules of this layer over those of the layer below.
            pub(super) fn check_rules(&self, below: &RuleValues, at: &Cursor<'_>) -> RuleValues {
                let mut rules = below.clone();
                $(
                    if let Some(spec) = &self.$field {
                        let below = &below.$of.$field;
                        rules.$of.$field = <crate::rules::$field::$Rule as Rule>::check(spec, below, &at.key($key));
                    }
                )*
                rules
            }
        }
    };
}
catalogue! { defaults => over_all_rules! { DefaultsSpec } }
catalogue! { destination => over_all_rules! { DestinationSpec } }

macro_rules! over_rules_of_a_route {
    ({ $Spec:ident } { $( [$field:ident $Rule:ident $key:tt $text:tt] )* }) => {
        impl $Spec {
            /// Lays the rules of this route over those of its destination.
            pub(super) fn check_rules(&self, below: &RouteRules, at: &Cursor<'_>) -> RouteRules {
                let mut rules = below.clone();
                $(
                    if let Some(spec) = &self.$field {
                        let below = &below.$field;
                        rules.$field = <crate::rules::$field::$Rule as Rule>::check_route(spec, below, &at.key($key));
                    }
                )*
                rules
            }
        }
    };
}
catalogue! { route => over_rules_of_a_route! { RouteSpec } }
