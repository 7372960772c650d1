//! A value in the JSON together with its path, so that errors can name the field.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use super::duration;
use super::error::ServiceConfigError;

type Result<T> = std::result::Result<T, ServiceConfigError>;

/// A value in the JSON.
#[derive(Clone, Debug)]
pub(super) struct Node<'a> {
    value: &'a Value,
    path: String,
}

impl<'a> Node<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        let path = String::new();
        Self { value, path }
    }

    pub(super) fn is_null(&self) -> bool {
        self.value.is_null()
    }

    /// Returns a field of an object, also if it is `null`. `None` if the field is missing. The exact name takes precedence; otherwise upper
    /// and lower case are not distinguished, as in grpc-go.
    pub(super) fn field_or_null(&self, name: &str) -> Result<Option<Self>> {
        let object = match self.value {
            Value::Object(object) => object,
            // In Go, `null` leaves a struct as it is.
            Value::Null => return Ok(None),
            _ => return Err(self.unexpected("an object")),
        };
        let similar = || {
            let mut fields = object.iter();
            let found = fields.find(|(field, _)| field.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value)
        };
        let found = object.get(name).or_else(similar);
        Ok(found.map(|value| self.child(value, name)))
    }

    /// Returns a field of an object. `None` if the field is missing or `null`.
    pub(super) fn field(&self, name: &str) -> Result<Option<Self>> {
        let found = self.field_or_null(name)?;
        Ok(found.filter(|found| !found.is_null()))
    }

    /// Returns the node of a field for an error, also if the field is missing.
    pub(super) fn missing(&self, name: &str, expected: impl fmt::Display) -> ServiceConfigError {
        let path = self.child(&Value::Null, name).path;
        ServiceConfigError::new(&path, format!("expected {expected}, found nothing"))
    }

    /// Returns the only field of an object, with its name.
    pub(super) fn only_field(&self) -> Result<(&'a str, Self)> {
        const EXPECTED: &str = "an object with exactly one field, the name of a policy";
        let object = self.value.as_object();
        let object = object.ok_or_else(|| self.unexpected(EXPECTED))?;
        match object.iter().next() {
            Some((name, value)) if object.len() == 1 => Ok((name, self.child(value, name))),
            _ => {
                let found = format!("{} fields", object.len());
                Err(self.rejected(EXPECTED, &found))
            }
        }
    }

    /// Returns the elements of an array.
    pub(super) fn items(&self) -> Result<Vec<Self>> {
        let items = self.value.as_array();
        let items = items.ok_or_else(|| self.unexpected("an array"))?;
        let node = |(index, value)| Self {
            value,
            path: format!("{}[{index}]", self.path),
        };
        Ok(items.iter().enumerate().map(node).collect())
    }

    /// Returns the fields of an object whose values are strings.
    pub(super) fn texts(&self) -> Result<Vec<(&'a str, &'a str)>> {
        let object = self.value.as_object();
        let texts = object.and_then(|object| {
            let text = |(name, value): (&'a String, &'a Value)| Some((&**name, value.as_str()?));
            object.iter().map(text).collect()
        });
        texts.ok_or_else(|| self.unexpected("an object whose values are strings"))
    }

    /// Checks that the value is an object or `null`.
    pub(super) fn object(&self) -> Result<()> {
        self.field("").map(drop)
    }

    pub(super) fn text(&self) -> Result<&'a str> {
        let text = self.value.as_str();
        text.ok_or_else(|| self.unexpected("a string"))
    }

    pub(super) fn boolean(&self) -> Result<bool> {
        let boolean = self.value.as_bool();
        boolean.ok_or_else(|| self.unexpected("true or false"))
    }

    /// Returns an integer that is at least `least`. A fraction or an exponent is rejected, also if the number is an integer.
    pub(super) fn integer(&self, least: i64) -> Result<i64> {
        let integer = self.value.as_i64().filter(|integer| *integer >= least);
        integer.ok_or_else(|| self.unexpected(format_args!("an integer of at least {least}")))
    }

    /// Returns an integer from `least` to `most`.
    pub(super) fn integer_in(&self, least: u32, most: u32) -> Result<u32> {
        let integer = self.value.as_i64().map(u32::try_from);
        let integer = integer.and_then(std::result::Result::ok);
        let integer = integer.filter(|integer| (least..=most).contains(integer));
        integer.ok_or_else(|| self.unexpected(format_args!("an integer from {least} to {most}")))
    }

    /// Returns a number for which `is_valid` holds.
    pub(super) fn number(&self, expected: &str, is_valid: impl Fn(f64) -> bool) -> Result<f64> {
        let number = self.value.as_f64().filter(|number| is_valid(*number));
        number.ok_or_else(|| self.unexpected(expected))
    }

    /// Returns a duration in the JSON form of Protobuf.
    pub(super) fn duration(&self) -> Result<Duration> {
        let duration = self.value.as_str().and_then(duration::parse);
        duration.ok_or_else(|| self.unexpected("a duration such as \"1.5s\""))
    }

    /// Returns a duration above zero.
    pub(super) fn positive_duration(&self) -> Result<Duration> {
        let duration = self.duration()?;
        if duration.is_zero() {
            return Err(self.unexpected("a duration above zero"));
        }
        Ok(duration)
    }

    /// Creates an error for this value.
    pub(super) fn unexpected(&self, expected: impl fmt::Display) -> ServiceConfigError {
        self.rejected(expected, &shown(self.value))
    }

    pub(super) fn rejected(&self, expected: impl fmt::Display, found: &str) -> ServiceConfigError {
        let reason = format!("expected {expected}, found {found}");
        ServiceConfigError::new(&self.path, reason)
    }

    /// Creates an error for a value that has the right form but cannot be used.
    pub(super) fn unusable(&self, reason: String) -> ServiceConfigError {
        ServiceConfigError::new(&self.path, reason)
    }

    fn child(&self, value: &'a Value, name: &str) -> Self {
        // A path contains only names of known fields and policies: unknown policies are skipped, so no error has their path.
        let path = match self.path.as_str() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        };
        Self { value, path }
    }
}

/// Describes a value in a few words.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => shortened(&number.to_string()),
        Value::String(text) => escaped(text),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// Returns a text in quotes, escaped and shortened.
pub(super) fn escaped(text: &str) -> String {
    format!("{:?}", shortened(text))
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// Limit on the characters of a value in an error.
const SHOWN: usize = 40;
