//! Recognises a value of any known format by its looks. Where two formats could be meant, the order of the tries decides; a reader that
//! must not guess is given its [`Format`](super::Format).

use serde_json::{Map, Value};

use super::etcd_naming::{attributes, field, weight};
use super::{DecodeError, etcd_naming, plain};
use crate::address::Address;
use crate::instance::Advertisement;

pub(super) fn decode(text: &str) -> Result<Advertisement, DecodeError> {
    if text.is_empty() {
        return Err(DecodeError::Form("is empty"));
    }
    if text.starts_with('{') {
        return decode_object(text);
    }
    if text.contains("://") {
        return plain::address_of_url(text).map(Advertisement::new);
    }
    plain::decode(text)
}

fn decode_object(text: &str) -> Result<Advertisement, DecodeError> {
    let object: Map<String, Value> = serde_json::from_str(text)?;
    if field(&object, "Addr").is_some_and(Value::is_string) {
        return etcd_naming::decode(text);
    }
    // Each of the others has its address in a place of its own: kitex and dubbo-go in `address`, dubbo-go also in `Host` and `Port`,
    // kratos in `endpoints`, go-micro in `nodes`.
    let (address, node) = address(&object)
        .or_else(|| host_and_port(&object))
        .map(|address| (address, None))
        .or_else(|| first_endpoint(&object).map(|address| (address, None)))
        .or_else(|| first_node(&object).map(|(address, node)| (address, Some(node))))
        .ok_or(DecodeError::Form(
            "is JSON without an address in any known place",
        ))?;
    let mut advertisement = Advertisement::new(address?);
    for map in ["metadata", "tags"] {
        if let Some(Value::Object(metadata)) = field(&object, map) {
            attributes(&mut advertisement, metadata);
        }
    }
    if let Some(Value::Object(metadata)) = node.and_then(|node| field(node, "metadata")) {
        attributes(&mut advertisement, metadata);
    }
    if let Some(value) = field(&object, "weight") {
        advertisement.weight = weight(value);
    }
    if let Some(Value::String(version)) = field(&object, "version")
        && !version.is_empty()
    {
        advertisement.version = Some(version.clone());
    }
    Ok(advertisement)
}

type Parsed = Result<Address, DecodeError>;

fn address(object: &Map<String, Value>) -> Option<Parsed> {
    let address = field(object, "address")?
        .as_str()
        .filter(|address| !address.is_empty())?;
    Some(address.parse().map_err(DecodeError::from))
}

fn host_and_port(object: &Map<String, Value>) -> Option<Parsed> {
    let host = field(object, "host")?.as_str()?;
    let port = field(object, "port")?.as_u64()?;
    let bracketed = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    Some(bracketed.parse().map_err(DecodeError::from))
}

/// The gRPC endpoint among URLs, TLS or not; other protocols of the instance are not ours to call.
fn first_endpoint(object: &Map<String, Value>) -> Option<Parsed> {
    let urls = || {
        field(object, "endpoints")?
            .as_array()
            .map(|urls| urls.iter().filter_map(Value::as_str))
    };
    let url = urls()?.find(|url| url.starts_with("grpc://") || url.starts_with("grpcs://"))?;
    Some(plain::address_of_url(url))
}

fn first_node(object: &Map<String, Value>) -> Option<(Parsed, &Map<String, Value>)> {
    let node = field(object, "nodes")?.as_array()?.first()?.as_object()?;
    Some((address(node)?, node))
}

#[cfg(test)]
mod tests {
    use super::super::{Decoder, Format};
    use super::*;

    fn read(value: &str) -> Result<Advertisement, DecodeError> {
        Decoder::default().decode(value.as_bytes())
    }

    #[test]
    fn every_known_form_is_recognised() {
        for value in [
            "10.0.0.5:8080",
            "10.0.0.5:8080\n",
            "http://10.0.0.5:8080",
            "grpc://10.0.0.5:8080/path?query",
            r#"{"Op":0,"Addr":"10.0.0.5:8080","Metadata":null}"#,
            r#"{"Addr":"10.0.0.5:8080","Metadata":"..."}"#,
            r#"{"addr":"10.0.0.5:8080"}"#,
            r#"{"network":"tcp","address":"10.0.0.5:8080","weight":10,"tags":null}"#,
            r#"{"id":"6f1d","name":"helloworld","version":"v1.0.0","metadata":null,"endpoints":["http://10.0.0.5:1","grpc://10.0.0.5:8080"]}"#,
            r#"{"name":"greeter","metadata":null,"endpoints":[],"nodes":[{"metadata":{"protocol":"grpc"},"id":"x","address":"10.0.0.5:8080"}]}"#,
            "{\"ID\":\"x\",\"Host\":\"10.0.0.5\",\"Port\":8080,\"Weight\":0,\"Metadata\":{},\"ServiceMetadata\":null,\"Address\":\"\"}\n",
        ] {
            let advertisement = read(value).unwrap_or_else(|error| panic!("{value} {error}"));
            assert_eq!(advertisement.address.as_str(), "10.0.0.5:8080", "{value}");
        }
    }

    #[test]
    fn attributes_are_read_wherever_a_format_keeps_them() {
        let naming = r#"{"Op":0,"Addr":"10.0.0.5:80","Metadata":{"weight":3,"zone":"eu-1a","version":"1.2.0","rack":"7","nested":{"a":[1]}}}"#;
        let read_naming = read(naming).expect("valid");
        assert_eq!(
            (
                read_naming.weight,
                read_naming.zone.as_deref(),
                read_naming.version.as_deref()
            ),
            (3, Some("eu-1a"), Some("1.2.0"))
        );
        assert_eq!(read_naming.metadata["rack"], "7");
        assert_eq!(read_naming.metadata["nested"], r#"{"a":[1]}"#);
        let kratos =
            r#"{"version":"v1","metadata":{"weight":"20"},"endpoints":["grpc://10.0.0.5:80"]}"#;
        let read_kratos = read(kratos).expect("valid");
        assert_eq!(
            (read_kratos.weight, read_kratos.version.as_deref()),
            (20, Some("v1"))
        );
        assert_eq!(
            read(r#"{"address":"10.0.0.5:80","weight":-4}"#)
                .expect("valid")
                .weight,
            1
        );
        assert_eq!(
            read(r#"{"address":"10.0.0.5:80","weight":1e300}"#)
                .expect("valid")
                .weight,
            etcd_naming::MAX_WEIGHT
        );
    }

    #[test]
    fn what_we_write_we_read() {
        let mut advertisement = Advertisement::new("[2001:db8::1]:50051".parse().expect("valid"));
        let plain = Format::EtcdNaming.encode(&advertisement);
        assert_eq!(
            plain,
            br#"{"Op":0,"Addr":"[2001:db8::1]:50051","Metadata":null}"#
        );
        advertisement.weight = 7;
        advertisement.zone = Some("eu\"1a".to_owned());
        advertisement.version = Some("1".to_owned());
        advertisement.leaving = true;
        advertisement
            .metadata
            .insert("rack".to_owned(), "7".to_owned());
        let value = Format::EtcdNaming.encode(&advertisement);
        assert_eq!(Decoder::default().decode(&value), Ok(advertisement.clone()));
        let only = Decoder {
            format: Some(Format::EtcdNaming),
            ..Decoder::default()
        };
        assert_eq!(only.decode(&value), Ok(advertisement));
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic() {
        let deep = "[".repeat(30_000);
        let deep_object = "{\"a\":".repeat(10_000);
        let long = "x".repeat(super::super::MAX_VALUE + 1);
        for value in [
            "",
            " ",
            "{",
            "{}",
            "null",
            "[]",
            "\"10.0.0.5:80\"",
            "{\"Addr\":1}",
            "{\"Addr\":\"\"}",
            "{\"address\":null}",
            "not an address",
            "ftp://10.0.0.5:80",
            "http://user:pw@10.0.0.5:80",
            "http://",
            "grpc://10.0.0.5",
            "0.0.0.0:80",
            "169.254.169.254:80",
            &deep,
            &deep_object,
            &long,
        ] {
            let error = read(value).expect_err("garbage");
            assert!(
                error.to_string().len() < 200,
                "an error must not repeat the value"
            );
        }
        assert!(Decoder::default().decode(b"\xff\xfe").is_err());
    }

    #[test]
    fn a_reader_with_a_format_reads_nothing_else() {
        let only = Decoder {
            format: Some(Format::Plain),
            ..Decoder::default()
        };
        assert!(only.decode(b"10.0.0.5:80").is_ok());
        assert!(only.decode(br#"{"Op":0,"Addr":"10.0.0.5:80"}"#).is_err());
        assert!(only.decode(b"http://10.0.0.5:80").is_err());
    }
}
