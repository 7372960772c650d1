//! The URL of a service in etcd.

use super::ChannelError;

/// `etcd://host:port[,host:port…]/service`, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) members: Vec<String>,
    pub(super) service: String,
}

impl Target {
    pub(super) fn parse(target: &str) -> Result<Self, ChannelError> {
        let invalid = |reason| ChannelError::InvalidTarget {
            target: target.to_owned(),
            reason,
        };
        let rest = target
            .strip_prefix("etcd://")
            .ok_or_else(|| invalid("it does not begin with etcd://"))?;
        let (members, service) = rest
            .split_once('/')
            .ok_or_else(|| invalid("it names no service"))?;
        if members.contains('@') {
            return Err(invalid("a user belongs into `Registry::builder`"));
        }
        let members: Vec<_> = members.split(',').map(str::to_owned).collect();
        if members.iter().any(String::is_empty) {
            return Err(invalid("it names no etcd member"));
        }
        if service.is_empty() || service.contains(['/', '?', '#']) {
            return Err(invalid("its path is not one service's name"));
        }
        Ok(Self {
            members,
            service: service.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_service_are_told_apart() {
        let target = Target::parse("etcd://10.0.0.1:2379,[::1]:2379/helloworld.Greeter");
        let expected = Target {
            members: vec!["10.0.0.1:2379".to_owned(), "[::1]:2379".to_owned()],
            service: "helloworld.Greeter".to_owned(),
        };
        assert_eq!(target.expect("valid"), expected);
    }

    #[test]
    fn what_is_no_target_is_refused_by_name() {
        for target in [
            "",
            "http://127.0.0.1:2379/svc",
            "etcd://127.0.0.1:2379",
            "etcd://127.0.0.1:2379/",
            "etcd:///svc",
            "etcd://a:1,/svc",
            "etcd://u:p@a:1/svc",
            "etcd://a:1/web/svc",
            "etcd://a:1/svc?x=1",
        ] {
            let error = Target::parse(target).expect_err("not valid");
            assert!(
                error.to_string().contains(&format!("{target:?}")),
                "{error}"
            );
        }
    }
}
