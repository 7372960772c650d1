//! The type that selects a format.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::attributes::MAX_WEIGHT;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::limits::MAX_VALUE;
use crate::instance::Instance;
use crate::keyspace::with_slash;

/// The format of the keys and values of instances. It selects how a registration writes, and restricts what a resolver reads.
///
/// A registration writes [`EtcdNaming`](Self::EtcdNaming) by default. A resolver without a format recognises the formats whose values
/// contain the address (see the column "address" of the table below). It checks for JSON, then for a URL, then for `host:port`. For JSON,
/// the field that contains the address shows which format the value has. The field `address` is ambiguous: a value that also contains a
/// host or a service name is read as `DubboApplication`, any other value as `Kitex`. A resolver without a format never reads an
/// address from a key. If the keys contain the addresses, set the format, or [`Mixed`](Self::Mixed).
///
/// | format | key, with the default prefix | address | weight (default) | TLS hint |
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
/// `<id>` is the instance id, by default the address. [`RegistryBuilder::prefix`](crate::registry::RegistryBuilder::prefix) replaces the
/// part before the service in all formats; the prefix can be empty. Each format has its own scale of weights, so weights of different
/// formats are not comparable. Zone, version and metadata are stored in their own field if the format has one, otherwise in its map of
/// metadata. A registration with an attribute that its format cannot represent is rejected. As in Go, readers treat `null` as empty, ignore
/// the case of field names, and ignore unknown fields and a newline after the value. The TLS hint is the result of [`Instance::is_tls`] and
/// has no effect on connections.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Format {
    /// The JSON of etcd's own Go naming package, `{"Op":0,"Addr":"10.0.0.5:50051","Metadata":null}`. With this format, etcd's resolver for
    /// grpc-go finds the servers of this library. Weight, zone and version are inside `Metadata`. Registrations use it by default.
    #[default]
    EtcdNaming,
    /// `host:port` alone, without a weight, a zone, a version or metadata.
    Plain,
    /// A URL such as `http://10.0.0.5:50051`, as in go-kit and many custom registries. Readers accept the schemes `http`, `https`, `grpc`,
    /// `grpcs`, `tcp` and `tri`.
    Url,
    /// go-zero: the value `host:port` at `<key>/<id>`, without a prefix. `<key>` is the `Key` in go-zero's configuration, and the service
    /// name in this library.
    GoZero,
    /// go-kratos' `contrib/registry/etcd`. Instances without a gRPC endpoint, and instances whose name differs from the name in the key,
    /// are ignored.
    Kratos,
    /// kitex' `registry-etcd`. For hertz, set the prefix of the registry to `hertz/registry-etcd`.
    Kitex,
    /// go-micro's etcd registry. Nodes whose protocol is not gRPC are ignored.
    GoMicro,
    /// rpcx' etcd plugin. rpcx has no base path of its own, so the default is the base path of its examples. Instances with
    /// `state=inactive`, and instances whose network is not TCP, are ignored.
    Rpcx,
    /// dubbo-go's interface-level registry. Providers whose protocol is neither `tri` nor `grpc` are ignored. The key contains all
    /// attributes, so the weight cannot change without a new key.
    DubboInterface,
    /// dubbo-go's application-level registry. An instance is ignored if it is disabled, if it is not healthy, or if it lists endpoints and
    /// none of them is `tri` or `grpc`. An instance that lists no endpoints is used.
    ///
    /// Consumers of dubbo-go request the exported services from the metadata service of an application. These consumers discover a server
    /// that has no metadata service, but send it no calls. For them, use [`DubboInterface`](Self::DubboInterface).
    DubboApplication,
    /// `GoFrame`'s etcd registry. A key may contain several addresses of one server. The first valid address is called.
    GoFrame,
    /// `<service>/<host:port>` with an empty value, as the npm package `@zcong/grpc-etcd-resolver` writes and reads it.
    AddressInKey,
    /// For reading only: for a prefix that contains several formats. Values are recognised as by a resolver without a format. If a value
    /// contains no address, the address is read from the key.
    ///
    /// The format of such a key is a guess. A key that ends in `host:port` is read as `AddressInKey` if its value is empty, whichever
    /// library has written it, as `GoFrame` if its value is a JSON object, and as `Rpcx` if its value contains a `=`. A key whose last part
    /// contains an `@` is read as `Rpcx`. A key that ends in an escaped URL below `providers` is read as `DubboInterface`.
    ///
    /// Weights are not converted: a kitex instance with the default weight (10) receives ten times the calls of an instance in etcd's own
    /// format with the default weight (1). If a prefix contains only one format, set that format.
    Mixed,
    /// A format of your own, from [`Format::custom`].
    Custom(Arc<dyn InstanceFormat>),
}

impl Format {
    /// Creates a format from your own implementation of [`InstanceFormat`], whose documentation has an example.
    #[must_use]
    pub fn custom(format: impl InstanceFormat + 'static) -> Self {
        Self::Custom(Arc::new(format))
    }

    /// Returns the key of an instance. If `prefix` is `None`, the default prefix of the format is used.
    ///
    /// # Errors
    ///
    /// Fails if the format cannot represent the instance in a key.
    pub fn key(
        &self,
        prefix: Option<&str>,
        service: &str,
        instance: &Instance,
    ) -> Result<String, FormatError> {
        self.instance_format()
            .key(&self.prefix(prefix), service, instance)
    }

    /// Returns the string that all keys of a service start with. If `prefix` is `None`, the default prefix of the format is used.
    #[must_use]
    pub fn service_prefix(&self, prefix: Option<&str>, service: &str) -> String {
        let prefix = self.prefix(prefix);
        with_slash(&self.instance_format().service_prefix(&prefix, service))
    }

    /// Encodes the value of an instance at a key.
    ///
    /// # Errors
    ///
    /// Fails if the format cannot represent an attribute of the instance: decoding would then lose the attribute. Also fails if the value
    /// is over 64 KiB.
    pub fn encode(&self, key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let value = self.encode_unchecked(key, instance)?;
        if value.len() > MAX_VALUE {
            let reason = format!(
                "would be {} bytes long, over the limit of {MAX_VALUE} bytes",
                value.len()
            );
            return Err(FormatError::new(reason));
        }
        let read = self.decode_unchecked(key, &value)?;
        let advertisement = instance.advertisement();
        let missing = match &read {
            Some(read) => advertisement.difference(read.advertisement()),
            None => Some("the address".to_owned()),
        };
        match missing {
            None => Ok(value),
            Some(missing) => Err(FormatError::new(format!(
                "cannot represent {missing} at this key"
            ))),
        }
    }

    /// Encodes a value. Does not check its size, and does not check that the format can represent every attribute.
    pub(crate) fn encode_unchecked(
        &self,
        key: &str,
        instance: &Instance,
    ) -> Result<Vec<u8>, FormatError> {
        catch_panic(self, |format| format.encode(key, instance))
    }

    /// Decodes a value. Does not check the size of the value, and does not check the address policy.
    pub(crate) fn decode_unchecked(
        &self,
        key: &str,
        value: &[u8],
    ) -> Result<Option<Instance>, FormatError> {
        catch_panic(self, |format| format.decode(key, value))
    }

    pub(crate) fn default_weight(&self) -> u32 {
        self.instance_format().default_weight().clamp(1, MAX_WEIGHT)
    }

    pub(crate) fn name(&self) -> &str {
        self.instance_format().name()
    }

    fn prefix(&self, prefix: Option<&str>) -> String {
        match prefix.unwrap_or(self.instance_format().default_prefix()) {
            "" => String::new(),
            prefix => with_slash(prefix),
        }
    }

    fn instance_format(&self) -> &dyn InstanceFormat {
        match self {
            Self::EtcdNaming => &super::etcd_naming::EtcdNaming,
            Self::Plain => &super::plain::Plain,
            Self::Url => &super::url::Url,
            Self::GoZero => &super::go_zero::GoZero,
            Self::Kratos => &super::kratos::Kratos,
            Self::Kitex => &super::kitex::Kitex,
            Self::GoMicro => &super::go_micro::GoMicro,
            Self::Rpcx => &super::rpcx::Rpcx,
            Self::DubboInterface => &super::dubbo_interface::DubboInterface,
            Self::DubboApplication => &super::dubbo_application::DubboApplication,
            Self::GoFrame => &super::go_frame::GoFrame,
            Self::AddressInKey => &super::address_in_key::AddressInKey,
            Self::Mixed => &super::recognise::Mixed,
            Self::Custom(format) => &**format,
        }
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes the name of the format. [`FromStr`](std::str::FromStr) parses the names of all formats except custom ones.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Parses the name of a format of this library, such as `etcd naming` or `go-zero`. Case, blanks, hyphens and underscores are ignored.
///
/// ```
/// use tonic_etcd::Format;
///
/// assert_eq!("go-zero".parse::<Format>()?, Format::GoZero);
/// assert_eq!("etcd_naming".parse::<Format>()?, Format::EtcdNaming);
/// # Ok::<(), tonic_etcd::error::FormatError>(())
/// ```
impl std::str::FromStr for Format {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        let normalized = |name: &str| -> String {
            let letters = name.chars().filter(char::is_ascii_alphanumeric);
            letters.map(|letter| letter.to_ascii_lowercase()).collect()
        };
        let wanted = normalized(name);
        let found = NAMED
            .iter()
            .find(|format| normalized(format.name()) == wanted);
        found.cloned().ok_or_else(|| {
            let names: Vec<_> = NAMED.iter().map(Format::name).collect();
            FormatError::new(format!("{name:?} is none of {}", names.join(", ")))
        })
    }
}

/// All formats that [`FromStr`](std::str::FromStr) can parse.
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

/// Custom formats are equal if they have the same name and are the same object.
impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
            && match (self, other) {
                (Self::Custom(a), Self::Custom(b)) => Arc::ptr_eq(a, b),
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

/// Calls a format. A panic of a custom format becomes an error, because the panic must not end the discovery of other services.
fn catch_panic<T>(
    format: &Format,
    call: impl FnOnce(&dyn InstanceFormat) -> Result<T, FormatError>,
) -> Result<T, FormatError> {
    let Format::Custom(custom) = format else {
        return call(format.instance_format());
    };
    catch_unwind(AssertUnwindSafe(|| call(&**custom)))
        .unwrap_or(Err(FormatError::of("makes its format panic")))
}
