//! What a registry's keys and values look like. One file per format, and the recogniser for values of any of them.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::instance::Instance;
use crate::keyspace::with_slash;
use tonic_balance::AddressPolicy;

mod address_in_key;
mod attributes;
mod decoder;
mod dubbo_application;
mod dubbo_interface;
mod error;
mod etcd_naming;
mod go_frame;
mod go_micro;
mod go_zero;
mod instance_format;
mod kitex;
mod kratos;
mod object;
mod plain;
mod recognise;
mod rpcx;
mod url;

pub(crate) use attributes::{MAX_WEIGHT, RESERVED};
pub(crate) use decoder::Decoder;
pub use error::FormatError;
pub use instance_format::InstanceFormat;

/// How instances are written as keys and values, and the only way they may be written to be read.
///
/// A registration writes [`EtcdNaming`](Self::EtcdNaming) unless told otherwise. A resolver without a format recognises by itself every
/// value below that names its address: JSON by the field in which the address is, then URLs, then `host:port`. Where a value could be of
/// two formats, it guesses: `{"address":…}` is kitex' unless a host or a service name stands beside it, then it is dubbo-go's. It never
/// looks for an address in a key, which takes a format, or [`Mixed`](Self::Mixed).
///
/// | format | key, unless the registry has a prefix | address | weight (default) | TLS hint |
/// |---|---|---|---|---|
/// | `EtcdNaming` | `/gRPC/<service>/<id>` | JSON, `Addr` | in `Metadata` (1) | - |
/// | `Plain` | `/gRPC/<service>/<id>` | the value | - | - |
/// | `Url` | `/gRPC/<service>/<id>` | the value's authority | - | the scheme |
/// | `GoZero` | `<key>/<id>` | the value | - | - |
/// | `Kratos` | `/microservices/<name>/<id>` | JSON, the `grpc` URL in `endpoints` | in `metadata` (100) | `grpcs` |
/// | `Kitex` | `kitex/registry-etcd/<service>/<id>` | JSON, `address` | `weight` (10) | - |
/// | `GoMicro` | `/micro/registry/<service>/<id>` | JSON, `nodes[].address` | in the node's `metadata` (1) | - |
/// | `Rpcx` | `/rpcx_test/<service>/tcp@<address>` | the key | in the query (1) | - |
/// | `DubboInterface` | `/dubbo/<service>/providers/<URL>` | the key | in the URL (100) | - |
/// | `DubboApplication` | `/services/<application>/<id>` | JSON, `Host` and `Port` | `Weight` (100) | - |
/// | `GoFrame` | `/service/default/default/<name>/<version>/<address>` | the key | in the JSON (1) | `insecure` |
/// | `AddressInKey` | `<service>/<address>` | the key | - | - |
///
/// `<id>` is the instance id, by default the address. [`RegistryBuilder::prefix`](crate::RegistryBuilder::prefix) replaces what stands
/// before the service, for all formats; it can be empty. Weights are the format's own and compare only within one format. Zone, version
/// and metadata go where a format has a field for them, else into its map of metadata; a registration with something that its format has
/// no room for is refused. Readers take `null` for what is empty, fields in any case, unknown ones, and a newline behind the value, as Go's
/// do. The TLS hint shows in [`Instance::is_tls`] and decides nothing.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub enum Format {
    /// The JSON of etcd's own Go naming package, `{"Op":0,"Addr":"10.0.0.5:50051","Metadata":null}`, so that grpc-go's etcd resolver
    /// finds our servers. Weight, zone and version ride inside `Metadata`. The default for writing.
    #[default]
    EtcdNaming,
    /// `host:port` and nothing else. It has no room for a weight, a zone, a version or metadata.
    Plain,
    /// A URL, `http://10.0.0.5:50051`; read with the schemes `http`, `https`, `grpc`, `grpcs`, `tcp` and `tri`. go-kit and many
    /// home-made registries have it.
    Url,
    /// go-zero: `host:port` under `<key>/<id>`, without a prefix.
    GoZero,
    /// go-kratos' `contrib/registry/etcd`. Instances without a gRPC endpoint are none of ours, and those under another name than their
    /// key's.
    Kratos,
    /// kitex' `registry-etcd`; for hertz', the registry's prefix is `hertz/registry-etcd`.
    Kitex,
    /// go-micro's etcd registry. Nodes of another protocol than gRPC are none of ours.
    GoMicro,
    /// rpcx' etcd plugin. rpcx has no base path of its own; that of its examples is the default. Instances that say `state=inactive`
    /// are none of ours, and those of another network than TCP.
    Rpcx,
    /// dubbo-go's interface-level registry. Providers of other protocols than `tri` and `grpc` are none of ours. Everything is in the
    /// key, so the weight cannot change in place.
    DubboInterface,
    /// dubbo-go's application-level registry. An instance with endpoints none of which is `tri` or `grpc` is none of ours, and one that
    /// is not enabled or not healthy.
    ///
    /// dubbo-go's consumers ask the metadata service of an application what it exports. A server that has none is found and not called
    /// by them: [`DubboInterface`](Self::DubboInterface) is the one for them to call.
    DubboApplication,
    /// `GoFrame`'s etcd registry. Of several addresses in a key, which are one server's, the first is called.
    GoFrame,
    /// `<service>/<host:port>` with an empty value, as the npm package `@zcong/grpc-etcd-resolver` writes and reads it.
    AddressInKey,
    /// For reading only: a prefix under which several formats are mixed. It recognises values as a resolver without a format does; where
    /// the value has no address, the key is looked at for one.
    ///
    /// It guesses. An empty value whose key ends in `host:port` is an instance, whoever wrote it; JSON without an address under such a
    /// key is `GoFrame`'s; an `@` in the key is rpcx', and so is a `=` in the value. Weights are as each value says, and a kitex instance (10) gets ten times the calls
    /// of one of etcd's own format (1). Name the format wherever there is only one.
    Mixed,
    /// A format of your own; see [`InstanceFormat`].
    Custom(&'static dyn InstanceFormat),
}

impl Format {
    /// The key of an instance of a service under a prefix, by default the format's own.
    ///
    /// # Errors
    ///
    /// If the format cannot make one of it.
    pub fn key(
        self,
        prefix: Option<&str>,
        service: &str,
        instance: &Instance,
    ) -> Result<String, FormatError> {
        self.dialect().key(&self.prefix(prefix), service, instance)
    }

    /// What all keys of a service begin with, under a prefix, by default the format's own.
    #[must_use]
    pub fn service_prefix(self, prefix: Option<&str>, service: &str) -> String {
        let prefix = self.prefix(prefix);
        with_slash(&self.dialect().service_prefix(&prefix, service))
    }

    /// The value of an instance at a key.
    ///
    /// # Errors
    ///
    /// If the format has no room for something that the instance says: what is written would not be read again. Or if the value is over
    /// 64 KiB.
    pub fn encode(self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let value = self.write(key, instance)?;
        if value.len() > MAX_VALUE {
            let reason = format!(
                "would be {} bytes long, over the limit of {MAX_VALUE}",
                value.len()
            );
            return Err(FormatError::new(reason));
        }
        let read = self.read(key, &value)?;
        let advertisement = instance.advertisement();
        let missing = match &read {
            Some(read) => advertisement.difference(read.advertisement()),
            None => Some("the address".to_owned()),
        };
        match missing {
            None => Ok(value),
            Some(missing) => Err(FormatError::new(format!(
                "has no room for {missing} at this key"
            ))),
        }
    }

    /// The instance at a key, without what only etcd knows of it; `None` if the key is not that of an instance that may be called.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is over 64 KiB, or has an address that the policy refuses. Whatever the bytes are, it never panics.
    pub fn decode(
        self,
        key: &str,
        value: &[u8],
        policy: &AddressPolicy,
    ) -> Result<Option<Instance>, FormatError> {
        let decoder = Decoder {
            format: Some(self),
            policy: policy.clone(),
        };
        decoder.read(key, value)
    }

    /// Writes without looking whether the format has room.
    pub(crate) fn write(self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        guarded(self, |format| format.encode(key, instance))
    }

    fn read(self, key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        guarded(self, |format| format.decode(key, value))
    }

    pub(crate) fn default_weight(self) -> u32 {
        self.dialect().default_weight().clamp(1, MAX_WEIGHT)
    }

    pub(crate) fn name(self) -> &'static str {
        self.dialect().name()
    }

    fn prefix(self, prefix: Option<&str>) -> String {
        match prefix.unwrap_or(self.dialect().default_prefix()) {
            "" => String::new(),
            prefix => with_slash(prefix),
        }
    }

    fn dialect(self) -> &'static dyn InstanceFormat {
        match self {
            Self::EtcdNaming => &etcd_naming::EtcdNaming,
            Self::Plain => &plain::Plain,
            Self::Url => &url::Url,
            Self::GoZero => &go_zero::GoZero,
            Self::Kratos => &kratos::Kratos,
            Self::Kitex => &kitex::Kitex,
            Self::GoMicro => &go_micro::GoMicro,
            Self::Rpcx => &rpcx::Rpcx,
            Self::DubboInterface => &dubbo_interface::DubboInterface,
            Self::DubboApplication => &dubbo_application::DubboApplication,
            Self::GoFrame => &go_frame::GoFrame,
            Self::AddressInKey => &address_in_key::AddressInKey,
            Self::Mixed => &recognise::Mixed,
            Self::Custom(format) => format,
        }
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The format's name, which [`FromStr`](std::str::FromStr) reads again.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Reads the name of a format of this library, such as `etcd naming` or `go-zero`. Case, blanks, hyphens and underscores do not matter.
///
/// ```
/// use tonic_etcd::Format;
///
/// assert_eq!("go-zero".parse::<Format>()?, Format::GoZero);
/// assert_eq!("etcd_naming".parse::<Format>()?, Format::EtcdNaming);
/// # Ok::<(), tonic_etcd::FormatError>(())
/// ```
impl std::str::FromStr for Format {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        let plain = |name: &str| -> String {
            let letters = name.chars().filter(char::is_ascii_alphanumeric);
            letters.map(|letter| letter.to_ascii_lowercase()).collect()
        };
        let wanted = plain(name);
        let found = NAMED.iter().find(|format| plain(format.name()) == wanted);
        found.copied().ok_or_else(|| {
            let names: Vec<_> = NAMED.iter().map(|format| format.name()).collect();
            FormatError::new(format!("{name:?} is none of {}", names.join(", ")))
        })
    }
}

/// All formats that have a name.
const NAMED: [Format; 13] = [
    Format::EtcdNaming,
    Format::Plain,
    Format::Url,
    Format::GoZero,
    Format::Kratos,
    Format::Kitex,
    Format::GoMicro,
    Format::Rpcx,
    Format::DubboInterface,
    Format::DubboApplication,
    Format::GoFrame,
    Format::AddressInKey,
    Format::Mixed,
];

/// Two formats of users' own are equal if they have one name and are one object.
impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
            && match (self, other) {
                (Self::Custom(a), Self::Custom(b)) => std::ptr::addr_eq(*a, *b),
                (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
            }
    }
}

impl Eq for Format {}

impl Hash for Format {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

/// Calls a format. One of users' own that panics must not end discovery for everybody else.
fn guarded<T>(
    format: Format,
    call: impl FnOnce(&dyn InstanceFormat) -> Result<T, FormatError>,
) -> Result<T, FormatError> {
    let Format::Custom(custom) = format else {
        return call(format.dialect());
    };
    catch_unwind(AssertUnwindSafe(|| call(custom)))
        .unwrap_or(Err(FormatError::of("makes its format panic")))
}

/// The text of a value, without the newline that some libraries write behind it.
fn text(value: &[u8]) -> Result<&str, FormatError> {
    let text = str::from_utf8(value).map_err(|_| FormatError::of("is not UTF-8"))?;
    Ok(text.trim())
}

/// What follows the last slash of a key.
fn last_segment(key: &str) -> &str {
    key.rsplit_once('/').map_or(key, |(_, last)| last)
}

/// What stands before the last slash of a key.
fn parent(key: &str) -> &str {
    key.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Values above this size are refused, for reading and for writing: the largest known format, with its endpoints' descriptions, stays
/// far below, and one bad writer must not fill every client's memory.
pub(crate) const MAX_VALUE: usize = 64 * 1024;

#[cfg(test)]
mod tests;
