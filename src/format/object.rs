//! A JSON object as Go's decoder sees it, and what is written in its place.

use serde_json::{Map, Value};

use super::FormatError;

/// The fields of an object. What is taken out of it has been understood; the rest is kept.
#[derive(Clone, Debug)]
pub(super) struct Object(Map<String, Value>);

impl Object {
    pub(super) fn parse(text: &str) -> Result<Self, FormatError> {
        match serde_json::from_str(text)? {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(FormatError::of("is not a JSON object")),
        }
    }

    /// The field of that name. Go matches names whatever their case, and prefers the exact one.
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

    /// Takes a field out. Go writes what is empty as `null`, which is the same as nothing.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        let key = self.name_of(name)?.to_owned();
        self.0.remove(&key).filter(|value| !value.is_null())
    }

    /// Takes a field out if it is a text, and not an empty one.
    pub(super) fn take_text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    /// Takes a map out; `null`, nothing and what is no map are an empty one.
    pub(super) fn take_map(&mut self, name: &str) -> Map<String, Value> {
        match self.take(name) {
            Some(Value::Object(map)) => map,
            _ => Map::new(),
        }
    }

    /// Keeps a value under a name, unless it is what would be written there anyway.
    pub(super) fn keep(&mut self, name: &str, value: Option<Value>, written: &Value) {
        if let Some(value) = value.filter(|value| value != written) {
            self.0.insert(name.to_owned(), value);
        }
    }

    /// Takes a weight out that was kept because it is said in another way, if it still says the same.
    pub(super) fn take_weight(&mut self, name: &str, weight: u32, default: u32) -> Value {
        self.take(name)
            .filter(|kept| super::attributes::weight(kept, default) == weight)
            .unwrap_or(weight.into())
    }

    /// Keeps a map under a name, unless nothing is in it.
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

/// Fields in the order in which a format's own library writes them, and behind them what else a value of it had said.
#[derive(Debug, Default)]
pub(super) struct Written(Vec<(String, Value)>);

impl Written {
    pub(super) fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.push((name.to_owned(), value.into()));
        self
    }

    /// Adds the rest, in which no field that was written is left.
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

/// A map as Go writes it: an empty one is `null`.
pub(super) fn map_or_null(map: Map<String, Value>) -> Value {
    if map.is_empty() {
        Value::Null
    } else {
        Value::Object(map)
    }
}
