//! The URL of a service in etcd: the forms of this library, grpc-go and go-zero.

use percent_encoding::percent_decode_str;

use crate::error::{RegistryError, without_password};

/// A parsed target.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Empty for the form of grpc-go, which names no members: the registry's members are used.
    pub(crate) members: Vec<String>,
    pub(crate) lookup: Lookup,
}

/// The location of the instances.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// A service under the registry's prefix.
    Service(String),
    /// The complete key prefix before the instance ids, without its trailing slash, as in etcd's own resolver for grpc-go.
    Path(String),
    /// A key from go-zero's configuration, in go-zero's format.
    GoZero(String),
}

impl Target {
    pub(crate) fn parse(target: &str) -> Result<Self, RegistryError> {
        Self::parts(target).map_err(|reason| invalid(target, reason))
    }

    /// Parses a target that names its members.
    pub(super) fn with_members(target: &str) -> Result<Self, RegistryError> {
        let parsed = Self::parse(target)?;
        if parsed.members.is_empty() {
            return Err(invalid(
                target,
                "it names no etcd member; connect a `Registry` to the members, and pass the target to `Registry::channel_to`",
            ));
        }
        Ok(parsed)
    }

    /// Parses a target without members, for a registry that is already connected.
    pub(crate) fn of_registry(target: &str) -> Result<Lookup, RegistryError> {
        let parsed = Self::parse(target)?;
        if !parsed.members.is_empty() {
            return Err(invalid(
                target,
                "it names etcd members, but the registry has its own; pass the target to `tonic_etcd::connect` instead",
            ));
        }
        Ok(parsed.lookup)
    }

    fn parts(target: &str) -> Result<Self, &'static str> {
        let (scheme, rest) = target.split_once("://").unwrap_or(("", target));
        if !["etcd", "discov"].contains(&scheme) {
            return Err("it begins neither with etcd:// nor with discov://");
        }
        let (authority, path) = rest.split_once('/').ok_or("it names no service")?;
        if authority.contains('@') {
            return Err("it contains a user; set the user with `RegistryBuilder::user`");
        }
        if path.contains('#') {
            return Err("it has a fragment");
        }
        match (scheme, authority, path.split_once('?')) {
            (_, "", Some((path, query))) => Self::go_zero(path, key(query)?),
            ("discov", "", None) => Err("it names no etcd member"),
            (_, "", None) => Self::grpc_go(path),
            (_, _, Some(_)) => {
                Err("it has both members before the path and a query; remove one of the two")
            }
            ("discov", members, None) => Self::go_zero(members, path.to_owned()),
            (_, members, None) => Self::ours(members, path),
        }
    }

    /// Parses `etcd://host:port[,host:port…]/service`.
    fn ours(authority: &str, service: &str) -> Result<Self, &'static str> {
        if service.is_empty() || service.contains('/') {
            return Err("its path must be a single service name");
        }
        Ok(Self {
            members: members(authority)?,
            lookup: Lookup::Service(service.to_owned()),
        })
    }

    /// Parses `etcd:///service`. The path is everything after the third slash, and may begin with a slash itself.
    fn grpc_go(path: &str) -> Result<Self, &'static str> {
        if path.is_empty() || path.ends_with('/') {
            return Err("it names no service");
        }
        // A path that contains a comma, or that is an address, is most likely a list of members and not a service name.
        let is_member = |member: &str| member.parse::<crate::Address>().is_ok();
        if path.contains(',') || is_member(path) {
            return Err(
                "its path looks like a list of etcd members; add ?key= after it, or remove one slash before it",
            );
        }
        Ok(Self {
            members: Vec::new(),
            lookup: Lookup::Path(path.to_owned()),
        })
    }

    /// Parses the two forms of go-zero: `discov://host:port[,host:port…]/key` up to version 1.10.1, and
    /// `etcd:///host:port[,host:port…]?key=key` in later versions.
    fn go_zero(authority: &str, key: String) -> Result<Self, &'static str> {
        if key.is_empty() || key.ends_with('/') {
            return Err("it names no key");
        }
        Ok(Self {
            members: members(authority)?,
            lookup: Lookup::GoZero(key),
        })
    }
}

fn members(authority: &str) -> Result<Vec<String>, &'static str> {
    let members: Vec<_> = authority.split(',').map(str::to_owned).collect();
    if members.iter().any(String::is_empty) {
        return Err("it names no etcd member");
    }
    Ok(members)
}

fn key(query: &str) -> Result<String, &'static str> {
    let mut keys = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("key="));
    let key = keys.next().ok_or("its query names no key")?;
    if keys.next().is_some() {
        return Err("its query names several keys");
    }
    let key = percent_decode_str(key).decode_utf8();
    key.map(String::from).map_err(|_| "its key is not UTF-8")
}

fn invalid(target: &str, reason: &'static str) -> RegistryError {
    RegistryError::InvalidTarget {
        target: without_password(target).into_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_target_is_parsed() {
        let service = |name: &str| Lookup::Service(name.to_owned());
        let path = |path: &str| Lookup::Path(path.to_owned());
        let go_zero = |key: &str| Lookup::GoZero(key.to_owned());
        for (target, members, lookup) in [
            (
                "etcd://10.0.0.1:2379,[::1]:2379/helloworld.Greeter",
                vec!["10.0.0.1:2379", "[::1]:2379"],
                service("helloworld.Greeter"),
            ),
            (
                "etcd:///helloworld.Greeter",
                vec![],
                path("helloworld.Greeter"),
            ),
            (
                "etcd:///team/blue/greeter",
                vec![],
                path("team/blue/greeter"),
            ),
            ("etcd:////gRPC/greeter", vec![], path("/gRPC/greeter")),
            (
                "discov://a:1,b:2/user.rpc",
                vec!["a:1", "b:2"],
                go_zero("user.rpc"),
            ),
            (
                "etcd:///a:1,b:2?key=user.rpc",
                vec!["a:1", "b:2"],
                go_zero("user.rpc"),
            ),
            (
                "discov:///a:1?x=y&key=team%2Fuser.rpc",
                vec!["a:1"],
                go_zero("team/user.rpc"),
            ),
        ] {
            let parsed = Target::parse(target).expect(target);
            assert_eq!(
                (parsed.members, parsed.lookup),
                (members.iter().map(ToString::to_string).collect(), lookup)
            );
        }
    }

    #[test]
    fn invalid_and_ambiguous_targets_are_rejected_with_the_reason() {
        for (target, word) in [
            ("", "etcd://"),
            ("http://127.0.0.1:2379/svc", "etcd://"),
            ("etcd://127.0.0.1:2379", "no service"),
            ("etcd://127.0.0.1:2379/", "single service"),
            ("etcd:///", "no service"),
            ("etcd:///svc/", "no service"),
            ("etcd://a:1,/svc", "no etcd member"),
            ("etcd://u:p@a:1/svc", "user"),
            ("etcd://a:1/web/svc", "single service"),
            ("etcd://a:1/svc?key=x", "members before the path"),
            ("etcd://a:1/svc#x", "fragment"),
            ("etcd:///a:1", "?key="),
            ("etcd:///a:1,b:1", "?key="),
            ("etcd:///a:1?x=y", "no key"),
            ("etcd:///a:1?key=", "no key"),
            ("etcd:///a:1?key=x&key=y", "several"),
            ("etcd:///?key=x", "no etcd member"),
            ("discov:///user.rpc", "no etcd member"),
        ] {
            let error = Target::parse(target).expect_err(target).to_string();
            let shown = target.replace("u:p@", "u:***@");
            assert!(error.contains(&format!("{shown:?}")), "{error}");
            assert!(error.contains(word), "{target} {error}");
        }
        let error = Target::with_members("etcd:///svc")
            .expect_err("a target without members must be rejected");
        assert!(error.to_string().contains("channel_to"), "{error}");
        let error = Target::of_registry("etcd://a:1/svc")
            .expect_err("a target with members must be rejected");
        assert!(error.to_string().contains("tonic_etcd::connect"), "{error}");
    }
}
