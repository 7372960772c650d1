//! A JSON object whose fields are found by the rules of Go's decoder, and a writer of JSON objects.

use serde_json::{Map, Value};

use super::error::FormatError;

/// The fields of an object. A decoder takes the fields that it evaluates. The remaining fields are kept for a later write.
#[derive(Clone, Debug)]
pub(super) struct Object(Map<String, Value>);

impl Object {
    pub(super) fn parse(text: &str) -> Result<Self, FormatError> {
        let value = serde_json::from_str(text).map_err(|error| FormatError::json(&error))?;
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(FormatError::of("is not a JSON object")),
        }
    }

    /// Returns the field of that name. As in Go, the case of the name is ignored, and an exact match has precedence.
    pub(super) fn field(&self, name: &str) -> Option<&Value> {
        self.0.get(self.name_of(name)?)
    }

    fn name_of<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        if self.0.contains_key(name) {
            return Some(name);
        }
        let mut names = self.0.keys();
        names
            .find(|key| key.eq_ignore_ascii_case(name))
            .map(String::as_str)
    }

    /// Returns whether the value marks its instance as out of service. The names of such flags differ between registries, and some
    /// registries write the flags as text.
    pub(super) fn is_out_of_service(&self) -> bool {
        let is = |name: &&str, flag: bool| match self.field(name) {
            Some(Value::Bool(value)) => *value == flag,
            Some(Value::String(text)) => text.eq_ignore_ascii_case(&flag.to_string()),
            _ => false,
        };
        IN_SERVICE.iter().any(|name| is(name, false))
            || OUT_OF_SERVICE.iter().any(|name| is(name, true))
    }

    /// Removes and returns a field. `null` counts as a missing field, because Go writes empty values as `null`.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        let key = self.name_of(name)?.to_owned();
        self.0.remove(&key).filter(|value| !value.is_null())
    }

    /// Removes and returns a string. Returns `None` if the field is not a string, or is an empty string.
    pub(super) fn take_text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    /// Removes and returns a map. `null`, a missing field and a value of another type result in an empty map.
    pub(super) fn take_map(&mut self, name: &str) -> Map<String, Value> {
        match self.take(name) {
            Some(Value::Object(map)) => map,
            _ => Map::new(),
        }
    }

    /// Keeps a value under a name for a later write, unless it equals `written`, the value that the format would write anyway.
    pub(super) fn keep(&mut self, name: &str, value: Option<Value>, written: &Value) {
        if let Some(value) = value.filter(|value| value != written) {
            self.0.insert(name.to_owned(), value);
        }
    }

    /// Removes the kept JSON form of a weight, and returns it if it still decodes to `weight`. Otherwise returns `weight` as a number.
    pub(super) fn take_weight(&mut self, name: &str, weight: u32, default: u32) -> Value {
        self.take(name)
            .filter(|kept| super::attributes::weight(kept, default) == weight)
            .unwrap_or(weight.into())
    }

    /// Keeps a map under a name, unless the map is empty.
    pub(super) fn keep_map(&mut self, name: &str, map: Map<String, Value>) {
        self.keep(name, Some(map.into()), &Map::new().into());
    }

    pub(super) fn rest(self) -> Map<String, Value> {
        self.0
    }
}

impl From<Map<String, Value>> for Object {
    fn from(fields: Map<String, Value>) -> Self {
        Self(fields)
    }
}

/// The fields of an object to write, in the order in which the format's own library writes them. The kept fields follow.
#[derive(Debug, Default)]
pub(super) struct Written(Vec<(String, Value)>);

impl Written {
    pub(super) fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.push((name.to_owned(), value.into()));
        self
    }

    /// Adds the kept fields. They must not contain a field that is already written.
    pub(super) fn rest(mut self, rest: Map<String, Value>) -> Self {
        self.0.extend(rest);
        self
    }

    pub(super) fn to_json(&self) -> String {
        let mut json = String::from("{");
        for (index, (name, value)) in self.0.iter().enumerate() {
            if index > 0 {
                json.push(',');
            }
            json.push_str(&Value::from(name.as_str()).to_string());
            json.push(':');
            json.push_str(&value.to_string());
        }
        json.push('}');
        json
    }
}

/// Returns a map as Go writes it: an empty map is `null`.
pub(super) fn map_or_null(map: Map<String, Value>) -> Value {
    if map.is_empty() {
        Value::Null
    } else {
        Value::Object(map)
    }
}

/// Flags that are false if the instance must not be called.
const IN_SERVICE: [&str; 4] = ["enable", "enabled", "healthy", "available"];
/// Flags that are true if the instance must not be called.
const OUT_OF_SERVICE: [&str; 3] = ["disable", "disabled", "unhealthy"];
