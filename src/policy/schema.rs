//! JSON Schema of a policy file, for editors. Generated from the types that serde reads, so it cannot drift.

use serde_json::Value;

use super::spec::PolicySpec;

/// The schema (draft 2020-12), indented, with a final line break.
pub fn schema() -> String {
    let mut schema = schemars::schema_for!(PolicySpec).to_value();
    refuse_null(&mut schema);
    format!("{schema:#}\n")
}

/// An optional entry may be absent, but one without a value is refused, so the schema must not allow null.
fn refuse_null(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.values_mut().for_each(refuse_null);
            if object.get("default").is_some_and(Value::is_null) {
                object.remove("default");
            }
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|name| name != "null");
                if let [single] = types.as_slice() {
                    let single = single.clone();
                    object.insert("type".into(), single);
                }
            }
            if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
                choices.retain(|choice| choice.get("type").is_none_or(|name| name != "null"));
                if let [Value::Object(single)] = choices.as_mut_slice() {
                    let mut single = std::mem::take(single);
                    object.remove("anyOf");
                    object.append(&mut single);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(refuse_null),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
