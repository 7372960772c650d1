//! dubbo-go's interface-level registry. The key contains all attributes, as an escaped URL.

use serde_json::{Map, Value};

use super::attributes::Attributes;
use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::object::Object;
use super::text::{last_segment, parent};
use super::url::{Parts, escape, read_query, unescape, write_query};
use crate::instance::{Advertisement, Instance};

/// The key is `/dubbo/<service>/providers/<escaped URL>`, and the value is empty. Providers with the protocols `tri` and `grpc` are read,
/// others are ignored. The default weight is 100. No attribute can change without a new key, because the key contains all attributes.
#[derive(Debug)]
pub(super) struct DubboInterface;

impl InstanceFormat for DubboInterface {
    fn name(&self) -> &'static str {
        NAME
    }

    fn default_prefix(&self) -> &'static str {
        "/dubbo/"
    }

    fn default_weight(&self) -> u32 {
        ATTRIBUTES.weight
    }

    fn service_prefix(&self, prefix: &str, service: &str) -> String {
        format!("{prefix}{service}/{PROVIDERS}/")
    }

    fn key(&self, prefix: &str, service: &str, instance: &Instance) -> Result<String, FormatError> {
        let advertisement = instance.advertisement();
        let mut kept = Object::from(advertisement.kept(NAME));
        let scheme = kept.take_text("scheme");
        let scheme = scheme.as_deref().unwrap_or(SCHEME);
        let path = kept.take_text("path").unwrap_or_else(|| path(service));
        let mut query = ATTRIBUTES.write(advertisement, &kept.take_map("query"));
        query
            .entry("interface".to_owned())
            .or_insert_with(|| service.into());
        let url = format!(
            "{scheme}://{}/{path}?{}",
            advertisement.address,
            write_query(&query)
        );
        Ok(self.service_prefix(prefix, service) + &escape(&url))
    }

    fn encode(&self, _: &str, _: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(Vec::new())
    }

    fn decode(&self, key: &str, _: &[u8]) -> Result<Option<Instance>, FormatError> {
        let category = parent(key);
        let url = unescape(last_segment(key));
        // The registry also has keys of consumers, of rules and of folders, which are not instances.
        if last_segment(category) != PROVIDERS || !url.contains("://") {
            return Ok(None);
        }
        let parts = Parts::of(&url)?;
        if !["tri", "grpc"].contains(&&*parts.scheme) {
            return Ok(None);
        }
        let mut advertisement = Advertisement::new(parts.address()?);
        let service = last_segment(parent(category));
        let mut query = read_query(parts.query());
        if Object::from(query.clone()).is_out_of_service() {
            return Ok(None);
        }
        query.retain(|name, value| !(name == "interface" && value == service));
        ATTRIBUTES.read(&mut advertisement, &query);
        let mut kept = Object::from(Map::new());
        let leftover = ATTRIBUTES.leftover(&advertisement, query);
        kept.keep_map("query", leftover);
        kept.keep("scheme", Some(parts.scheme.as_str().into()), &SCHEME.into());
        let written = Value::from(path(service));
        kept.keep("path", Some(parts.path().into()), &written);
        advertisement.keep(NAME, kept.rest());
        Ok(Some(advertisement.into()))
    }
}

/// Returns the service name as it is written in the path of the URL. dubbo-go escapes the `$` in the names of Java's nested classes.
fn path(service: &str) -> String {
    service.replace('$', "%24")
}

const NAME: &str = "DubboInterface";
const PROVIDERS: &str = "providers";
/// The scheme of Triple, the protocol of dubbo that is compatible with gRPC.
const SCHEME: &str = "tri";
const ATTRIBUTES: Attributes = Attributes {
    names: &["weight", "zone", "version"],
    texts: true,
    weight: 100,
};
