//! The names of the control keys and status keys of a registration.

use crate::keyspace::{Key, with_slash};

/// The control keys and status keys of a registration: one of each for each service, in the order of the services.
#[derive(Clone, Debug)]
pub(in crate::registration) struct ControlKeys {
    pub(super) instances: Vec<Key>,
    pub(super) statuses: Vec<Key>,
}

impl ControlKeys {
    /// The instance id is the part of the instance key after the last slash.
    pub(in crate::registration) fn new(prefix: &str, services: &[String], keys: &[Key]) -> Self {
        let prefix = with_slash(prefix);
        let of = |folder: &str| {
            let pairs = services.iter().zip(keys);
            let keys = pairs.map(|(service, key)| {
                let id = key.as_bytes().rsplit(|byte| *byte == b'/').next();
                let parent = format!("{prefix}{service}/{folder}/");
                Key::from([parent.as_bytes(), id.unwrap_or_default()].concat())
            });
            keys.collect()
        };
        Self {
            instances: of("instances"),
            statuses: of("status"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_service_has_a_control_key_and_a_status_key() {
        let services = ["a".to_owned(), "b".to_owned()];
        let keys = ["/gRPC/a/10.0.0.5:1", "/gRPC/b/10.0.0.5:1"].map(Key::from);
        let keys = ControlKeys::new("/control", &services, &keys);
        let names = |keys: &[Key]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            names(&keys.instances),
            [
                "/control/a/instances/10.0.0.5:1",
                "/control/b/instances/10.0.0.5:1"
            ]
        );
        assert_eq!(
            names(&keys.statuses),
            [
                "/control/a/status/10.0.0.5:1",
                "/control/b/status/10.0.0.5:1"
            ]
        );
    }
}
