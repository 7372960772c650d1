//! The control keys, which an operator writes, and the status keys, which a server writes: their names and their JSON.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Whether a server is in service.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Serving,
    Draining,
    Paused,
}

impl State {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Paused => "paused",
        }
    }
}

/// The value of a status key. A field that cannot be read counts as missing, because the server may be of another version.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    pub(crate) state: Option<State>,
    pub(crate) weight: Option<u32>,
    pub(crate) address: Option<String>,
    /// The mod revision of the control key that the server has applied.
    pub(crate) applied: Option<i64>,
    pub(crate) connections: Option<u64>,
    /// The reason why the server cannot use the control key.
    pub(crate) error: Option<String>,
}

impl Status {
    /// Parses the value of a status key. Returns `None` if it is not a JSON object of this form.
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }
}

/// What a command changes in a control key.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Change {
    pub(crate) state: Option<State>,
    pub(crate) weight: Option<u32>,
    pub(crate) sticky: Option<bool>,
}

impl Change {
    /// Returns the new value of a control key. Everything that the command does not change is kept, also unknown fields: the weight
    /// survives a drain, and a newer version may have written more fields. A value that is not a JSON object is replaced.
    pub(crate) fn apply(self, current: Option<&[u8]>) -> String {
        let current = current.and_then(|value| serde_json::from_slice(value).ok());
        let mut fields: Map<String, Value> = current.unwrap_or_default();
        if let Some(state) = self.state {
            fields.insert("state".to_owned(), state.as_str().into());
        }
        fields
            .entry("state")
            .or_insert_with(|| State::Serving.as_str().into());
        if let Some(weight) = self.weight {
            fields.insert("weight".to_owned(), weight.into());
        }
        if let Some(sticky) = self.sticky {
            fields.insert("sticky".to_owned(), sticky.into());
        }
        fields.entry("sticky").or_insert_with(|| false.into());
        Value::Object(fields).to_string()
    }
}

/// The keys of one service below the control prefix.
#[derive(Clone, Debug)]
pub(crate) struct ControlKeys {
    service: String,
}

impl ControlKeys {
    pub(crate) fn new(control_prefix: &str, service: &str) -> Self {
        let slash = if control_prefix.ends_with('/') {
            ""
        } else {
            "/"
        };
        Self {
            service: format!("{control_prefix}{slash}{service}/"),
        }
    }

    /// Returns the key that an operator writes.
    pub(crate) fn instance(&self, id: &str) -> String {
        format!("{}instances/{id}", self.service)
    }

    /// Returns the key that the server writes.
    pub(crate) fn status(&self, id: &str) -> String {
        format!("{}status/{id}", self.service)
    }

    /// Returns the key of the service config.
    pub(crate) fn config(&self) -> String {
        format!("{}config", self.service)
    }

    /// Returns what all status keys of the service start with.
    pub(crate) fn statuses(&self) -> String {
        self.status("")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_keeps_what_it_does_not_concern() {
        let drain = Change {
            state: Some(State::Draining),
            ..Change::default()
        };
        let applied = |before: Option<&[u8]>| -> Value {
            serde_json::from_str(&drain.apply(before)).expect("JSON")
        };
        assert_eq!(
            applied(None),
            serde_json::json!({"state": "draining", "sticky": false})
        );
        assert_eq!(
            applied(Some(
                br#"{"state":"serving","weight":3,"sticky":true,"x":[1]}"#
            )),
            serde_json::json!({"state": "draining", "weight": 3, "sticky": true, "x": [1]})
        );
        assert_eq!(applied(Some(b"not JSON")), applied(None));
        let weight = Change {
            weight: Some(5),
            ..Change::default()
        };
        let weighed = weight.apply(Some(br#"{"state":"paused"}"#));
        assert!(weighed.contains(r#""state":"paused""#), "{weighed}");
        assert!(weighed.contains(r#""weight":5"#), "{weighed}");
    }

    #[test]
    fn keys_follow_the_contract_with_the_server() {
        let keys = ControlKeys::new("/gRPC.control", "greeter");
        assert_eq!(keys.instance("a:1"), "/gRPC.control/greeter/instances/a:1");
        assert_eq!(keys.status("a:1"), "/gRPC.control/greeter/status/a:1");
        assert_eq!(keys.statuses(), "/gRPC.control/greeter/status/");
        assert_eq!(keys.config(), "/gRPC.control/greeter/config");
    }

    #[test]
    fn a_status_of_the_contract_is_read() {
        let status = Status::parse(
            br#"{"state":"draining","weight":2,"address":"10.0.0.5:80","applied":17,"connections":3}"#,
        )
        .expect("the status is valid");
        assert_eq!(status.state, Some(State::Draining));
        assert_eq!(status.applied, Some(17));
        assert_eq!(status.connections, Some(3));
        assert!(Status::parse(b"null").is_none());
    }
}
