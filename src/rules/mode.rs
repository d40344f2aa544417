//! Mode of each rule: `enforce`, `dryRun` (the rule decides, and its decisions are only counted and logged) or `off`.
//!
//! The pipeline checks the mode of a rule before it acts on the rule's decision; the rules themselves do not know their
//! mode. [`RuleName`] lists all rules with a mode, with their names in metrics, logs and policy; it is made from the
//! catalogue, as are the shape and the values of `rules:`.

use std::fmt;

use schemars::{JsonSchema, Schema};
use serde::de::{self, Deserialize, Deserializer, EnumAccess, VariantAccess, Visitor};
use serde_json::{Value, json};

use super::toggle::allow_false;
use crate::problems::{Cursor, Sourced, old_word};

/// Mode of a rule. Displays as in a policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, JsonSchema)]
#[schemars(rename_all = "camelCase", transform = allow_old_word, transform = allow_false)]
pub enum Mode {
    /// Its decisions apply.
    #[default]
    Enforce,
    /// Its decisions are counted and logged, and change nothing.
    DryRun,
    /// It does not run.
    Off,
}

impl Mode {
    /// Whether the rule's decisions apply.
    pub const fn is_enforced(self) -> bool {
        matches!(self, Self::Enforce)
    }

    /// Whether the rule does not run at all.
    pub const fn is_off(self) -> bool {
        matches!(self, Self::Off)
    }

    /// The stable name: `enforce`, `dryRun` or `off`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::DryRun => "dryRun",
            Self::Off => "off",
        }
    }
}

/// Deprecated word for `dryRun`.
const OLD_DRY_RUN: &str = "warn";

/// A mode as a policy says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeSpec {
    mode: Mode,
    is_old_word: bool,
}

impl ModeSpec {
    const WORDS: &'static [&'static str] = &[Mode::Enforce.as_str(), Mode::DryRun.as_str(), Mode::Off.as_str()];

    fn parse(word: &str) -> Option<Self> {
        let is_old_word = word == OLD_DRY_RUN;
        let mode = [Mode::Enforce, Mode::DryRun, Mode::Off].into_iter().find(|mode| mode.as_str() == word);
        mode.or(is_old_word.then_some(Mode::DryRun)).map(|mode| Self { mode, is_old_word })
    }

    /// Warns about the deprecated word.
    fn check(self, at: &Cursor<'_>) -> Sourced<Mode> {
        if self.is_old_word {
            at.warn(old_word(OLD_DRY_RUN, Mode::DryRun.as_str()));
        }
        at.set(self.mode)
    }
}

impl<'de> Deserialize<'de> for ModeSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ModeVisitor;
        impl<'de> Visitor<'de> for ModeVisitor {
            type Value = ModeSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mode")
            }

            fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<ModeSpec, A::Error> {
                let (word, rest) = data.variant::<String>()?;
                rest.unit_variant()?;
                ModeSpec::parse(&word).ok_or_else(|| de::Error::unknown_variant(&word, ModeSpec::WORDS))
            }
        }
        deserializer.deserialize_enum("Mode", Self::WORDS, ModeVisitor)
    }
}

fn allow_old_word(schema: &mut Schema) {
    if let Some(Value::Array(words)) = schema.get_mut("oneOf") {
        let description = "The old word for dryRun.";
        words.push(json!({ "const": OLD_DRY_RUN, "deprecated": true, "description": description, "type": "string" }));
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! modes {
    ({} { $( [$field:ident $Rule:ident $key:tt $text:tt] )* }) => {
        /// The rules that have a mode.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum RuleName {
            $( #[doc = $text] $Rule, )*
        }

        impl RuleName {
            /// All of them, in the order of the catalogue.
            pub const ALL: [Self; [$( $key ),*].len()] = [$( Self::$Rule ),*];

            /// The stable name in metrics and logs; snake_case.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $( Self::$Rule => stringify!($field), )*
                }
            }

            /// The key in `rules:` of a policy; camelCase.
            pub const fn key(self) -> &'static str {
                match self {
                    $( Self::$Rule => $key, )*
                }
            }
        }

        /// `rules:` of a policy.
        #[derive(Debug, Clone, Default, PartialEq, serde::Deserialize, JsonSchema)]
        #[serde(default, deny_unknown_fields, expecting = "a mapping of rules and their modes")]
        pub struct ModesSpec {
            $(
                #[doc = concat!($text, " Default enforce.")]
                #[serde(rename = $key)]
                #[schemars(with = "Option<Mode>")]
                pub $field: Option<ModeSpec>,
            )*
        }

        /// The mode of each rule.
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub struct Modes {
            $( #[doc = $text] pub $field: Sourced<Mode>, )*
        }

        impl Modes {
            /// The built-in modes: every rule is enforced.
            pub const fn built_in() -> Self {
                Self { $( $field: Sourced::built_in(Mode::Enforce), )* }
            }

            /// The mode of one rule, and its line.
            pub const fn of(&self, rule: RuleName) -> &Sourced<Mode> {
                match rule {
                    $( RuleName::$Rule => &self.$field, )*
                }
            }
        }

        impl ModesSpec {
            /// Lays this layer over the layer below. Warns about deprecated words; other mistakes are found when it is
            /// read.
            pub fn check(&self, base: &Modes, at: &Cursor<'_>) -> Modes {
                let over = |rule: RuleName, mode: Option<ModeSpec>| {
                    mode.map_or_else(|| base.of(rule).clone(), |mode| mode.check(&at.key(rule.key())))
                };
                Modes { $( $field: over(RuleName::$Rule, self.$field), )* }
            }
        }
    };
}
catalogue! { modes => modes! {} }

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problems::Origin;
    use crate::rules::tests::checked;

    fn check(yaml: &str) -> Modes {
        let (modes, problems) = checked(yaml, |spec: &ModesSpec, at| spec.check(&Modes::built_in(), at));
        assert!(problems.is_empty(), "{problems:?}");
        modes
    }

    #[test]
    fn every_rule_is_enforced_unless_the_policy_says_otherwise() {
        let modes = check("{}");
        for rule in RuleName::ALL {
            assert!(modes.of(rule).value.is_enforced(), "{rule}");
            assert_eq!(modes.of(rule).origin, Origin::BuiltIn);
        }
    }

    #[test]
    fn each_key_sets_the_mode_of_its_own_rule_and_no_other() {
        for rule in RuleName::ALL {
            let modes = check(&format!("{}: dryRun", rule.key()));
            for other in RuleName::ALL {
                let mode = modes.of(other);
                assert_eq!(mode.value, if other == rule { Mode::DryRun } else { Mode::Enforce }, "{rule}: {other}");
                assert_eq!(mode.origin == Origin::BuiltIn, other != rule);
            }
        }
    }

    #[test]
    fn the_old_word_for_a_dry_run_is_read_with_a_warning() {
        let (modes, problems) = checked("retry: warn", |spec: &ModesSpec, at| spec.check(&Modes::built_in(), at));
        assert_eq!(modes.retry.value, Mode::DryRun);
        assert_eq!(problems, ["retry: `warn` is the old word for `dryRun` | write `dryRun`"]);
        let error = serde_json::from_value::<ModeSpec>("wran".into()).unwrap_err();
        assert!(error.to_string().contains("expected one of `enforce`, `dryRun`, `off`"), "{error}");
    }

    #[test]
    fn the_names_of_a_rule_differ_in_their_case_only() {
        for rule in RuleName::ALL {
            assert_eq!(rule.as_str().replace('_', ""), rule.key().to_lowercase());
            assert_eq!(rule.as_str(), rule.as_str().to_lowercase());
        }
    }

    #[test]
    fn a_mode_is_read_as_it_is_shown() {
        for mode in [Mode::Enforce, Mode::DryRun, Mode::Off] {
            let read = serde_json::from_value::<ModeSpec>(mode.as_str().into()).unwrap();
            assert_eq!(read, ModeSpec { mode, is_old_word: false });
        }
        assert!(Mode::Off.is_off() && !Mode::DryRun.is_off() && !Mode::DryRun.is_enforced());
    }
}
